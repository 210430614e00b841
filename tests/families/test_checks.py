"""A config.json that cannot be followed: one line that names the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, config_of
from slipway.errors import DataError
from slipway.families import FAMILIES, family_of, understood

WHERE = Path("model/config.json")
MISSING = object()


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        understood(config, WHERE)
    assert str(error.value).startswith(f"{WHERE}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_known(kind):
    assert family_of(config_of(kind), WHERE) is FAMILIES[KINDS[kind][0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_needed_field_is_needed(name):
    config = FAMILIES[name].tiny_config()
    for field in FAMILIES[name].REQUIRED:
        assumed = FAMILIES[name].defaults(config).get(field)
        if assumed is None:
            assert f"field {field} is missing" in refused({key: v for key, v in config.items() if key != field})
        assert f"field {field} is 'x'" in refused({**config, field: "x"})
        if isinstance(config[field], (int, float)):
            assert f"field {field} is -1" in refused({**config, field: type(config[field])(-1)})


YARN4 = {"type": "yarn", "factor": 4.0}
# (kind, field or section.field, value, what the message says)
CASES: list[tuple[str, str, Any, str | None]] = [
    ("llama31", "num_key_value_heads", 3, "num_attention_heads is not a multiple"),
    ("llama31", "head_dim", "x", "field head_dim is 'x'"),
    ("llama31", "attention_bias", True, "field attention_bias is True; for llama only False is supported"),
    ("llama31", "mlp_bias", True, "field mlp_bias is True"),
    ("llama31", "hidden_act", "gelu", "field hidden_act is 'gelu'"),
    ("llama31", "partial_rotary_factor", 0.5, "field partial_rotary_factor is 0.5"),
    ("llama31", "final_logit_softcapping", 30.0, "unknown field final_logit_softcapping (30.0)"),
    ("llama31", "logit_scale", 0.0625, "unknown field logit_scale"),
    ("llama31", "embedding_multiplier", 12, "unknown field embedding_multiplier"),
    ("llama31", "sliding_window", 4096, "unknown field sliding_window (4096)"),
    ("llama31", "num_hiden_layers", 2, "did you mean num_hidden_layers?"),
    (
        "llama31",
        "rope_scaling.rope_type",
        "dynamic",
        "for llama only default, llama3, linear, yarn",
    ),
    ("llama31", "rope_scaling.rope_type", "longrope", "rope_type 'longrope'"),
    ("llama31", "rope_scaling", "llama3", "field rope_scaling is 'llama3'; it must be a table or null"),
    (
        "llama31",
        "rope_scaling.low_freq_factor",
        None,
        "rope_scaling.low_freq_factor is missing",
    ),
    ("llama31", "rope_scaling.factor", "x", "rope_scaling.factor is 'x'; it must be a number"),
    ("llama31", "rope_scaling.beta_fast", 32, "unknown value rope_scaling.beta_fast (32)"),
    ("llama31", "rope_scaling.type", "yarn", "rope_scaling.rope_type is 'llama3', but rope_scaling.type is 'yarn'"),
    ("qwen25_tied", "use_sliding_window", True, None),  # from layer 28 on, and there is none
    ("qwen25_tied", "layer_types", ["full_attention", "sliding_attention"], "asks for sliding_attention"),
    ("qwen25_tied", "use_mrope", True, "field use_mrope is True"),
    ("qwen25_tied", "rope_scaling", {**YARN4, "attention_factor": 0}, "rope_scaling.attention_factor is 0"),
    ("qwen25_tied", "rope_scaling", {**YARN4, "truncate": 1}, "rope_scaling.truncate is 1"),
    ("qwen25_tied", "rope_scaling", {"factor": 4.0}, "rope_scaling has no rope_type"),
    ("qwen3_moe", "num_experts", MISSING, "field num_experts is missing"),
    ("qwen3_moe", "num_experts_per_tok", 5, "num_experts_per_tok is larger than num_experts"),
    ("qwen3_moe", "mlp_only_layers", [0], "field mlp_only_layers is [0]"),
    ("qwen3_moe", "decoder_sparse_step", 2, "field decoder_sparse_step is 2"),
    ("qwen3_moe", "num_local_experts", 8, "num_experts is 4, but num_local_experts is 8"),
    ("deepseek_v3", "num_key_value_heads", 2, "field num_key_value_heads is 2; with the other sizes it must be 4"),
    ("deepseek_v3", "qk_head_dim", 48, "field qk_head_dim is 48; with the other sizes it must be 40"),
    ("deepseek_v3", "q_lora_rank", "x", "field q_lora_rank is 'x'"),
    ("deepseek_v3", "first_k_dense_replace", 3, "it must be a whole number from 0 to 2"),
    ("deepseek_v3", "first_k_dense_replace", MISSING, "field first_k_dense_replace is None"),
    ("deepseek_v3", "num_nextn_predict_layers", "1", "field num_nextn_predict_layers is '1'"),
    ("deepseek_v3", "n_group", 3, "n_routed_experts is not a multiple of n_group"),
    ("deepseek_v3", "num_experts_per_tok", 5, "num_experts_per_tok"),
    ("deepseek_v3", "num_experts_per_tok", 3, "num_experts_per_tok must be twice topk_group"),
    ("deepseek_v3", "scoring_func", "softmax", "field scoring_func is 'softmax'"),
    ("deepseek_v3", "rope_scaling.type", "linear", "only default, yarn are supported"),
    ("deepseek_v3", "rope_scaling.factor", MISSING, "rope_scaling.factor is missing"),
    ("deepseek_v3", "rope_scaling.mscale", 0, "one of mscale and mscale_all_dim"),
    ("deepseek_v3", "rope_scaling.beta_fast", "x", "rope_scaling.beta_fast is 'x'"),
    ("deepseek_v3", "rope_scaling.attention_factor", 1.5, "rope_scaling.attention_factor is 1.5"),
    ("gpt_oss", "layer_types", ["full_attention"], "layer_types has 1 entries for 2 layers"),
    ("gpt_oss", "layer_types", ["full_attention", "chunked_attention"], "layer_types has 'chunked_attention'"),
    ("gpt_oss", "rope_scaling.beta_slow", "x", "rope_scaling.beta_slow is 'x'"),
    ("gpt_oss", "rope_scaling.attention_factor", 1.0, "field rope_scaling.attention_factor is 1.0"),
    ("gpt_oss", "swiglu_limit", 0, "field swiglu_limit is 0"),
    ("gpt_oss", "swiglu_alpha", 1.0, "field swiglu_alpha is 1.0"),
    ("gpt_oss", "experts_per_token", 3, "experts_per_token is 3, but num_experts_per_tok is 2"),
]


@pytest.mark.parametrize("kind, field, value, message", CASES)
def test_odd_fields_are_named(kind, field, value, message):
    config = copy.deepcopy(config_of(kind))
    *sections, last = field.split(".")
    section = config[sections[0]] if sections else config
    section[last] = value
    if value is MISSING:
        del section[last]
    if message is None:
        understood(config, WHERE)
    else:
        assert message in refused(config)
