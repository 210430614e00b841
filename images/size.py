"""build.py size: how large each layer of an image is, and what it holds."""

from __future__ import annotations

import json

from images import engine
from images.image import inspect
from images.manifest import check_variant, read_manifest
from images.request import tag
from images.store import BuildError
from images.target import of_platform

# The layers of images/Dockerfile, from the first: a word in the step that makes the layer, and what the layer holds.
HOLDS = (
    ("base.tar", "Debian packages: Python, tini, the C compiler that Triton calls, InfiniBand, apt"),
    ("runtime.txt", "locked Python packages, torch and CUDA's libraries"),
    ("/built", "packages built from source: NeMo, Megatron-core; in full and index also Transformer Engine"),
    ("/mnt/entrypoints", "Slipway's commands, uv"),
    ("WORKDIR", "the working folder of commands"),
    ("/mnt/family", "the family's manifest, pins and SBOM"),
)
LARGEST = 12


def size(model: str, variant: str, platform: str | None = None) -> None:
    """Print two tables: the layers with their sizes and contents, and the largest Python packages."""
    check_variant(variant)
    read_manifest(model)
    engine.require()
    name = tag(model, variant, of_platform(platform))
    digest, on_disk = inspect(name)
    print(f"{name} {digest}\n")
    rows = [(str(number), f"{count:,}", text) for number, (count, text) in enumerate(layers(name), 1)]
    _print(("layer", "bytes", "what it holds"), [*rows, ("all", f"{on_disk:,}", "")])
    print()
    _print(("", "bytes", "package"), [("", f"{count:,}", package) for count, package in packages(name)])


def layers(name: str) -> list[tuple[int, str]]:
    """(bytes, what it holds) of each layer that is not empty, beginning with the first."""
    words = ["history", "--no-trunc", "--human=false", "--format", "{{json .}}", name]
    done = engine.docker(*words, capture_output=True, text=True, check=True)
    steps = [json.loads(line) for line in reversed(done.stdout.splitlines())]
    return [(int(step["Size"]), _holds(step["CreatedBy"])) for step in steps if int(step["Size"])]


def _holds(step: str) -> str:
    return next((text for word, text in HOLDS if word in step), step[:80])


def packages(name: str) -> list[tuple[int, str]]:
    """(bytes, folder) of the largest folders of site-packages."""
    command = "du --bytes --max-depth=1 /opt/venv/lib/python3.11/site-packages | sort -nr"
    done = engine.docker("run", "--rm", "--network=none", name, "sh", "-c", command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{name}: cannot run the image: {done.stderr.strip().splitlines()[-1]}", exit_code=1)
    rows = [line.split("\t") for line in done.stdout.splitlines()[1 : LARGEST + 1]]
    return [(int(count), path.rpartition("/")[2]) for count, path in rows]


def _print(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in (0, 1)]
    for first, second, text in [head, *rows]:
        print(f"{first:<{widths[0]}}  {second:>{widths[1]}}  {text}".rstrip())
