"""An image to build: its family, its variant, and what replaces the pinned sources.

A request is complete: everything that its build needs is fetched and verified. It is a module of its own because the
build, the staging folder and the provenance all read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from images import debian, engine, lock
from images.manifest import (
    HERE,
    READY,
    Manifest,
    Source,
    check_architectures,
    check_variant,
    near,
    read_manifest,
    sources,
)
from images.sources import trees
from images.store import BuildError
from images.target import X86_64, Target, of_platform

# Source → the stage that builds it; its tree is the context STAGE-source. In index, te-torch builds Transformer Engine.
SOURCE_STAGES = {"nemo": "nemo", "megatron-core": "megatron", "transformer-engine": "te", "apex": "apex"}


@dataclass(frozen=True)
class Request:
    """An image to build. `folders` holds source trees by source name, `contexts` build contexts by stage or tree."""

    manifest: Manifest
    variant: str
    wanted: list[Source]
    folders: dict[str, Path]
    contexts: dict[str, str]
    target: Target

    @classmethod
    def of(
        cls,
        model: str,
        variant: str,
        source: list[str] | None = None,
        context: list[str] | None = None,
        architecture: list[str] | None = None,
        platform: str | None = None,
    ) -> Request:
        """Check every word, check that an engine answers, and fetch what is missing.

        Args:
            model: a family with a manifest.
            variant: full, index or cpu.
            source: NAME=PLACE for each source that comes from another clone or mirror than the pinned one.
            context: NAME=PLACE for each stage or source tree that a named build context replaces.
            architecture: the GPUs to compile for, instead of those of the manifest.
            platform: the processor, as Docker names it; None: this machine's.

        Errors: BuildError, before anything is built.
        """
        check_variant(variant)
        manifest, target = read_manifest(model), of_platform(platform)
        if architecture:
            check_architectures(architecture, "--architecture")
            manifest = replace(manifest, cuda_architectures=architecture)
        contexts = contexts_of(context)
        places = places_of(source)
        parts = wanted(manifest, variant, places, contexts)
        folders = trees(parts, variant, places)
        engine.require()
        engine.require_platform(target, compiles_cuda=variant != "cpu" and "built-wheels" not in contexts)
        fetch_packages(variant, target)
        return cls(manifest, variant, parts, folders, contexts, target)

    @property
    def tag(self) -> str:
        return tag(self.manifest.family, self.variant, self.target)


def tag(model: str, variant: str, target: Target) -> str:
    """The image's name, as slipway/qwen3:cpu or slipway/qwen3:cpu-arm64."""
    return f"slipway/{model}:{variant}" + ("" if target == X86_64 else f"-{target.debian}")


def command_of(name: str) -> str:
    """The command that builds the image with this name."""
    model, kind = name.rpartition("/")[2].split(":")
    variant, _, processor = kind.partition("-")
    return f"make image MODEL={model} VARIANT={variant}" + (f" PLATFORM=linux/{processor}" if processor else "")


def wanted(manifest: Manifest, variant: str, places: dict[str, str], contexts: dict[str, str]) -> list[Source]:
    """The sources of a variant, each with where its tree comes from: git, an archive, or a build context."""
    found = [_replaced(source, contexts) for source in sources(manifest, variant)]
    return [replace(source, by_git=source.by_git or source.name in places) for source in found]


def fetch_packages(variant: str, target: Target) -> None:
    """Fetch the Python and Debian packages of a variant into the store."""
    groups = ("build", *READY[variant], *(["cuda"] if variant != "cpu" else []))
    words = [word for group in groups for word in ("--group", group)]
    lock.fetch_wheels(lock.requirements("--no-default-groups", *words, target=target), target)
    for name in debian.SETS:
        debian.root_file_system(name, target)


def places_of(given: list[str] | None) -> dict[str, str]:
    """Source name → place, from words NAME=PLACE."""
    return _pairs("--source", given, "where PLACE is a clone or an address")


def contexts_of(given: list[str] | None) -> dict[str, str]:
    """Stage or source tree → build context, from words NAME=PLACE; a folder becomes an absolute path."""
    contexts = _pairs("--context", given, "where PLACE is a folder, docker-image://NAME or oci-layout://FOLDER")
    for name, place in contexts.items():
        _check_context(name, place)
    return {name: place if "://" in place else str(Path(place).absolute()) for name, place in contexts.items()}


def _check_context(name: str, place: str) -> None:
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)", (HERE / "Dockerfile").read_text())
    known = [*(f"{stage}-source" for stage in SOURCE_STAGES.values()), *stages]
    if name not in known:
        raise BuildError(
            f"--context {name}: unknown stage or source tree{near(name, known)}; use one of {', '.join(known)}",
            exit_code=2,
        )
    if "://" not in place and not Path(place).is_dir():
        raise BuildError(f"--context {name}={place}: folder not found; check the path", exit_code=65)


def _pairs(flag: str, given: list[str] | None, what: str) -> dict[str, str]:
    pairs = dict(word.partition("=")[::2] for word in given or [])
    for name, place in pairs.items():
        if not name or not place:
            raise BuildError(f"{flag} {name}: write it as NAME=PLACE, {what}", exit_code=2)
    return pairs


def _replaced(source: Source, contexts: dict[str, str]) -> Source:
    """The source, with the name of the context that replaces it or what is built from it, if there is one."""
    stage = SOURCE_STAGES[source.name]
    names = (f"{stage}-source", stage, f"{stage}-torch", "built-wheels")
    given = [name for name in names if name in contexts]
    return replace(source, replaced=given[0]) if given else source
