"""One module per model family, all with the same parts (the protocol Family); `family_of` finds a config.json's own.

A file in this folder is a family. What they are made of lies in parts/. No other file of the package names a family:
commands, recipes, tests and docs derive the list from here.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from slipway.errors import DataError
from slipway.families.parts.checks import Config, Kinds, check_required
from slipway.options import suggestion

if TYPE_CHECKING:
    from slipway.families.parts.quantized import Form
    from slipway.families.parts.rules import Rules


class Family(Protocol):
    """What a family's module declares."""

    NAME: str  # what commands call it: the name of its file
    MODEL_TYPES: tuple[str, ...]  # the values of `model_type` in config.json that it serves
    REQUIRED: Kinds  # the fields of config.json that are needed
    QUANTIZED: tuple[str, ...]  # which tensors its published checkpoints hold quantised, by the ends of their names
    FORM: Form  # and how: one of parts/quantized.py

    def check(self, c: Config, where: Path) -> None:
        """DataError for fields that do not fit together, or that Megatron computes in another way."""

    def rules(self, c: Config) -> Rules:
        """Every tensor of both sides, and the rules between them (parts/rules.py)."""

    def nemo_model(self, c: Config) -> tuple[str, str, dict[str, Any]]:
        """(NeMo's model class, its configuration class, the fields that this config.json sets)."""

    def tiny_config(self) -> dict[str, Any]:
        """A config.json of about a hundred thousand parameters."""


class _Families(Mapping[str, Family]):
    """Name → family. The names are known from the files; a family is imported when it is asked for."""

    def __init__(self) -> None:
        self._names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)

    def __getitem__(self, name: str) -> Family:
        if name not in self._names:
            raise KeyError(name)
        return cast(Family, importlib.import_module(f"{__name__}.{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FAMILIES: Mapping[str, Family] = _Families()


@functools.cache
def by_model_type() -> dict[str, Family]:
    """model_type of config.json → family."""
    return {kind: family for family in FAMILIES.values() for kind in family.MODEL_TYPES}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; DataError where there is none or it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give the folder of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object; download it again")
    return config


def family_of(config: Config, where: Path) -> Family:
    """The family; DataError for an unknown architecture or a missing field."""
    kind, known = config.get("model_type"), by_model_type()
    if not isinstance(kind, str) or kind not in known:
        raise DataError(
            f"{where}: unknown model_type {kind!r}{suggestion(str(kind), known)}; known are {', '.join(sorted(known))}"
        )
    family = known[kind]
    check_required(config, where, family.REQUIRED)
    family.check(config, where)
    return family
