"""The families' manifests, images/FAMILY.toml, and what each variant is built from."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from images import lock
from images.store import BuildError, LockedFile

HERE = Path(__file__).parent
PINS = lock.ROOT / "entrypoints" / "slipway" / "pins.toml"
VARIANTS = ("full", "index", "cpu")
TYPES = {"family": str, "models": list, "recipe": str, "cuda_architectures": list, "pins": dict}
PIN_KEYS = ("version", "commit", "repository", "archive", "sha256", "submodules")
# `paths`: the folders of a submodule that the build reads; all of it where there is no such key.
SUBMODULE_KEYS = ("commit", "repository", "license", "paths")
# The sources that a variant builds.
SOURCES = {
    "cpu": ("nemo", "megatron-core"),
    "index": ("nemo", "megatron-core", "transformer-engine"),
    "full": ("nemo", "megatron-core", "transformer-engine", "apex"),
}
# The dependency groups of pyproject.toml that a variant installs from wheels, less the packages that it compiles.
READY: dict[str, tuple[str, ...]] = {"cpu": (), "index": ("te",), "full": ("te",)}
COMPILED: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "index": ("transformer-engine-torch",),
    "full": ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"),
}


@dataclass(frozen=True)
class Source:
    """One source of an image: its commit and, if the package index has one, its source archive.

    `by_git`: the tree is the commit's; else it is the archive's. Labels, provenance and SBOM name the one that is used.
    `replaced` names the build context that replaces the source. Slipway does not know what such a context holds, so
    they name the context and not the pin.
    """

    name: str
    distribution: str
    version: str
    commit: str
    repository: str
    license: str
    archive: LockedFile | None = None
    submodules: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_git: bool = False
    replaced: str = ""

    def read_submodules(self) -> dict[str, dict[str, Any]]:
        """The submodules of which the build reads anything."""
        return {name: sub for name, sub in self.submodules.items() if sub.get("paths") != []}


@dataclass(frozen=True)
class Manifest:
    """A family's image. `pins` replaces the pins of some sources, by the source's name."""

    family: str
    models: list[str]
    recipe: str
    cuda_architectures: list[str]
    pins: dict[str, dict[str, Any]] = field(default_factory=dict)


def families() -> list[str]:
    """The families that have a manifest."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def check_variant(variant: str) -> None:
    """BuildError unless there is such a variant."""
    if variant not in VARIANTS:
        hint = near(variant, VARIANTS)
        raise BuildError(f"unknown VARIANT {variant!r}{hint}; use one of {', '.join(VARIANTS)}", exit_code=2)


def read_manifest(model: str) -> Manifest:
    """images/MODEL.toml; BuildError for an unknown model (2) or a mistake in the file (65)."""
    if model not in families():
        hint = near(model, families())
        raise BuildError(f"unknown model {model!r}{hint}; use one of {', '.join(families())}", exit_code=2)
    path = HERE / f"{model}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise _wrong(path, str(error)) from None
    _check_keys(path, "the manifest", table, TYPES, needed=set(TYPES) - {"pins"})
    for key, value in table.items():
        if not isinstance(value, TYPES[key]):
            expected = {str: "text in quotes", list: "a list", dict: "a table"}[TYPES[key]]
            raise _wrong(path, f"{key} is {value!r}, expected {expected}")
    _check_values(path, table)
    return Manifest(**table)


def _check_values(path: Path, table: dict[str, Any]) -> None:
    if table["family"] != path.stem:
        raise _wrong(path, f"family is {table['family']!r}, expected the name of the file, {path.stem!r}")
    check_architectures(table["cuda_architectures"], f"{path.name}: cuda_architectures")
    known = tomllib.loads(PINS.read_text())
    for name, pin in table.get("pins", {}).items():
        _check_keys(path, "pins", {name: pin}, known, needed=set())
        _check_keys(path, f"pins.{name}", pin, PIN_KEYS, needed={"version", "commit"})
        if ("archive" in pin) != ("sha256" in pin):
            raise _wrong(path, f"pins.{name} has only one of archive and sha256; add the other or delete both")
        for part, submodule in pin.get("submodules", {}).items():
            where = f"pins.{name}.submodules.{part}"
            _check_keys(path, where, submodule, SUBMODULE_KEYS, needed={"commit", "repository"})


def check_architectures(given: list, where: str) -> None:
    """BuildError unless each is a compute capability."""
    for architecture in given:
        if not re.fullmatch(r"\d+\.\d", str(architecture)):
            code = 2 if where.startswith("--") else 65
            raise BuildError(f'{where} has {architecture!r}; write it like "9.0"', exit_code=code)


def _check_keys(path: Path, what: str, table: dict, known: Iterable[str], needed: set[str]) -> None:
    for key in table:
        if key not in known:
            hint = near(key, known)
            raise _wrong(path, f"unknown key {key} in {what}{hint}; the known keys are {', '.join(known)}")
    if missing := sorted(needed - table.keys()):
        raise _wrong(path, f"the key {missing[0]} is missing in {what}; add it")


def _wrong(path: Path, what: str) -> BuildError:
    return BuildError(f"{path.name}: {what}", exit_code=65)


def near(word: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" if a known word is similar."""
    similar = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


def sources(manifest: Manifest, variant: str) -> list[Source]:
    """What this variant of the family is built from: the pins of pins.toml, replaced by the family's own."""
    general = tomllib.loads(PINS.read_text())
    by_git = variant == "full"
    return [_source(name, general[name], manifest.pins.get(name), by_git) for name in SOURCES[variant]]


def _source(name: str, general: dict[str, Any], own: dict[str, Any] | None, by_git: bool) -> Source:
    pin = {**general, **(own or {})}
    # uv.lock holds the archive of the general pin, so a pin of the family's own must name its archive itself.
    archive = own_archive(pin) if own else locked_archive(pin.get("archive_of", pin["distribution"]))
    return Source(
        name,
        pin["distribution"],
        pin["version"],
        pin["commit"],
        pin["repository"],
        pin["license"],
        archive,
        pin.get("submodules", {}),
        by_git,
    )


def own_archive(pin: dict[str, Any]) -> LockedFile | None:
    """The source archive that a family's pin names."""
    if "archive" not in pin:
        return None
    return LockedFile(pin.get("archive_of", pin["distribution"]), pin["archive"], pin["sha256"])


def locked_archive(distribution: str) -> LockedFile | None:
    """The source archive of a distribution in uv.lock."""
    for package in lock.locked_packages():
        if package["name"] == distribution and "sdist" in package:
            entry = package["sdist"]
            return LockedFile(distribution, entry["path"], entry["hash"].removeprefix("sha256:"))
    return None
