"""What the families declare, and what they have in common: names, assumed values, windows, groups of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KINDS, config_of
from slipway.errors import DataError
from slipway.families import FAMILIES, mtp, rules, understood
from slipway.families.rules import Cell, Copies, GroupedQKV, Scope, Transposed
from slipway.tensors.refs import Ref, TensorInfo

WHERE = Path("model/config.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_name_of_its_file(name):
    family = FAMILIES[name]
    assert name == family.NAME and family.tiny_config()["model_type"] in family.MODEL_TYPES


@pytest.mark.parametrize("kind", ["llama31", "qwen25_tied", "qwen3_dense", "qwen3_moe", "deepseek_v3"])
def test_every_matrix_of_a_layer_is_published_quantised(kind):
    """But for the router, whose weights stay as they are."""
    family, c = understood(config_of(kind), WHERE)
    layer = {name: info for name, info in family.rules(c).hf.items() if name.startswith("model.layers.1.")}
    matrices = {name for name, info in layer.items() if len(info.shape) == 2 and not name.endswith("mlp.gate.weight")}
    assert {name for name in layer if name.endswith(tuple(family.QUANTIZED))} == matrices


# transformers 4 has 7 built in; its class for DeepSeek has the number of the largest model.
OWN = [("gpt_oss", "swiglu_limit"), ("deepseek_v3", "num_key_value_heads")]


def assumed(kind: str) -> list[str]:
    family, config = FAMILIES[KINDS[kind][0]], config_of(kind)
    return [name for name, value in family.defaults(config).items() if value is not None and (kind, name) not in OWN]


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in ("gpt_oss", "llama31", "qwen25_tied", "qwen3_moe", "qwen3_dense",
                                             "deepseek_v3") for name in assumed(kind)]
)  # fmt: skip
def test_what_is_assumed_is_what_transformers_assumes(kind, name):
    from transformers import AutoConfig

    config = config_of(kind, **{name: ...})
    theirs = AutoConfig.for_model(**config)
    # Its attention divides where a configuration has no field for the size of a head, which it then does not save.
    wanted = getattr(theirs, name, None) or theirs.hidden_size // theirs.num_attention_heads
    assert FAMILIES[KINDS[kind][0]].defaults(config)[name] == wanted


def refused(kind: str, **changes: Any) -> str:
    """What is said of a changed config.json; "" if it is taken."""
    try:
        understood(config_of(kind, **changes), WHERE)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["llama31", "qwen25_tied", "qwen3_dense", "qwen3_moe", "gpt_oss"])
def test_queries_are_shared_out_evenly(kind):
    assert "num_attention_heads is not a multiple" in refused(kind, num_key_value_heads=3)
    assert refused(kind, num_key_value_heads=4) == ""


@pytest.mark.parametrize("kind", ["llama31", "qwen25_tied", "qwen3_dense", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_which_scalings_a_family_has(kind):
    linear = {"rope_type": "linear", "factor": 2.0}
    assert bool(refused(kind, rope_scaling=linear)) == (kind == "deepseek_v3")
    assert refused(kind, rope_scaling={"rope_type": "yarn", "factor": 4.0}) == ""
    assert "rope_type 'dynamic'" in refused(kind, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize("kind", ["qwen25_tied", "qwen3_dense", "qwen3_moe"])
def test_a_window_on_any_layer_is_refused(kind):
    on = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 2}
    said = "asks for sliding_attention"
    assert said in refused(kind, **on, max_window_layers=0) and said in refused(kind, **on, max_window_layers=1)
    assert refused(kind, **on, max_window_layers=2) == refused(kind, **on, max_window_layers=...) == ""
    assert said in refused(kind, **{**on, "num_hidden_layers": 29}, max_window_layers=...)
    assert refused(kind, **{**on, "num_hidden_layers": 28}, max_window_layers=...) == ""
    assert refused(kind, **{**on, "use_sliding_window": False}, max_window_layers=0) == ""
    full = ["full_attention"] * 2
    assert refused(kind, **on, max_window_layers=0, layer_types=full) == "", "the list says it more exactly"
    assert said in refused(kind, layer_types=["full_attention", "sliding_attention"])
    assert "max_window_layers is [2]; it must be a whole number" in refused(kind, **on, max_window_layers=[2])
    assert "layer_types is 2; it must be a list" in refused(kind, layer_types=2)
    assert "asks for chunked" in refused(kind, layer_types=["chunked", "full_attention"])


@pytest.mark.parametrize("kind", ["llama31", "qwen25_tied", "qwen3_moe", "gpt_oss"])
def test_what_is_on_in_no_decoder(kind):
    for name in ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"):
        assert f"field {name} is True" in refused(kind, **{name: True}) and refused(kind, **{name: False}) == ""
    assert "field partial_rotary_factor is 0.5" in refused(kind, partial_rotary_factor=0.5)
    assert refused(kind, partial_rotary_factor=1.0) == ""


# ---------------------------------------------------------------------------- rules


def test_copies_must_be_equal():
    one, other = np.arange(6, dtype=np.uint16).reshape(2, 3), np.arange(6, dtype=np.uint16).reshape(2, 3)
    op = Copies(("a", "b"))
    assert op.to_megatron((one, other)) == (one,) and op.to_hf((one,)) == (one, one)
    other[1, 2] += 1
    with pytest.raises(DataError, match="tensor b is not a copy of a"):
        op.to_megatron((one, other))


def test_a_stack_of_matrices_is_transposed_matrix_by_matrix():
    stack = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    (found,) = Transposed().to_megatron((stack,))
    assert np.array_equal(found, stack.transpose(0, 2, 1)) and np.array_equal(Transposed().to_hf((found,))[0], stack)


@pytest.mark.parametrize(
    "most, rows", [(1, [1] * 6), (39, [1] * 6), (80, [2, 2, 2]), (160, [4, 2]), (239, [5, 1]), (240, [6])]
)
def test_blocks_of_rows_are_as_large_as_may_be(monkeypatch, most, rows):
    """Of two equal tensors of six rows of twenty bytes."""
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", most)
    info, target = TensorInfo((6, 10)), Ref("m", (3,), (100, 106))
    cells = list(rules.by_rows((Ref("a"), Ref("b")), target, info))
    if len(rows) == 1:
        assert cells == [Cell((Ref("a"), Ref("b")), (target,))]
        return
    ends = np.cumsum([0, *rows]).tolist()
    for cell, start, stop in zip(cells, ends[:-1], ends[1:], strict=True):
        assert cell.hf == (Ref("a", (), (start, stop)), Ref("b", (), (start, stop)))
        assert cell.megatron == (Ref("m", (3,), (100 + start, 100 + stop)),)


@pytest.mark.parametrize(
    "most, groups",
    [(1, [1] * 4), (479, [1] * 4), (480, [1] * 4), (960, [2, 2]), (1440, [3, 1]), (1919, [3, 1]), (1920, [4])],
)
def test_groups_of_heads_go_together_as_long_as_both_forms_fit(monkeypatch, most, groups):
    """Four groups of 6 + 3 + 3 rows of twenty bytes: 240 bytes each, twice."""
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", most)
    op, parts = GroupedQKV(4, 6, 3), (Ref("q"), Ref("k"), Ref("v"))
    cells = list(rules.qkv_by_groups(parts, Ref("m", (1,)), op, 20))
    if len(groups) == 1:
        assert cells == [Cell(parts, (Ref("m", (1,)),), op)]
        return
    ends = np.cumsum([0, *groups]).tolist()
    for cell, first, last in zip(cells, ends[:-1], ends[1:], strict=True):
        assert cell.op == GroupedQKV(last - first, 6, 3)
        assert [ref.rows for ref in cell.hf] == [(6 * first, 6 * last), (3 * first, 3 * last), (3 * first, 3 * last)]
        assert cell.megatron == (Ref("m", (1,), (12 * first, 12 * last)),)


def test_tensors_are_joined_from_any_names():
    scope = Scope(rules.Rules())
    scope.joined((name for name in ("gate", "up")), "both", 4, 3)
    assert scope.rules.megatron == {"both": TensorInfo((8, 3))} and set(scope.rules.hf) == {"gate", "up"}
    assert [cell.megatron[0].rows for cell in scope.rules.cells] == [(0, 4), (4, 8)]


def test_layers_for_multi_token_prediction_are_counted_and_left_out():
    c = {"num_hidden_layers": 2, mtp.MTP: 1}
    assert mtp.mtp_layers(c) == 1 and mtp.mtp_layers({}) == mtp.mtp_layers({mtp.MTP: None}) == 0
    assert mtp.without_mtp(c) == {**c, mtp.MTP: 0} and mtp.without_mtp({"a": 1}) == {"a": 1}
    assert mtp.has_mtp(c, ["x", "model.layers.2.norm"]) and not mtp.has_mtp(c, ["model.layers.20.norm"])
