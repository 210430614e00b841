"""A config.json that cannot be followed: one line that names the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, config_of
from slipway.errors import DataError
from slipway.families import FAMILIES, family_of

WHERE = Path("model/config.json")
MISSING = object()


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        family_of(config, WHERE)
    assert str(error.value).startswith(f"{WHERE}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_known(kind):
    assert family_of(config_of(kind), WHERE) is FAMILIES[KINDS[kind][0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_needed_field_is_needed(name):
    config = FAMILIES[name].tiny_config()
    for field in FAMILIES[name].REQUIRED:
        assert f"field {field} is missing" in refused({key: v for key, v in config.items() if key != field})
        assert f"field {field} is 'x'" in refused({**config, field: "x"})
        assert f"field {field} is None" in refused({**config, field: None})
        if isinstance(config[field], (int, float)):
            assert f"field {field} is -1" in refused({**config, field: type(config[field])(-1)})


# (kind, field or section.field, value, what the message says)
CASES: list[tuple[str, str, Any, str]] = [
    ("llama31", "num_key_value_heads", 3, "num_attention_heads is not a multiple"),
    ("llama31", "head_dim", "x", "field head_dim is 'x'"),
    ("llama31", "attention_bias", True, "field attention_bias is True; for llama only False is known"),
    ("llama31", "mlp_bias", True, "field mlp_bias is True"),
    ("llama31", "hidden_act", "gelu", "field hidden_act is 'gelu'"),
    ("llama31", "rope_scaling.rope_type", "linear", "only llama3 is known"),
    ("llama31", "rope_scaling", "llama3", "field rope_scaling is 'llama3'"),
    ("llama31", "rope_scaling.low_freq_factor", None, "field rope_scaling.low_freq_factor is None"),
    ("llama31", "rope_scaling.factor", 0, "field rope_scaling.factor is 0"),
    ("qwen25_tied", "use_sliding_window", True, "field use_sliding_window is True"),
    ("qwen25_tied", "rope_scaling", {"type": "yarn", "factor": 4.0}, "field rope_scaling is {"),
    ("qwen3_moe", "num_experts", MISSING, "field num_experts is missing"),
    ("qwen3_moe", "num_experts_per_tok", 5, "num_experts_per_tok is more than num_experts"),
    ("qwen3_moe", "mlp_only_layers", [0], "field mlp_only_layers is [0]"),
    ("qwen3_moe", "decoder_sparse_step", 2, "field decoder_sparse_step is 2"),
    ("qwen3_dense", "rope_scaling", {"type": "yarn", "factor": 4.0}, "field rope_scaling is {"),
    ("deepseek_v3", "num_key_value_heads", 2, "field num_key_value_heads is 2; for deepseek_v3 only 4 is known"),
    ("deepseek_v3", "first_k_dense_replace", 3, "it must be a whole number from 0 to 2"),
    ("deepseek_v3", "first_k_dense_replace", MISSING, "field first_k_dense_replace is None"),
    ("deepseek_v3", "num_nextn_predict_layers", "1", "field num_nextn_predict_layers is '1'"),
    ("deepseek_v3", "n_group", 3, "n_routed_experts is not a multiple of n_group"),
    ("deepseek_v3", "num_experts_per_tok", 5, "the groups have fewer experts"),
    ("deepseek_v3", "num_experts_per_tok", 3, "num_experts_per_tok must be twice topk_group"),
    ("deepseek_v3", "scoring_func", "softmax", "field scoring_func is 'softmax'"),
    ("deepseek_v3", "rms_norm_eps", 1e-5, "field rms_norm_eps is 1e-05"),
    ("deepseek_v3", "rope_scaling.type", "linear", "only yarn is known"),
    ("deepseek_v3", "rope_scaling.factor", MISSING, "field rope_scaling.factor is None"),
    ("deepseek_v3", "rope_scaling.mscale", 0, "one of mscale and mscale_all_dim"),
    ("deepseek_v3", "rope_scaling.beta_fast", "x", "field rope_scaling.beta_fast is 'x'"),
    ("deepseek_v3", "rope_scaling.attention_factor", 1.5, "field rope_scaling.attention_factor is 1.5"),
    ("gpt_oss", "layer_types", ["full_attention"], "layer_types has 1 entries for 2 layers"),
    ("gpt_oss", "rope_scaling.beta_slow", "x", "field rope_scaling.beta_slow is 'x'"),
]


@pytest.mark.parametrize("kind, field, value, message", CASES)
def test_odd_fields_are_named(kind, field, value, message):
    config = copy.deepcopy(config_of(kind))
    *sections, last = field.split(".")
    section = config[sections[0]] if sections else config
    section[last] = value
    if value is MISSING:
        del section[last]
    assert message in refused(config)
