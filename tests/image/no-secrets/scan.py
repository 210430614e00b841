"""Looks for credentials in every file of every layer of an image, except in machine code.

Usage: docker save IMAGE | scan.py [WORD...]. Each WORD, such as a login of this machine, must not be in any file.
Prints what it finds; ends with 1 if it found something.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator

PIECE = 1 << 24
OVERLAP = 1 << 10
# What it is, how it begins (a fast search), the whole pattern.
SECRETS = (
    ("a private key", b"PRIVATE KEY-----", rb"PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{200}"),
    ("an AWS key", b"AKIA", rb"(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])"),
    ("a GitHub token", b"ghp_", rb"(?<![A-Za-z0-9])ghp_[A-Za-z0-9]{36}"),
    ("a GitHub token", b"ghs_", rb"(?<![A-Za-z0-9])ghs_[A-Za-z0-9]{36}"),
    ("a GitHub token", b"github_pat_", rb"github_pat_[A-Za-z0-9_]{60}"),
    ("a Hugging Face token", b"hf_", rb"(?<![A-Za-z0-9])hf_[A-Za-z]{34}(?![A-Za-z])"),
    ("a Slack token", b"xoxb-", rb"xoxb-[0-9]{8,}-[0-9A-Za-z-]{10}"),
    ("a PyPI token", b"pypi-AgEIcHlwaS5vcmc", rb"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{20}"),
    ("a Weights & Biases key", b"WANDB_API_KEY=", rb"WANDB_API_KEY=[0-9a-f]{40}"),
)
# Examples in documentation, which are no real keys.
EXAMPLES = (rb"AKIA[A-Z0-9]*EXAMPLE", rb"AKIAIOSFODNN7")


MACHINE_CODE = re.compile(r"\.so(\.\d+)*$")

Pattern = tuple[str, bytes, bytes]


def found(content: bytes, patterns: Iterable[Pattern]) -> Iterator[tuple[str, str]]:
    """(what it is, how it begins) of each credential in a piece of a file."""
    for what, beginning, pattern in patterns:
        for match in re.finditer(pattern, content) if beginning in content else ():
            if not any(re.match(example, match[0]) for example in EXAMPLES):
                yield what, match[0][:40].decode(errors="replace")


def scan(stream, patterns: Iterable[Pattern]) -> tuple[int, set[tuple[str, str, str]]]:
    """(bytes read, {(file, what it is, how it begins)}) of an image as `docker save` writes it."""
    read, hits = 0, set()
    with tarfile.open(fileobj=stream, mode="r|") as image:
        for blob in image:
            if not blob.isfile():
                continue
            try:
                with tarfile.open(fileobj=image.extractfile(blob), mode="r|*") as layer:
                    for entry in layer:
                        if entry.isfile() and not MACHINE_CODE.search(entry.name):
                            read += entry.size
                            hits |= {(entry.name, *hit) for hit in _of_file(layer.extractfile(entry), patterns)}
            except tarfile.ReadError:
                pass  # a manifest or a configuration, which run.sh checks
    return read, hits


def _of_file(file, patterns: Iterable[Pattern]) -> Iterator[tuple[str, str]]:
    kept = b""
    while piece := file.read(PIECE):
        yield from found(kept + piece if kept else piece, patterns)
        kept = piece[-OVERLAP:] if len(piece) == PIECE else b""


if __name__ == "__main__":
    own = [("a word of this machine", word.encode(), re.escape(word.encode())) for word in sys.argv[1:] if word]
    count, secrets = scan(sys.stdin.buffer, (*SECRETS, *own))
    print(f"{count} bytes of files")
    for line in sorted(secrets):
        print(json.dumps(line))
    sys.exit(bool(secrets) or count < 500_000_000)
