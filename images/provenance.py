"""What an image was built from and with: pins and builder, as labels of the image and as a SLSA statement."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tomllib
from pathlib import Path

from images import debian, engine, lock, sbom
from images.manifest import Source
from images.request import Request
from images.store import sha256_of, store


def folder_of(model: str, variant: str) -> Path:
    """The folder in the store for the files about an image: provenance.json, sbom.cdx.json."""
    return store() / "images" / f"{model}-{variant}"


def pins(wanted: list[Source]) -> dict[str, str]:
    """What identifies the inputs: version and commit of each source, and the hashes of both locks."""
    versions = {
        source.name: f"context {source.replaced}" if source.replaced else f"{source.version} {source.commit}"
        for source in wanted
    }
    return {**versions, "uv.lock": sha256_of(lock.LOCK), "debian.lock": sha256_of(debian.LOCK)}


def cuda() -> str:
    """The CUDA version that torch is built with, as "13.0"; also the cpu variant has that torch."""
    (version,) = (p["version"] for p in lock.locked_packages() if p["name"] == "cuda-toolkit")
    return ".".join(version.split(".")[:2])


def oldest_driver() -> str:
    """The oldest branch of NVIDIA's driver that runs the image, as "580"; `doctor` reads the same table."""
    table = tomllib.loads((lock.ROOT / "entrypoints" / "slipway" / "launch" / "drivers.toml").read_text())
    return str(table[cuda().partition(".")[0]])


@functools.cache
def tools() -> dict[str, str]:
    """The versions of what builds, without which an image has the same digest: they are in no label."""
    words = engine.docker("version", "--format", "{{.Server.Version}}", capture_output=True, text=True).stdout.split()
    buildx = engine.docker("buildx", "version", capture_output=True, text=True).stdout.split()
    return {"docker": words[0], "buildx": buildx[1]}


def write(request: Request, name: str, digest: str) -> None:
    """Write provenance.json and the SBOM of a built image into the store."""
    folder = folder_of(request.manifest.family, request.variant)
    _write(folder / "sbom.cdx.json", sbom.text(request.manifest, request.variant, request.wanted))
    write_statement(folder / "provenance.json", request, name, digest)


def write_statement(path: Path, request: Request, name: str, digest: str) -> None:
    """Write an image's provenance to `path`."""
    _write(path, json.dumps(statement(request, name, digest), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    os.replace(part, path)


def statement(request: Request, name: str, digest: str) -> dict:
    """An in-toto statement with SLSA's provenance, version 1."""
    algorithm, _, value = digest.partition(":")
    asked: dict[str, str | list[str]] = {"model": request.manifest.family, "variant": request.variant}
    if request.contexts:
        asked["contexts"] = sorted(request.contexts)
    architectures = request.manifest.cuda_architectures
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {algorithm: value}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "build.py image",
                "externalParameters": asked,
                "internalParameters": {"pins": pins(request.wanted), "cuda_architectures": architectures},
                "resolvedDependencies": [_dependency(source) for source in request.wanted if not source.replaced],
            },
            "runDetails": {"builder": {"id": "slipway", "version": {"build.py": _revision(), **tools()}}},
        },
    }


def _dependency(source: Source) -> dict:
    digest = {"gitCommit": source.commit}
    if source.archive:
        digest["sha256"] = source.archive.sha256
    return {"name": source.name, "uri": f"git+{source.repository}", "digest": digest}


def _revision() -> str:
    """The commit of this checkout, with "-dirty" if files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(words, cwd=lock.ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "no git checkout"
