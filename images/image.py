"""make image: everything fetched and verified first, laid out for BuildKit, then built with the network off."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from images import debian, engine, lock, provenance
from images.manifest import HERE, Manifest, Source, check_variant, families, near, read_manifest, sources
from images.sources import trees
from images.staging import READY, stage
from images.store import BuildError, store

NEEDED_BYTES = 16_000_000_000  # build cache, image and unpacked image
FULL_BYTES = 1_000_000_000  # with less a build fails for want of space
BYTES_PER_JOB = 4_000_000_000  # what one compiler of CUDA or torch code takes at most
# Source → the stage that builds it; its tree is the context STAGE-source. In index, te-torch builds Transformer Engine.
SOURCE_STAGES = {"nemo": "nemo", "megatron-core": "megatron", "transformer-engine": "te", "apex": "apex"}
STAGING = "staging-"


@dataclass(frozen=True)
class Request:
    """An image to build, with everything that it is made of fetched and verified."""

    manifest: Manifest
    variant: str
    wanted: list[Source]
    folders: dict[str, Path]
    contexts: dict[str, str]

    @classmethod
    def of(cls, model: str, variant: str, source: list[str] | None = None, context: list[str] | None = None) -> Request:
        """Check all of it, fetch what is missing, find an engine; BuildError before anything is built.

        Args:
            model: a family with a manifest.
            variant: full, index or cpu.
            source: NAME=PLACE for each source that comes from another clone or mirror than its pin says.
            context: NAME=PLACE for each stage or source tree that is replaced by a named build context.
        """
        check_variant(variant)
        manifest = read_manifest(model)
        contexts = contexts_of(context)
        wanted = [_replaced(source, contexts) for source in sources(manifest, variant)]
        folders = trees([source for source in wanted if not source.replaced], variant, places_of(source))
        engine.require()
        fetch_for(variant)
        return cls(manifest, variant, wanted, folders, contexts)

    @property
    def tag(self) -> str:
        return tag(self.manifest.family, self.variant)


def image(model: str, variant: str, source: list[str] | None = None, context: list[str] | None = None) -> None:
    """Build slipway/MODEL:VARIANT; print its digest and size; leave SBOM and provenance in the store.

    Args: as of Request.of.
    """
    started = time.monotonic()
    request = Request.of(model, variant, source, context)
    fetched = time.monotonic()
    name = request.tag
    # Uncompressed, since this engine keeps the image where it was built; images/publish.py compresses.
    build(request, name, f"type=image,name={name},unpack=true,compression=uncompressed")
    digest, size = inspect(name)
    provenance.write(request, name, digest)
    print(
        f"image: {name} {digest}, {size / 1e9:.2f} GB, fetched in {fetched - started:.0f} s, "
        f"built in {time.monotonic() - fetched:.0f} s"
    )


def images(variant: str, source: list[str] | None = None, context: list[str] | None = None) -> None:
    """Build every family's image."""
    for model in families():
        image(model, variant, source, context)


def tag(model: str, variant: str) -> str:
    """The image's name."""
    return f"slipway/{model}:{variant}"


def places_of(given: list[str] | None) -> dict[str, str]:
    """Source name → place, of words NAME=PLACE."""
    return _pairs("--source", given, "PLACE being a clone or an address")


def contexts_of(given: list[str] | None) -> dict[str, str]:
    """Stage or source tree → build context, of words NAME=PLACE; a folder is named by its absolute path."""
    contexts = _pairs("--context", given, "PLACE being a folder, docker-image://NAME or oci-layout://FOLDER")
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)", (HERE / "Dockerfile").read_text())
    trees_of = [f"{stage}-source" for stage in SOURCE_STAGES.values()]
    for name, place in contexts.items():
        if name not in (*stages, *trees_of):
            known = ", ".join((*trees_of, *stages))
            raise BuildError(
                f"--context {name}: there is no such stage or source tree{near(name, known.split(', '))}; "
                f"there are {known}",
                exit_code=2,
            )
        if "://" not in place and not Path(place).is_dir():
            raise BuildError(f"--context {name}={place}: there is no such folder", exit_code=65)
    return {name: place if "://" in place else str(Path(place).absolute()) for name, place in contexts.items()}


