"""Rotary positions: which scalings are supported, and the fields of NeMo's configuration that compute the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families.checks import LARGEST_FACTOR, Config
from slipway.families.decoder import Symbol
from slipway.families.described import Described
from slipway.options import suggestion

# Of each type: the values that it needs, and those that it may have.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
# transformers 5 writes the length beside other types as well. It ignores attn_factor, which vLLM does not.
UNUSED = ("original_max_position_embeddings", "attn_factor")


def check(c: Config, where: Path, *types: str) -> None:
    """DataError unless rope_scaling is null or of one of these types, with values that the type has.

    Args:
        c: in its canonical form.
    """
    if (scaling := c.get("rope_scaling")) is None:
        return
    kind = scaling["rope_type"]
    if kind not in types:
        near = suggestion(str(kind), types)
        raise DataError(
            f"{where}: rope_scaling has rope_type {kind!r}{near}; for {c['model_type']} only default, "
            f"{', '.join(types)} are supported"
        )
    needed, optional = SCALINGS[kind]
    for name in needed:
        if scaling.get(name) is None:
            raise DataError(f"{where}: rope_scaling.{name} is missing; rope_type {kind} needs it")
    for name, value in scaling.items():
        if name == "rope_type" or value is None:
            continue
        if name not in (*needed, *optional, *UNUSED):
            near = suggestion(name, (*needed, *optional))
            raise DataError(f"{where}: unknown value rope_scaling.{name} ({value!r}){near} for rope_type {kind}")
        wrong_kind = type(value) is not bool if name == "truncate" else type(value) not in (int, float)
        if wrong_kind or (name != "truncate" and not 0 <= value < LARGEST_FACTOR):
            raise DataError(f"{where}: rope_scaling.{name} is {value!r}; it must be a number of 0 or more")
    if kind == "yarn":
        _check_yarn(c, where, scaling)


def _check_yarn(c: Config, where: Path, yarn: Mapping[str, Any]) -> None:
    for name in ("factor", "original_max_position_embeddings", "attention_factor"):
        if yarn.get(name) == 0:
            raise DataError(f"{where}: rope_scaling.{name} is 0; it must be more than 0")
    if yarn["factor"] <= 1 and attention_factor(yarn) != 1:
        raise DataError(
            f"{where}: rope_scaling.attention_factor is {attention_factor(yarn)} with a factor of {yarn['factor']}; "
            "Megatron can scale attention only where factor is larger than 1"
        )


def attention_factor(yarn: Mapping[str, Any]) -> float:
    """What cosine and sine are multiplied by, as transformers computes it (modeling_rope_utils, YaRN)."""
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])
    factor, mscale, all_dim = yarn["factor"], yarn.get("mscale"), yarn.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_fields(c: Config) -> dict[str, Any]:
    """YaRN in the fields that Megatron's GPT reads, which NeMo's GPTOSSConfig has."""
    yarn = c["rope_scaling"]
    wanted, factor = attention_factor(yarn), float(yarn["factor"])
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": yarn.get("original_max_position_embeddings")
        or c["max_position_embeddings"],
        "yarn_beta_fast": float(yarn.get("beta_fast") or 32),
        "yarn_beta_slow": float(yarn.get("beta_slow") or 1),
        # Megatron multiplies cosine and sine by 0.1 · mscale · ln(factor) + 1 over the same with mscale_all_dim.
        "yarn_mscale": 1.0 if wanted == _mscale(factor, 1) else (wanted - 1) / (0.1 * math.log(factor)),
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": bool(yarn.get("truncate", True)),
    }


# What NeMo's GPTOSSConfig has beside YaRN, taken back to what a plain decoder has. It is the one configuration class of
# NeMo 2.7 with the fields of YaRN for attention with keys and values of their own.
PLAIN_DECODER: dict[str, Any] = {
    "activation_func": Symbol("torch.nn.functional:silu"),
    "add_bias_linear": False,
    "moe_ffn_hidden_size": None,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "bias_activation_fusion": False,
}
YARN_CLASS = "nemo.collections.llm.gpt.model.gpt_oss:GPTOSSConfig"


def linear_fields(c: Config) -> dict[str, Any]:
    """Positions divided by a factor."""
    return {"seq_len_interpolation_factor": float(c["rope_scaling"]["factor"])}


def scaled(
    c: Config, config_class: str, fields: dict[str, Any], plain: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """(NeMo's configuration class, its fields) of a plain decoder with the scaling that config.json asks for.

    Args:
        config_class, fields: without a scaling.
        plain: what the class itself sets and GPTOSSConfig, which stands in for it under YaRN, sets otherwise.
    """
    scaling = c.get("rope_scaling")
    kind = scaling["rope_type"] if scaling else None
    if kind == "linear":
        return config_class, {**fields, **linear_fields(c)}
    if kind == "yarn":
        return YARN_CLASS, {**PLAIN_DECODER, **plain, **fields, **yarn_fields(c)}
    return config_class, fields


def scaling_of(f: Described) -> dict[str, Any] | None:
    """rope_scaling of config.json from Megatron's fields: linear_fields and yarn_fields the other way round."""
    if f.get("position_embedding_type") == "yarn":
        return _yarn_of(f)
    if factor := f.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": float(factor)}
    return None


def _yarn_of(f: Described) -> dict[str, Any]:
    factor = float(f["yarn_rotary_scaling_factor"])
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": f["yarn_original_max_position_embeddings"],
        "beta_fast": float(f.get("yarn_beta_fast", 32)),
        "beta_slow": float(f.get("yarn_beta_slow", 1)),
        "truncate": bool(f.get("yarn_correction_range_round_to_int", True)),
    }
    # Megatron takes 1 for an mscale that is not set, as transformers does.
    wanted = _mscale(factor, f.get("yarn_mscale", 1.0)) / _mscale(factor, f.get("yarn_mscale_all_dim", 0.0))
    return scaling if wanted == _mscale(factor, 1) else {**scaling, "attention_factor": wanted}
