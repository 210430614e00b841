"""The recipes that ship: one TOML file per model in recipes/, a table per mode and one per kind of GPU."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import UsageError
from slipway.families import FAMILIES
from slipway.options import NAMES, Parameter, check, flag, from_text, option, parameters_of, suggestion
from slipway.training.recipe import MODES, Recipe
from slipway.untrusted import read_toml

FOLDER = Path(__file__).parents[1] / "recipes"
GPUS = (80, 141)  # GB of memory
ABOUT = {"family": str, "base": str, "parameters": float, "shape": dict}  # what a file says beside its modes
OF_A_RUN = ("model", "data", "out", "mode")  # not for a file to say


@dataclass(frozen=True)
class Layout:
    """What a table for a kind of GPU says beside the keys of a Recipe."""

    nodes: int = option(1, "machines", low=1)
    processes_per_node: int = option(1, "GPUs of each machine", low=1)
    memory_gb: int = option(1, "memory of a GPU, as --dry-run estimates it", unit="GB", low=1)


@dataclass(frozen=True)
class Choice:
    """Which recipe, and what of it is changed."""

    recipe: str | None = option(
        None, "a shipped recipe, by name, or a .toml file like it; flags and --set override its values"
    )
    set: list[str] | None = option(
        None, "KEY=VALUE for any key of a recipe; can be given more than once; overrides the recipe"
    )
    epochs: float | None = option(
        None, "how often the data are read, instead of --steps", above=0, high=1_000_000, otherwise="what --steps says"
    )
    config: str | None = option(
        None, "config.json of the model, for a checkpoint of NeMo's own that does not say which model it is"
    )
    gpu_memory: int | None = option(
        None,
        "memory of a GPU, to choose the recipe's layout",
        unit="GB",
        low=1,
        high=100_000,
        otherwise="what nvidia-smi says, else 80",
    )


@dataclass(frozen=True)
class Shipped:
    """A recipe file's words for one mode on one kind of GPU."""

    name: str
    family: str  # "" where the file names none: it is for any
    values: dict[str, Any]  # fields of Recipe
    nodes: int
    processes_per_node: int
    memory_gb: int


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def unknown(name: str) -> UsageError:
    """What is said of a recipe that is not there."""
    return UsageError(f"there is no recipe {name}{suggestion(name, names())}; there are {', '.join(names())}")


def family_of(name: str) -> str:
    """The family that a shipped recipe is for."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))["family"]


def parameters_of_model(name: str) -> float:
    """The number of weights of the model that a shipped recipe is for."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))["parameters"]


def has_shape(name: str) -> bool:
    """Whether a shipped recipe says the shape of its model; one that does not is for any of its family."""
    return "shape" in tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))


def config_of(name: str) -> dict[str, Any]:
    """config.json of the model that a shipped recipe is for, as far as it decides sizes and speed."""
    tables = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    config = {**FAMILIES[tables["family"]].tiny_config(), **tables["shape"]}
    if kinds := config.get("layer_types"):
        config["layer_types"] = [kinds[layer % len(kinds)] for layer in range(config["num_hidden_layers"])]
    return config


def load(name: str, mode: str, gpu: int) -> Shipped:
    """The recipe of this name, or in this file; UsageError or DataError for what it cannot be.

    Args:
        gpu: its memory in GB; the tables for the largest GPU that is not larger count.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        raise unknown(name)
    tables = read_toml(file, "correct it, or choose another --recipe")
    _check_tables(file, tables)
    if mode not in tables:
        raise UsageError(f"{file} has no table [{mode}]; add one, or choose another --mode or --recipe")
    fitting = [size for size in GPUS if size <= gpu and f"{size}GB" in tables[mode]]
    if not fitting:
        raise UsageError(f"{file} has no layout for GPUs of {gpu} GB; see --gpu-memory, or give the parallel sizes")
    layout = tables[mode][f"{max(fitting)}GB"]
    values = {key: value for key, value in tables[mode].items() if not isinstance(value, dict)} | layout
    check_values(values, f"{file}: [{mode}]")
    others = {key: values.pop(key, parameter.default) for key, parameter in parameters_of(Layout).items()}
    return Shipped(file.stem, tables.get("family", ""), values, **others)


def _check_tables(file: Path, tables: Mapping[str, Any]) -> None:
    """UsageError for a key beside the tables of modes, or a table in them, that nobody reads."""
    known = (*ABOUT, *MODES)
    for key, value in tables.items():
        if key not in known:
            raise UsageError(f"{file}: unknown key {key}{suggestion(key, known)}; it takes {', '.join(known)}")
        kind = ABOUT.get(key, dict)
        if not isinstance(value, kind):
            raise UsageError(f"{file}: {key} must be {NAMES.get(kind, 'a table')}")
    if (family := tables.get("family")) is not None and family not in FAMILIES:
        near = suggestion(family, FAMILIES)
        raise UsageError(f"{file}: family is {family!r}{near}; it must be one of {', '.join(FAMILIES)}")
    layouts = [f"{size}GB" for size in GPUS]
    for mode in MODES:
        for key, value in tables.get(mode, {}).items():
            if isinstance(value, dict) and key not in layouts:
                near = suggestion(key.upper(), layouts)
                raise UsageError(f"{file}: [{mode}] has an unknown table {key}{near}; it takes {', '.join(layouts)}")


def check_values(values: Mapping[str, Any], where: str) -> None:
    """UsageError unless every key is a recipe's and every value of its type and in its range."""
    known = {**keys(), **parameters_of(Layout)}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key}{suggestion(key, known)}; it takes {', '.join(sorted(known))}")
        check(f"{where}: {key}", known[key], value)


def keys() -> dict[str, Parameter]:
    """Every key of a recipe that a file or --set may give."""
    return {name: parameter for name, parameter in parameters_of(Recipe).items() if name not in OF_A_RUN}


def parse_settings(settings: Iterable[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """KEY=VALUE, each checked as its flag is.

    Args:
        flags: names of the flags that are given. A key is no second way to say the same.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in keys():
            raise UsageError(f"--set {setting} is not KEY=VALUE of a recipe{suggestion(key, keys())}")
        if key in found:
            raise UsageError(f"--set {key} is given twice; leave out one")
        if key in flags:
            raise UsageError(f"{flag(key)} and --set {key} are both given; leave out one")
        found[key] = from_text(f"--set {key}", keys()[key], text)
    return found


def gpu_memory() -> int:
    """GB of the smallest GPU here as nvidia-smi says it; without any, of the smallest that recipes know."""
    try:
        return min(int(int(size) * 2**20 / 1e9) for size in asked_of_gpus("memory.total"))
    except ValueError:
        return GPUS[0]


def asked_of_gpus(question: str) -> list[str]:
    """What nvidia-smi says of each GPU here; [] where it says nothing.

    Args:
        question: a field of its --query-gpu, such as memory.total, which is in MiB.
    """
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    words = [program, f"--query-gpu={question}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
