"""build.py push, archive and wheels: an image with compressed layers to a registry or a file, and its built wheels.

`docker push` is not used: the engine keeps images uncompressed and would push them uncompressed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from images import engine, provenance, registry, sbom
from images.image import build
from images.repack import repack
from images.request import Request
from images.store import BuildError, sha256_of

PROVENANCE, BILL = "application/vnd.in-toto+json", "application/vnd.cyclonedx+json"
# zstd is smaller and unpacks faster, but enroot reads it only from version 4.0, and never mixed with gzip.
COMPRESSIONS = {"zstd": "compression=zstd,compression-level=3", "gzip": "compression=gzip"}


def archive(model: str, variant: str, out: str, compression: str | None = None, **given: Any) -> None:
    """Write an image as an OCI archive, for example for `podman load`, and OUT.provenance.json next to it.

    Args:
        model, variant, given: those of image.image.
        out: the file; it appears when it is complete.
        compression: of the layers, zstd or gzip; None: zstd where the engine can.
    """
    target = Path(out).absolute()
    if not target.parent.is_dir():
        raise BuildError(f"--out {out}: folder {target.parent} not found; create it first", exit_code=73)
    compression = _compression(compression)
    request = Request.of(model, variant, **given)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".archive-") as scratch:
        part = Path(scratch) / "image.tar"
        if engine.has_containerd_store():
            digest = _export(request, request.tag, f"type=oci,dest={part}", compression)
        else:
            digest = _save(request, part)
        statement = Path(scratch) / "provenance.json"
        provenance.write_statement(statement, request, request.tag, digest)
        os.replace(statement, f"{target}.provenance.json")
        os.replace(part, target)
    print(f"archive: {target} {digest}, {target.stat().st_size / 1e9:.2f} GB")


def push(model: str, variant: str, to: str, compression: str | None = None, **given: Any) -> None:
    """Push an image to a registry that docker is logged in to, and attach its provenance and SBOM to it there.

    The provenance, pushed.json, is also next to that of the image in the store.

    Args:
        model, variant, given: those of image.image.
        to: HOST/NAME:TAG.
        compression: of the layers, zstd or gzip; None: zstd where the engine can.
    """
    if "/" not in to or "://" in to:
        raise BuildError(f"--to {to}: expected HOST/NAME:TAG, the same form as for `docker push`", exit_code=2)
    started = time.monotonic()
    compression = _compression(compression)
    request = Request.of(model, variant, **given)
    try:
        if engine.has_containerd_store():
            digest = _export(request, to, "type=image,push=true,unpack=false", compression)
        else:
            digest = _push(request, to)
    finally:
        engine.docker("image", "rm", "--force", to, capture_output=True)
    pushed = provenance.folder_of(model, variant, request.target) / "pushed.json"
    provenance.write_statement(pushed, request, to, digest)
    bill = pushed.with_name("pushed.cdx.json")
    bill.write_text(sbom.text(request.manifest, request.variant, request.wanted, request.target))
    attached = registry.attach(to, digest, {pushed: PROVENANCE, bill: BILL})
    print(f"push: attached provenance and SBOM: {' '.join(attached)}")
    print(f"push: {to}@{digest} in {time.monotonic() - started:.0f} s")


def wheels(model: str, variant: str, out: str, no_cache: bool = False, **given: Any) -> None:
    """Write the wheels that an image's sources are built into; another site passes them as --context built-wheels=OUT.

    Args:
        model, variant, given: those of image.image.
        out: a folder that does not exist yet.
        no_cache: compile everything again.
    """
    target = Path(out).absolute()
    if target.exists():
        raise BuildError(f"--out {out}: already exists; name a new folder", exit_code=73)
    if not target.parent.is_dir():
        raise BuildError(f"--out {out}: folder {target.parent} not found; create it first", exit_code=73)
    request = Request.of(model, variant, **given)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheels-") as scratch:
        output = f"type=local,dest={scratch}/wheels"
        options = ["--set=image.target=built-wheels", *(["--no-cache"] if no_cache else [])]
        build(request, request.tag, output, *options, proof=no_cache)
        folder = Path(scratch) / "wheels"
        folder.chmod(0o755)
        (folder / ".gitignore").unlink(missing_ok=True)  # `uv build` writes one
        os.replace(folder, target)
    for wheel in sorted(target.iterdir()):
        print(f"wheels: {sha256_of(wheel)}  {wheel.name}")


def _compression(asked: str | None) -> str:
    """Of the layers; BuildError where there is no such one, or the engine in use cannot write it."""
    if asked not in (None, *COMPRESSIONS):
        raise BuildError(f"--compression {asked}: use {' or '.join(COMPRESSIONS)}", exit_code=2)
    if engine.has_containerd_store():
        return asked or "zstd"
    if asked == "zstd":
        raise BuildError(
            "--compression zstd: this engine has Docker's older image store, which has gzip alone; use gzip, or set "
            '"features": {"containerd-snapshotter": true} in its daemon.json (newer Docker has it on)',
            exit_code=2,
        )
    return "gzip"


def _export(request: Request, name: str, output: str, compression: str) -> str:
    """Build what is not in BuildKit's cache, export the image, and return its digest."""
    with tempfile.TemporaryDirectory() as scratch:
        metadata = Path(scratch) / "metadata.json"
        words = f"{output},name={name},{COMPRESSIONS[compression]},force-compression=true,oci-mediatypes=true"
        # The digest of the compressed image: it differs from that of the uncompressed one in the engine.
        build(request, name, words, "--metadata-file", str(metadata))
        return json.loads(metadata.read_text())["image"]["containerimage.digest"]


def _save(request: Request, part: Path) -> str:
    """Build the image, and write it as an OCI archive from what Docker's older store saves; returns its digest."""
    build(request, request.tag, f"type=image,name={request.tag}")
    saved = part.with_name("saved.tar")
    done = engine.docker("image", "save", "--output", str(saved), request.tag, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"docker save {request.tag}: {done.stderr.strip()}; free some disk and try again")
    try:
        return repack(saved, part, request.tag, part.parent)
    finally:
        saved.unlink()


def _push(request: Request, to: str) -> str:
    """Build the image, and push it as Docker's older store does, which compresses the layers; returns its digest."""
    build(request, to, f"type=image,name={to}")
    if engine.docker("image", "push", to).returncode:
        raise BuildError(f"docker push {to} failed, see above")
    shown = engine.docker("image", "inspect", "--format", "{{json .RepoDigests}}", to, capture_output=True, text=True)
    repository = to.rpartition(":")[0]
    digests = [one.partition("@")[2] for one in json.loads(shown.stdout) if one.partition("@")[0] == repository]
    if not digests:
        raise BuildError(f"docker push {to}: the engine does not say which digest it pushed; push again")
    return digests[0]