def _pairs(flag: str, given: list[str] | None, what: str) -> dict[str, str]:
    pairs = dict(word.partition("=")[::2] for word in given or [])
    for name, place in pairs.items():
        if not name or not place:
            raise BuildError(f"{flag} {name}: write it as NAME=PLACE, {what}", exit_code=2)
    return pairs


def _replaced(source: Source, contexts: dict[str, str]) -> Source:
    """The source, with the name of the context that stands for it or for what is built from it."""
    stage = SOURCE_STAGES[source.name]
    names = (f"{stage}-source", stage, f"{stage}-torch", "built-wheels")
    stands = [name for name in names if name in contexts]
    return replace(source, replaced=stands[0]) if stands else source


def fetch(variant: list[str] | None = None, source: list[str] | None = None) -> None:
    """Bring everything that images of these variants (cpu and index if none is named) are made of into the store."""
    for name in variant or ("cpu", "index"):
        check_variant(name)
        fetch_for(name)
        for model in families():
            trees(sources(read_manifest(model), name), name, places_of(source))


def fetch_for(variant: str) -> None:
    """Bring the packages of one variant into the store."""
    groups = ("build", *READY[variant], *(["cuda"] if variant != "cpu" else []))
    words = [word for group in groups for word in ("--group", group)]
    lock.fetch_wheels(lock.requirements("--no-default-groups", *words))
    for name in debian.SETS:
        debian.root_file_system(name)


def build(request: Request, name: str, output: str, *options: str, proof: bool = False) -> None:
    """Run BuildKit on a fresh staging folder.

    Args:
        request: what to build.
        name: the image's name.
        output: buildx's.
        options: for `docker buildx bake`.
        proof: let no compiler's cache help.
    """
    require_free(NEEDED_BYTES)
    remove_abandoned()
    with tempfile.TemporaryDirectory(dir=store(), prefix=f"{STAGING}{os.getpid()}-") as scratch:
        staging = Path(scratch)
        stage(staging, request)
        replacements = [f"--set=image.contexts.{name}={place}" for name, place in request.contexts.items()]
        words = ["bake", "--file", str(HERE / "docker-bake.hcl"), *options, *replacements, "image"]
        variables = _variables(staging, request)
        variables |= {"TAG": name, "OUTPUT": output, "PROOF": "1" if proof else ""}
        failed = engine.buildx(*words, variables=variables)
    if failed and (free := shutil.disk_usage(store()).free) < FULL_BYTES:
        raise BuildError(f"{store()}: {free / 1e9:.1f} GB are free; free some space or set SLIPWAY_STORE", exit_code=73)
    if failed:
        raise BuildError(f"the build of {name} failed; its last lines stand above", exit_code=1)


def require_free(needed: int) -> None:
    """BuildError unless the store's disk has so many bytes to spare."""
    free = shutil.disk_usage(store()).free
    if free < needed:
        what = f"{needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
        raise BuildError(f"{store()}: {what}; free some space or set SLIPWAY_STORE", exit_code=73)


def remove_abandoned() -> None:
    """Remove the staging folders of builds that were killed."""
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
        "STAGING": str(staging),
        "PINS": json.dumps(provenance.pins(request.wanted), sort_keys=True),
        "VERSION": lock.version(),
        "BUILDER": provenance.builder(),
        "MAX_JOBS": str(compile_jobs()),
        "CUDA_ARCHITECTURES": " ".join(request.manifest.cuda_architectures),
    }


def compile_jobs() -> int:
    """As many compilers at once as there are cores and as memory holds."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


def inspect(name: str) -> tuple[str, int]:
    """(digest, bytes on disk) of an image."""
    done = engine.docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", name, capture_output=True, text=True)
    if done.returncode:
        model, variant = name.rpartition("/")[2].split(":")
        cure = f"`make image MODEL={model} VARIANT={variant}` builds it"
        raise BuildError(f"{name} is not there ({done.stderr.strip()}); {cure}")
    digest, size = done.stdout.split()
    return digest, int(size)
