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


# The largest counts that are taken: the rules have an entry for each layer and expert, and are made before anything is
# compared with what is stored. Of published models the largest have 126 layers, 512 experts and 2 trillion weights.
MOST = {
    "num_hidden_layers": 2000,
    "num_nextn_predict_layers": 100,
    "n_shared_experts": 1000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERT_SIZES = ("moe_intermediate_size", "intermediate_size")
MOST_EXPERTS = 100_000  # of all layers together
MOST_WEIGHTS = 1 << 43
SIZES, MOST_WIDE = ("_size", "_dim", "_rank"), 1 << 24  # a row of a matrix is never divided
# A stored byte holds two weights at most (FP4). The estimate below is at most four times what there is.
WEIGHTS_OF_A_BYTE = 64


def check_limits(c: Config, where: Path) -> None:
    """DataError for a model that is larger than any, which to describe would take hours and all memory."""
    for field, most in MOST.items():
        if (value := _size(c, field)) > most:
            raise DataError(f"{where}: field {field} is {value}; it must be at most {most}")
    for field in c:
        if field.endswith(SIZES) and _size(c, field) > MOST_WIDE and field != "vocab_size":
            raise DataError(f"{where}: field {field} is {c[field]}; it must be at most {MOST_WIDE}")
    if (width := _size(c, "num_attention_heads") * _size(c, "head_dim")) > MOST_WIDE:
        raise DataError(f"{where}: num_attention_heads × head_dim is {width}; it must be at most {MOST_WIDE}")
    experts = max(_size(c, field) for field in EXPERTS)
    if experts * _size(c, "num_hidden_layers") > MOST_EXPERTS:
        raise DataError(
            f"{where}: {experts} experts in {c['num_hidden_layers']} layers are more than {MOST_EXPERTS}; download the "
            "config.json of this model again"
        )
    if (weights := about_weights(c)) > MOST_WEIGHTS:
        raise DataError(
            f"{where}: its sizes make about {weights:.2g} weights, more than any model has; download the config.json "
            "of this model again"
        )


def check_stored(c: Config, where: Path, stored: int) -> None:
    """DataError where config.json describes far more than the files hold; `stored`: bytes of all tensors."""
    weights = about_weights(c)
    if weights > WEIGHTS_OF_A_BYTE * (stored + (1 << 20)):
        raise DataError(
            f"{where}: its sizes make about {weights:.2g} weights, but the files hold {stored:,} bytes of tensors; is "
            "the download complete, and does config.json belong to this model?"
        )


def about_weights(c: Config) -> int:
    """How many weights a model has, roughly: its largest matrices."""
    h, layers, experts = _size(c, "hidden_size"), _size(c, "num_hidden_layers"), max(_size(c, e) for e in EXPERTS)
    heads = _size(c, "num_attention_heads") + _size(c, "num_key_value_heads")
    feed = 3 * max(1, experts) * next((f for f in (_size(c, name) for name in EXPERT_SIZES) if f), 0)
    return 2 * _size(c, "vocab_size") * h + layers * h * (2 * heads * (_size(c, "head_dim") or 1) + feed)


def _size(c: Config, field: str) -> int:
    value = c.get(field)
    return value if type(value) is int and value > 0 else 0
