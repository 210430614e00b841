"""The families' manifests, images/FAMILY.toml, and what a family is built from."""

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
SUBMODULE_KEYS = ("commit", "repository")
# The sources that a variant builds.
SOURCES = {
    "cpu": ("nemo", "megatron-core"),
    "index": ("nemo", "megatron-core", "transformer-engine"),
    "full": ("nemo", "megatron-core", "transformer-engine", "apex"),
}


@dataclass(frozen=True)
class Source:
    """One source of an image: its commit and, where the package index has it, its source archive.

    `replaced` names the build context that is taken instead, of which nothing is known.
    """

    name: str
    distribution: str
    version: str
    commit: str
    repository: str
    license: str
    archive: LockedFile | None = None
    submodules: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: str = ""


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
        raise BuildError(
            f"VARIANT is {variant!r}{near(variant, VARIANTS)}; there is {', '.join(VARIANTS)}", exit_code=2
        )


def read_manifest(model: str) -> Manifest:
    """images/MODEL.toml; BuildError for an unknown model or anything in it that is not as it must be."""
    if model not in families():
        hint = near(model, families())
        raise BuildError(f"there is no model {model!r}{hint} (there are: {', '.join(families())})", exit_code=2)
    path = HERE / f"{model}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise _wrong(path, str(error)) from None
    _check_keys(path, "a manifest", table, TYPES, needed=set(TYPES) - {"pins"})
    for key, value in table.items():
        if not isinstance(value, TYPES[key]):
            raise _wrong(path, f"{key} is no {TYPES[key].__name__}")
    _check_values(path, table)
    return Manifest(**table)


def _check_values(path: Path, table: dict[str, Any]) -> None:
    if table["family"] != path.stem:
        raise _wrong(path, f"family is {table['family']!r}; it must be the file's name, {path.stem!r}")
    for architecture in table["cuda_architectures"]:
        if not re.fullmatch(r"\d+\.\d", str(architecture)):
            raise _wrong(path, f'cuda_architectures has {architecture!r}; write them as in "9.0"')
    known = tomllib.loads(PINS.read_text())
    for name, pin in table.get("pins", {}).items():
        _check_keys(path, "pins", {name: pin}, known, needed=set())
        _check_keys(path, f"pins.{name}", pin, PIN_KEYS, needed={"version", "commit"})
        if ("archive" in pin) != ("sha256" in pin):
            raise _wrong(path, f"pins.{name} needs archive and sha256 together, or neither")
        for part, submodule in pin.get("submodules", {}).items():
            where = f"pins.{name}.submodules.{part}"
            _check_keys(path, where, submodule, SUBMODULE_KEYS, needed=set(SUBMODULE_KEYS))


def _check_keys(path: Path, what: str, table: dict, known: Iterable[str], needed: set[str]) -> None:
    for key in table:
        if key not in known:
            hint = near(key, known)
            raise _wrong(path, f"{key} is no key of {what}{hint}; the keys are {', '.join(known)}")
    if missing := sorted(needed - table.keys()):
        raise _wrong(path, f"{missing[0]} is missing in {what}")


def _wrong(path: Path, what: str) -> BuildError:
    return BuildError(f"{path.name}: {what}", exit_code=65)


def near(word: str, known: Iterable[str]) -> str:
    """ ", did you mean …?" where a known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def sources(manifest: Manifest, variant: str) -> list[Source]:
    """What this variant of the family is built from: pins.toml's pins under the family's own."""
    general = tomllib.loads(PINS.read_text())
    return [_source(name, general[name], manifest.pins.get(name)) for name in SOURCES[variant]]


def _source(name: str, general: dict[str, Any], own: dict[str, Any] | None) -> Source:
    pin = {**general, **(own or {})}
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
    )


def own_archive(pin: dict[str, Any]) -> LockedFile | None:
    """The source archive that a family's pin names."""
    if "archive" not in pin:
        return None
    return LockedFile(pin.get("archive_of", pin["distribution"]), pin["archive"], pin["sha256"])


def locked_archive(distribution: str) -> LockedFile | None:
    """The source archive that uv.lock has of a distribution."""
    for package in lock.locked_packages():
        if package["name"] == distribution and "sdist" in package:
            entry = package["sdist"]
            return LockedFile(distribution, entry["path"], entry["hash"].removeprefix("sha256:"))
    return None
