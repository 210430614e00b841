"""One module per model family, all with the same parts (the protocol Family); `family_of` finds a config.json's own.

A file in this folder is a family, but for the PARTS that families are made of. No other file of the package names a
family: commands, recipes, tests and docs derive the list from here.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from slipway.errors import DataError
from slipway.families.checks import Config, Kinds, check_limits, check_required
from slipway.families.config import canonical
from slipway.families.described import GIVE, Described
from slipway.families.described import check as check_described
from slipway.families.fields import Fields, check_fields
from slipway.options import suggestion
from slipway.untrusted import read_object

if TYPE_CHECKING:
    from slipway.families.quantized import Form
    from slipway.families.rules import Rules
    from slipway.tensors.refs import TensorInfo

MOST_LAYERS = 10_000
LARGEST_CONFIG = 16 << 20  # bytes; some name every module of a quantised model
# Files here that are no family.
PARTS = {"checks", "config", "decoder", "described", "fabricate", "fields", "mtp", "quantized", "rope", "rules"}


class Family(Protocol):
    """What a family's module declares."""

    NAME: str  # what commands call it: the name of its file
    MODEL_TYPES: tuple[str, ...]  # the values of `model_type` in config.json that it serves
    REQUIRED: Kinds  # the fields of config.json that are needed
    ALIASES: Mapping[str, str]  # other names that transformers has had for fields
    FIELDS: Fields  # every field that is known, and what becomes of it
    QUANTIZED: tuple[str, ...]  # which tensors its published checkpoints hold quantised, by the ends of their names
    FORM: Form  # and how: one of quantized.py

    def defaults(self, c: Config) -> Config:
        """What transformers assumes for fields that the file does not have."""

    def check(self, c: Config, where: Path) -> None:
        """DataError for fields that do not fit together, or that Megatron computes in another way."""

    def rules(self, c: Config) -> Rules:
        """Every tensor of both sides, and the rules between them (rules.py)."""

    def nemo_model(self, c: Config) -> tuple[str, str, dict[str, Any]]:
        """(NeMo's model class, its configuration class, the fields that this config.json sets)."""

    # Fields of Megatron's that change what a model computes and differ from described.PLAIN in this family's class.
    MEGATRON: Mapping[str, Any]

    def hf_config(self, f: Described) -> dict[str, Any]:
        """config.json from Megatron's fields: `nemo_model` the other way round."""

    def tiny_config(self) -> dict[str, Any]:
        """A config.json of about a hundred thousand parameters."""


class _Families(Mapping[str, Family]):
    """Name → family. The names are known from the files; a family is imported when it is asked for."""

    def __init__(self) -> None:
        self._names = sorted({module.name for module in pkgutil.iter_modules(__path__)} - PARTS)

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
    if not os.path.lexists(path):
        if (path.parent / "adapter_config.json").is_file():
            raise DataError(f"{path.parent} is an adapter of peft; give its model, and this folder with --adapter")
        raise DataError(f"{path} is missing; give the folder of a Hugging Face model")
    return read_object(path, LARGEST_CONFIG)


def family_of(config: Config, where: Path) -> Family:
    """The family that a config.json's model_type is of; DataError for an unknown architecture."""
    kind, known = config.get("model_type"), by_model_type()
    if not isinstance(kind, str) or kind not in known:
        raise DataError(
            f"{where}: unknown model_type {kind!r}{suggestion(str(kind), known)}; known are {', '.join(sorted(known))}"
        )
    return known[kind]


def understood(config: Config, where: Path) -> tuple[Family, dict[str, Any]]:
    """(family, config.json in its canonical form): every field is known, needed ones are there and go together.

    Errors: DataError that names the field.
    """
    family = family_of(config, where)
    c = canonical(config, family.ALIASES, family.defaults(config), where)
    check_fields(c, where, family.FIELDS)
    check_required(c, where, family.REQUIRED)
    check_limits(c, where)
    family.check(c, where)
    return family, c


def notes(c: Config) -> list[str]:
    """What a person should know of a config.json: fields that other programs read in another way.

    Args:
        c: in its canonical form.
    """
    said = []
    if c.get("dual_chunk_attention_config"):
        said.append("dual_chunk_attention_config has no effect here, as in transformers: attention is the usual one")
    if (c.get("rope_scaling") or {}).get("attn_factor") is not None:
        said.append("rope_scaling.attn_factor has no effect here, as in transformers; vLLM multiplies by it")
    return said


# ---------------------------------------------------------------------------- what a checkpoint without config.json is


def described_model(f: Described, tensors: Mapping[str, TensorInfo]) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) of a checkpoint from Megatron's fields and tensors.

    Errors: DataError for a field that is missing, or that no config.json of the family can say.
    """
    family = _by_tensors(tensors, f.where)
    layers = f["num_layers"]
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:  # before anything is made for each of them
        raise DataError(f"{f.where}: num_layers is {str(layers)[:40]!r}; it must be 1 to {MOST_LAYERS}")
    try:
        config = family.hf_config(f)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        raise DataError(f"{f.where} is damaged: its fields are no model's; {GIVE}") from None
    family, config = understood(config, f.where)
    check_described(f, family, config)
    return family, config


def _by_tensors(tensors: Mapping[str, TensorInfo], where: Path) -> Family:
    """The family whose attention has tensors of these names: the most that are the same, the fewest that are not."""
    found = _kinds(tensors)
    scores = {name: _likeness(found, _kinds_of(name)) for name in FAMILIES}
    best, *others = (name for name in scores if scores[name] == max(scores.values()))
    if scores[best] < 0.5:
        raise DataError(f"{where}: the tensors are of none of the families {', '.join(FAMILIES)}")
    if others:
        raise DataError(f"{where}: the tensors are as much of {best} as of {', '.join(others)}; {GIVE}")
    return FAMILIES[best]


@functools.cache
def _kinds_of(name: str) -> frozenset[str]:
    family = FAMILIES[name]
    return _kinds(family.rules(understood(family.tiny_config(), Path("config.json"))[1]).megatron)


def _kinds(tensors: Iterable[str]) -> frozenset[str]:
    """The names of the tensors of attention, without the layer."""
    inside = (re.search(r"(?:^|\.)decoder\.layers\.(?:\d+\.)?(self_attention\..+)", key) for key in tensors)
    return frozenset(match.group(1) for match in inside if match)


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one else 0.0
