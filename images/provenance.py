"""What an image was built from and with: pins and builder, as labels of the image and as a SLSA statement."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from images import debian, engine, lock, sbom
from images.manifest import Source
from images.request import Request, tag
from images.store import sha256_of, store
from images.target import Target

# SLSA wants URIs. These name what docs/images.md describes; they are no addresses.
BUILD_TYPE = "urn:slipway:build:image:1"
BUILDER = "urn:slipway:build.py"


def folder_of(model: str, variant: str, target: Target) -> Path:
    """The folder in the store for the files about an image: provenance.json, sbom.cdx.json."""
    return store() / "images" / tag(model, variant, target).partition("/")[2].replace(":", "-")


def pins(wanted: list[Source], target: Target) -> dict[str, str]:
    """What identifies the inputs: version and commit, or archive, of each source, and the hashes of both locks."""
    versions = {source.name: _origin(source) for source in wanted}
    return {**versions, **{path.name: sha256_of(path) for path in (lock.LOCK, debian.lock_of(target))}}


def _origin(source: Source) -> str:
    if source.replaced:
        return f"context {source.replaced}"
    if source.by_git or source.archive is None:
        return f"{source.version} {source.commit}"
    return f"{source.version} {source.archive.name} sha256:{source.archive.sha256}"


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
    folder = folder_of(request.manifest.family, request.variant, request.target)
    _write(folder / "sbom.cdx.json", sbom.text(request.manifest, request.variant, request.wanted, request.target))
    write_statement(folder / "provenance.json", request, name, digest)


def write_statement(path: Path, request: Request, name: str, digest: str) -> None:
    """Write an image's provenance to `path`."""
    _write(path, json.dumps(statement(request, name, digest), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")  # two builds at once may write the same file
    part.write_text(text)
    os.replace(part, path)


def statement(request: Request, name: str, digest: str) -> dict:
    """An in-toto statement with SLSA's provenance, version 1."""
    algorithm, _, value = digest.partition(":")
    asked: dict[str, str | list[str]] = {
        "model": request.manifest.family,
        "variant": request.variant,
        "platform": request.target.platform,
    }
    if request.contexts:
        asked["contexts"] = sorted(request.contexts)
    architectures = request.manifest.cuda_architectures
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {algorithm: value}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": asked,
                "internalParameters": {
                    "pins": pins(request.wanted, request.target),
                    "cuda_architectures": architectures,
                },
                "resolvedDependencies": [*_sources(request.wanted), *_locks(request.target)],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"build.py": revision(), **tools()}}},
        },
    }


def _sources(wanted: list[Source]) -> list[dict[str, Any]]:
    """A resource for each source and for each submodule that was read; a context has only its name."""
    found: list[dict[str, Any]] = []
    for source in wanted:
        if source.replaced:
            found.append({"name": source.name, "uri": f"urn:slipway:context:{source.replaced}"})
        elif source.by_git or source.archive is None:
            found.append(_commit(source.name, source.repository, source.commit))
            found += [_commit(n, sub["repository"], sub["commit"]) for n, sub in source.read_submodules().items()]
        else:
            archive = source.archive
            uri = f"pkg:pypi/{archive.project}@{source.version}?file_name={archive.name}"
            found.append({"name": source.name, "uri": uri, "digest": {"sha256": archive.sha256}})
    return found


def _commit(name: str, repository: str, commit: str) -> dict[str, Any]:
    return {"name": name, "uri": f"git+{repository}@{commit}", "digest": {"gitCommit": commit}}


def _locks(target: Target) -> list[dict[str, Any]]:
    """The locks name every Python and Debian package with its hash."""
    files = [lock.LOCK, debian.lock_of(target)]
    names = [str(path.relative_to(lock.ROOT)) for path in files]
    return [
        {"name": name, "uri": f"file:{name}", "digest": {"sha256": sha256_of(path)}}
        for name, path in zip(names, files, strict=True)
    ]


def origin() -> str:
    """Where this checkout was cloned from, if that is an address of the web; "" for any other place, or none."""
    words = ["git", "remote", "get-url", "origin"]
    found = urlsplit(subprocess.run(words, cwd=lock.ROOT, capture_output=True, text=True).stdout.strip())
    if found.scheme not in ("http", "https") or not found.hostname:
        return ""
    # Without a name and a password, which an image would show to everybody.
    return urlunsplit((found.scheme, found.netloc.rpartition("@")[2], found.path, "", ""))


def revision() -> str:
    """The commit of this checkout, with "-dirty" if files differ from it."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(words, cwd=lock.ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "no git checkout"
