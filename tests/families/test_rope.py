"""YaRN and linear scaling in NeMo's fields, and the values of rope_scaling that are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import config_of
from slipway.errors import DataError
from slipway.families import rope, understood

WHERE = Path("model/config.json")


def fields(**scaling: Any) -> dict[str, Any]:
    return rope.yarn_fields({"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", **scaling}})


def test_yarn_as_megatron_has_it():
    assert fields(factor=4) == {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 256,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
    }
    given = {"original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    found = fields(factor=8.0, **given)
    assert (found["yarn_original_max_position_embeddings"], found["yarn_beta_fast"]) == (64, 16.0)
    assert (found["yarn_beta_slow"], found["yarn_correction_range_round_to_int"]) == (2.0, False)
    assert fields(factor=4, truncate=True)["yarn_correction_range_round_to_int"] is True


@pytest.mark.parametrize("factor, wanted", [(4.0, 0.7), (4.0, 1.3), (40.0, 1.0), (8.0, 0.1 * math.log(8) + 1)])
def test_megatron_multiplies_by_the_factor_that_is_asked_for(factor, wanted):
    found = fields(factor=factor, attention_factor=wanted)
    # Megatron's _yarn_get_concentration_factor: one over the other, the second of which is 1 for 0.
    assert 0.1 * found["yarn_mscale"] * math.log(factor) + 1.0 == pytest.approx(wanted)


def test_linear_scaling_and_none():
    c = {"rope_scaling": {"rope_type": "linear", "factor": 2}}
    assert rope.scaled(c, "a:B", {"x": 1}, {"y": 2}) == ("a:B", {"x": 1, "seq_len_interpolation_factor": 2.0})
    for none in ({}, {"rope_scaling": None}):
        assert rope.scaled(none, "a:B", {"x": 1}, {"y": 2}) == ("a:B", {"x": 1})


def test_a_plain_decoder_with_yarn_is_gpt_oss_without_what_is_its_own():
    c = {"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    name, found = rope.scaled(c, "a:B", {"add_bias_linear": True, "x": 1}, {"window_size": (3, 0), "x": 2})
    assert name == rope.YARN_CLASS and found["position_embedding_type"] == "yarn"
    assert found["x"] == 1 and found["window_size"] == (3, 0) and found["add_bias_linear"] is True
    assert found["softmax_type"] == "vanilla" and found["glu_linear_offset"] == 0.0


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("factor", 0, "rope_scaling.factor is 0"), ("attention_factor", 0, "rope_scaling.attention_factor is 0"),
        ("original_max_position_embeddings", 0, "rope_scaling.original_max_position_embeddings is 0"),
        ("factor", 1e30, "it must be"), ("factor", -1, "it must be"), ("factor", True, "it must be"),
        ("factor", "4", "it must be"), ("beta_fast", -0.5, "it must be"), ("truncate", 1, "rope_scaling.truncate is 1"),
        ("truncate", None, None), ("truncate", False, None), ("beta_slow", 0, None), ("factor", 9e29, None),
        ("factor", 4, None), ("mscale", 0, None), ("novel", None, None), ("novel", 3, "unknown value"),
        ("attn_factor", 2.0, None), ("type", "yarn", None),
    ],
)  # fmt: skip
def test_the_values_of_yarn(field, value, message):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, field: value}
    config = config_of("qwen25_tied", rope_scaling=yarn)
    if message is None:
        understood(config, WHERE)
    else:
        with pytest.raises(DataError, match=message):
            understood(config, WHERE)


@pytest.mark.parametrize(
    "factor, attention, good",
    [(1.0, None, True), (1.0, 1.0, True), (1.0, 1.5, False), (0.5, 1.5, False), (1.01, 1.5, True), (2.0, 1.5, True)],
)
def test_attention_is_scaled_only_with_a_factor_larger_than_one(factor, attention, good):
    yarn = {"rope_type": "yarn", "factor": factor, "attention_factor": attention}
    config = config_of("qwen25_tied", rope_scaling=yarn)
    if good:
        understood(config, WHERE)
    else:
        with pytest.raises(DataError, match="only where factor is larger than 1"):
            understood(config, WHERE)
