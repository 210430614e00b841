"""The recipes that ship: one TOML file per model in entrypoints/recipes, a table per mode and one per kind of GPU."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.errors import DataError, UsageError
from entrypoints.training.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
GPUS = (80, 141)  # GB of memory
NOT_COMPUTED = {"nodes": int, "processes_per_node": int, "memory_gb": int}
ABOUT = ("family", "base")
OF_A_RUN = ("model", "data", "out", "mode")  # not for a file to say
_BOOLEANS = {"true": True, "false": False}
MODES = ("heads", "lora", "sft", "pretrain")


@dataclass(frozen=True)
class Shipped:
    """A recipe file's words for one mode on one kind of GPU."""

    name: str
    family: str
    values: dict[str, Any]  # fields of Recipe
    nodes: int
    processes_per_node: int
    memory_gb: int


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str, mode: str, gpu: int) -> Shipped:
    """The recipe of this name, or in this file; UsageError or DataError for what it cannot be.

    Args:
        gpu: its memory in GB; the tables for the largest GPU that is not larger count.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        raise UsageError(f"there is no recipe {name}{_near(name, names())}; there are {', '.join(names())}")
    try:
        tables = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None
    if mode not in tables:
        raise UsageError(f"{file} has no table [{mode}]")
    fitting = [size for size in GPUS if size <= gpu and f"{size}GB" in tables[mode]]
    if not fitting:
        raise UsageError(f"{file} has no layout for GPUs of {gpu} GB; see --gpu-memory, or give the parallel sizes")
    layout = tables[mode][f"{max(fitting)}GB"]
    values = {key: value for key, value in tables[mode].items() if not isinstance(value, dict)} | layout
    check(values, f"{file}: [{mode}]")
    others = {key: values.pop(key, 1) for key in NOT_COMPUTED}
    return Shipped(file.stem, tables.get("family", ""), values, **others)


def check(values: Mapping[str, Any], where: str) -> None:
    """UsageError unless every key is a recipe's and every value of its type."""
    known = schema() | NOT_COMPUTED
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key}{_near(key, known)}; it takes {', '.join(sorted(known))}")
        number = known[key] is float and type(value) is int
        if type(value) is not known[key] and not number:
            raise UsageError(f"{where}: {key} is {value!r}, which is no {known[key].__name__}")


@functools.cache
def schema() -> dict[str, type]:
    """Every key of a recipe that a file or --set may give, and its type."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    return {f.name: kinds[f.type] for f in dataclasses.fields(Recipe) if f.name not in OF_A_RUN}


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """key=value, each checked against the schema."""
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in schema():
            raise UsageError(f"--set {setting}: not KEY=VALUE of a recipe{_near(key, schema())}")
        try:
            found[key] = _BOOLEANS[text.lower()] if schema()[key] is bool else schema()[key](text)
        except (ValueError, KeyError):
            raise UsageError(f"--set {setting}: {text!r} is no {schema()[key].__name__}") from None
    return found


def gpu_memory() -> int:
    """GB of the smallest GPU here as nvidia-smi says it; without any, of the smallest that recipes know."""
    if (program := shutil.which("nvidia-smi")) is None:
        return GPUS[0]
    words = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(int(line) * 2**20 / 1e9) for line in said.splitlines())
    except (OSError, subprocess.SubprocessError, ValueError):
        return GPUS[0]


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""
