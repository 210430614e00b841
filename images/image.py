"""make image: everything is fetched and verified first, laid out for BuildKit, then built with the network off."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from images import debian, engine, lock, provenance
from images.machine import compile_jobs
from images.manifest import HERE, check_variant, families, read_manifest
from images.request import SOURCE_STAGES, Request, command_of, contexts_of, fetch_packages, places_of, wanted
from images.sources import trees
from images.staging import stage
from images.store import FREE_SPACE, BuildError, store
from images.target import Target, of_platform

NEEDED_BYTES = 22_000_000_000  # build cache, image and unpacked image: a cpu image from nothing took 21 GB
FULL_BYTES = 1_000_000_000  # a build that failed with less free space than this failed because the disk was full
STAGING = "staging-"


def image(model: str, variant: str, **given: Any) -> None:
    """Build slipway/MODEL:VARIANT; print its digest and size; leave SBOM and provenance in the store.

    Args: those of Request.of.
    """
    started = time.monotonic()
    request = Request.of(model, variant, **given)
    fetched = time.monotonic()
    name = request.tag
    # Uncompressed: this engine keeps the image on the disk where it was built. images/publish.py compresses.
    build(request, name, f"type=image,name={name},unpack=true,compression=uncompressed")
    digest, size = inspect(name)
    provenance.write(request, name, digest)
    if not engine.has_containerd_store():
        print("image: Docker's older image store has no manifest; the digest is the configuration's", file=sys.stderr)
    print(
        f"image: {name} {digest}, {size / 1e9:.2f} GB, fetched in {fetched - started:.0f} s, "
        f"built in {time.monotonic() - fetched:.0f} s"
    )


def images(variant: str, **given: Any) -> None:
    """Build every family's image."""
    for model in families():
        image(model, variant, **given)


def fetch(
    variant: list[str] | None = None,
    source: list[str] | None = None,
    context: list[str] | None = None,
    platform: str | None = None,
) -> None:
    """Fetch everything that images of these variants are made of into the store; the default is cpu and index."""
    contexts, places, target = contexts_of(context), places_of(source), of_platform(platform)
    for name in variant or ("cpu", "index"):
        check_variant(name)
        fetch_packages(name, target)
        for model in families():
            trees(wanted(read_manifest(model), name, places, contexts), name, places)


def build(request: Request, name: str, output: str, *options: str, proof: bool = False) -> None:
    """Run BuildKit on a new staging folder.

    Args:
        request: what to build.
        name: the image's name.
        output: the value of buildx's --output.
        options: words for `docker buildx bake`.
        proof: compile everything again, without ccache.

    Errors: BuildError 73 when the disk is full, 1 when the build fails.
    """
    require_free(NEEDED_BYTES)
    remove_abandoned()
    print(f"locks: {ages(request.target)}", file=sys.stderr)
    # In the store, because staging makes hard links to the store's files, and those need the same file system.
    with tempfile.TemporaryDirectory(dir=store(), prefix=f"{STAGING}{os.getpid()}-") as scratch:
        staging = Path(scratch)
        stage(staging, request)
        replacements = [f"--set=image.contexts.{name}={place}" for name, place in request.contexts.items()]
        words = ["bake", "--file", str(HERE / "docker-bake.hcl"), *options, *replacements, "image"]
        variables = _variables(staging, request)
        variables |= {"TAG": name, "OUTPUT": output, "PROOF": "1" if proof else ""}
        failed = engine.buildx(*words, variables=variables)
    if failed and (free := shutil.disk_usage(store()).free) < FULL_BYTES:
        raise BuildError(f"{store()}: the disk is full ({free / 1e9:.1f} GB free); {FREE_SPACE}", exit_code=73)
    if failed:
        raise BuildError(f"the build of {name} failed; see its last lines above", exit_code=1)


def ages(target: Target, today: datetime.date | None = None) -> str:
    """How old the two locks are: an old one lacks security updates, and `audit` says which."""
    today = today or datetime.datetime.now(datetime.UTC).date()
    days = {
        "Debian packages": debian.locked_on(target),
        "Python packages": datetime.date.fromisoformat(lock.pins()["exclude-newer"]),
    }
    return ", ".join(f"{what} of {day} ({(today - day).days} days old)" for what, day in days.items())


def require_free(needed: int) -> None:
    """BuildError unless the store's disk has so many bytes free."""
    free = shutil.disk_usage(store()).free
    if free < needed:
        raise BuildError(
            f"{store()}: not enough disk space: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free; "
            f"{FREE_SPACE}",
            exit_code=73,
        )


def remove_abandoned() -> None:
    """Remove the staging folders of builds that were killed: their names hold the id of a process that has ended."""
    for folder in store().glob(f"{STAGING}*"):
        if not Path("/proc", folder.name.removeprefix(STAGING).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _variables(staging: Path, request: Request) -> dict[str, str]:
    trees_of = {
        name.replace("-", "_").upper(): str(request.folders.get(name, staging / "empty")) for name in SOURCE_STAGES
    }
    return trees_of | {
        "MODEL": request.manifest.family,
        "VARIANT": request.variant,
        "PLATFORM": request.target.platform,
        "STAGING": str(staging),
        "REVISION": provenance.revision(),
        "ORIGIN": provenance.origin(),
        "PINS": json.dumps(provenance.pins(request.wanted, request.target), sort_keys=True),
        "VERSION": lock.version(),
        "CUDA": provenance.cuda(),
        "DRIVER": provenance.oldest_driver(),
        "MAX_JOBS": str(compile_jobs()),
        "CUDA_ARCHITECTURES": " ".join(request.manifest.cuda_architectures),
    }


def inspect(name: str) -> tuple[str, int]:
    """(digest, bytes on disk) of an image; BuildError with the command that builds it if it does not exist."""
    done = engine.docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", name, capture_output=True, text=True)
    if done.returncode:
        cure = f"run `{command_of(name)}` to build it"
        raise BuildError(f"{name}: image not found ({done.stderr.strip()}); {cure}")
    digest, size = done.stdout.split()
    return digest, int(size)
