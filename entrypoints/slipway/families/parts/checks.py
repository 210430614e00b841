"""Checks of a config.json: a DataError names the field, its value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.errors import DataError

Config = Mapping[str, Any]
Kinds = Mapping[str, type | tuple[type, ...]]

LARGEST = 1 << 31


def head_dim(c: Config) -> int:
    """Size of one attention head."""
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def check_required(c: Config, where: Path, required: Kinds) -> None:
    """DataError for a field that is missing, of a wrong type, or a number that is out of range."""
    for field, kinds in required.items():
        if field not in c:
            raise DataError(f"{where}: field {field} is missing; download the config.json of this model again")
        if not isinstance(c[field], kinds) or isinstance(c[field], bool):
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise DataError(f"{where}: field {field} is {c[field]!r}; it must be of type {wanted}")
        if isinstance(c[field], (int, float)) and not 0 < c[field] < LARGEST:
            raise DataError(f"{where}: field {field} is {c[field]}, out of range")


def check_count(c: Config, where: Path, field: str, most: int) -> None:
    """DataError unless the field is a whole number from 0 to `most`."""
    if type(c.get(field)) is not int or not 0 <= c[field] <= most:
        raise DataError(f"{where}: field {field} is {c.get(field)!r}; it must be a whole number from 0 to {most}")


def check_section(c: Config, where: Path, section: str, fields: tuple[str, ...]) -> None:
    """DataError unless these fields of a section (such as rope_scaling) are positive numbers."""
    for field in fields:
        value = c[section].get(field)
        if type(value) not in (int, float) or not 0 < value < LARGEST:
            raise DataError(f"{where}: field {section}.{field} is {value!r}, which is no positive number")


def check_rope_type(c: Config, where: Path, known: str) -> None:
    """DataError unless rope_scaling is of the one type known here."""
    scaling = c["rope_scaling"]
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind != known:
        raise DataError(f"{where}: field rope_scaling is {scaling!r}; for {c['model_type']} only {known} is known")


def check_only(c: Config, where: Path, **known: Any) -> None:
    """DataError for a field with another value than the only one known here, for which an absent one is taken."""
    for field, value in known.items():
        if field in c and c[field] != value:
            raise DataError(f"{where}: field {field} is {c[field]!r}; for {c['model_type']} only {value!r} is known")


def check_heads(c: Config, where: Path) -> None:
    """DataError unless all KV groups have the same number of query heads."""
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise DataError(f"{where}: num_attention_heads is not a multiple of num_key_value_heads")
    if type(head_dim(c)) is not int or not 0 < head_dim(c) < LARGEST:
        raise DataError(f"{where}: field head_dim is {c.get('head_dim')!r}, which is not the size of a head")
