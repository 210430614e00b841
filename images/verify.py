"""make verify: builds an image twice without any cache; equal digests, or the layers and files that differ."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from images import debian, engine
from images.image import NEEDED_BYTES, Request, build, inspect, require_free
from images.store import BuildError, sha256_of

SHOWN = 20  # files of a layer that are named


def verify(model: str, variant: str, source: list[str] | None = None, context: list[str] | None = None) -> None:
    """Build twice without cache and compare; BuildError that names layers and files where the digests differ."""
    request = Request.of(model, variant, source, context)
    require_free(2 * NEEDED_BYTES)
    for name in debian.SETS:
        _compare_root_file_system(name)
    names = [f"{request.tag}-verify{number}" for number in (1, 2)]
    try:
        digests = [_build_anew(request, name) for name in names]
        if digests[0] != digests[1]:
            lines = [f"{model} {variant}: the two builds differ", *_differences(*names)]
            raise BuildError("\n".join(lines), exit_code=1)
        print(f"verify: {request.tag}: both builds are {digests[0]}")
    finally:
        engine.docker("image", "rm", "--force", *names, capture_output=True)


def _compare_root_file_system(name: str) -> None:
    """Make what stages start from anew; BuildError unless it is what lies in the store."""
    kept = debian.root_file_system(name)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        anew = Path(scratch) / kept.name
        debian.make_root_file_system(name, anew)
        digests = [sha256_of(kept), sha256_of(anew)]
    if digests[0] != digests[1]:
        raise BuildError(f"{kept}: made anew it is another file ({digests[1]}, not {digests[0]})", exit_code=1)
    print(f"verify: Debian's packages for {name}: sha256:{digests[0]}, made anew", flush=True)


def _build_anew(request: Request, name: str) -> str:
    started = time.monotonic()
    output = f"type=image,name={name},unpack=false,compression=uncompressed"
    build(request, name, output, "--no-cache", proof=True)
    digest, _ = inspect(name)
    print(f"verify: {name} {digest}, built in {time.monotonic() - started:.0f} s", flush=True)
    return digest


def _differences(one: str, two: str) -> Iterator[str]:
    """A line for each layer that differs, and lines for the files in it."""
    layers = [_layers(name) for name in (one, two)]
    for number, (first, second) in enumerate(zip(*layers, strict=False), 1):
        if first != second:
            changed = sorted(path for path in first.keys() | second.keys() if first.get(path) != second.get(path))
            yield f"layer {number}: {len(changed)} files differ"
            yield from (f"  {path}: {what_differs(first.get(path), second.get(path))}" for path in changed[:SHOWN])
    if layers[0] == layers[1]:
        yield "the layers are the same; the images' configurations differ"


def what_differs(one: tuple | None, two: tuple | None) -> str:
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    parts = ("mode", "owner", "time", "size", "link", "content")
    return ", ".join(part for part, a, b in zip(parts, one, two, strict=True) if a != b)


def _layers(name: str) -> list[dict[str, tuple]]:
    """For each layer of an image: path → what is compared."""
    process = subprocess.Popen([engine.client(), "save", name], env=engine.environment(), stdout=subprocess.PIPE)
    found: dict[str, dict[str, tuple]] = {}
    order: list[str] = []
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.name == "manifest.json":
                order = json.load(archive.extractfile(member))[0]["Layers"]
            elif member.isfile() and member.name.startswith("blobs/") and member.size > 512:
                found[member.name] = entries(archive.extractfile(member))
    return [found[layer] for layer in order]


def entries(stream) -> dict[str, tuple]:
    """path → (mode, owner, time, size, link, content's hash) of a layer; empty for a blob that is no tar."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as layer:
            return {
                entry.name: (
                    entry.mode,
                    (entry.uid, entry.gid),
                    entry.mtime,
                    entry.size,
                    entry.linkname,
                    hashlib.file_digest(layer.extractfile(entry), "sha256").digest() if entry.isfile() else b"",
                )
                for entry in layer
            }
    except tarfile.ReadError:
        return {}
