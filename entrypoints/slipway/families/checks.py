"""Checks of a config.json: a DataError names the field, its value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.errors import DataError

Config = Mapping[str, Any]
Kinds = Mapping[str, type | tuple[type, ...]]

LARGEST = 1 << 31  # of a size: Megatron's are signed 32-bit numbers
LARGEST_FACTOR = 1e30  # of a number with a fraction: Nemotron-Nano-4B has a rope_theta of 3,565,775,107.26


def head_dim(c: Config) -> int:
    """Size of one attention head."""
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def check_required(c: Config, where: Path, required: Kinds) -> None:
    """DataError for a field that is missing, of a wrong type, or a number that is out of range."""
    for field, kinds in required.items():
        if field not in c:
            raise DataError(f"{where}: field {field} is missing; download the config.json of this model again")
        wanted_kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(c[field], kinds) or isinstance(c[field], bool):
            wanted = " or ".join(kind.__name__ for kind in wanted_kinds)
            raise DataError(f"{where}: field {field} is {c[field]!r}; it must be of type {wanted}")
        most = LARGEST_FACTOR if float in wanted_kinds else LARGEST
        if isinstance(c[field], (int, float)) and not 0 < c[field] < most:
            raise DataError(f"{where}: field {field} is {c[field]}; it must be more than 0 and less than {most:g}")


def check_count(c: Config, where: Path, field: str, most: int) -> None:
    """DataError unless the field is a whole number from 0 to `most`."""
    if type(c.get(field)) is not int or not 0 <= c[field] <= most:
        raise DataError(f"{where}: field {field} is {c.get(field)!r}; it must be a whole number from 0 to {most}")


def check_heads(c: Config, where: Path) -> None:
    """DataError unless all KV groups have the same number of query heads."""
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise DataError(f"{where}: num_attention_heads is not a multiple of num_key_value_heads")
    if type(head_dim(c)) is not int or not 0 < head_dim(c) < LARGEST:
        raise DataError(f"{where}: field head_dim is {c.get('head_dim')!r}, which is not the size of a head")
