"""make verify: build an image twice without a cache and compare the digests; name the layers and files that differ."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from images import debian, engine
from images.image import NEEDED_BYTES, build, inspect, require_free
from images.licences import content
from images.request import Request
from images.store import BuildError, sha256_of
from images.target import Target

SHOWN = 20  # differing files that are named per layer


def verify(model: str, variant: str, **given: Any) -> None:
    """Build twice without cache and compare; BuildError that names layers and files if the digests differ."""
    request = Request.of(model, variant, **given)
    require_free(2 * NEEDED_BYTES)
    for name in debian.SETS:
        _compare_root_file_system(name, request.target)
    names = [f"{request.tag}-verify{number}" for number in (1, 2)]
    try:
        digests = [_build_without_cache(request, name) for name in names]
        if digests[0] != digests[1]:
            lines = [f"{model} {variant}: the two builds differ", *_differences(*names)]
            raise BuildError("\n".join(lines), exit_code=1)
        print(f"verify: {request.tag}: both builds are {digests[0]}")
    finally:
        engine.docker("image", "rm", "--force", *names, capture_output=True)


def _compare_root_file_system(name: str, target: Target) -> None:
    """Make a root file system again; BuildError unless it is the file in the store, to the byte."""
    kept = debian.root_file_system(name, target)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        again = Path(scratch) / kept.name
        debian.make_root_file_system(name, again, target)
        digests = [sha256_of(kept), sha256_of(again)]
    if digests[0] != digests[1]:
        raise BuildError(f"{kept}: a second build has another SHA-256, {digests[1]}, not {digests[0]}", exit_code=1)
    print(f"verify: Debian packages of {name}: both builds are sha256:{digests[0]}", flush=True)


def _build_without_cache(request: Request, name: str) -> str:
    started = time.monotonic()
    # Not unpacked: only the digest is compared, and unpacking takes as much disk again.
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
        yield "the layers are the same, the images' configurations differ"


def what_differs(one: tuple | None, two: tuple | None) -> str:
    """The properties in which two entries of a layer differ; None stands for a missing entry."""
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    parts = ("mode", "owner", "time", "size", "link", "content")
    return ", ".join(part for part, a, b in zip(parts, one, two, strict=True) if a != b)


def _layers(name: str) -> list[dict[str, tuple]]:
    """For each layer of an image: path → the properties of `entries`."""
    process = subprocess.Popen([engine.client(), "save", name], env=engine.environment(), stdout=subprocess.PIPE)
    found: dict[str, dict[str, tuple]] = {}
    order: list[str] = []
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            if member.name == "manifest.json":
                order = json.loads(content(archive, member))[0]["Layers"]
            elif member.isfile() and member.name.startswith("blobs/") and member.size > 512:
                found[member.name] = entries(archive.extractfile(member))
    return [found[layer] for layer in order]


def entries(stream) -> dict[str, tuple]:
    """path → (mode, owner, time, size, link, hash of the content) of a layer; empty for a blob that is not a tar."""
    try:
        with tarfile.open(fileobj=stream, mode="r|") as layer:
            return {
                entry.name: (
                    entry.mode,
                    (entry.uid, entry.gid),
                    entry.mtime,
                    entry.size,
                    entry.linkname,
                    _digest(layer, entry),
                )
                for entry in layer
            }
    except tarfile.ReadError:
        return {}


def _digest(layer: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """The hash of a file's content; empty for a hard link, because a stream cannot go back to the file it names."""
    file = layer.extractfile(entry) if entry.isfile() else None
    return hashlib.file_digest(file, "sha256").digest() if file else b""  # type: ignore[arg-type] # it has readinto
