"""Megatron's fields → config.json: what nemo_model says, the other way round; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import KINDS, config_of
from slipway.errors import DataError
from slipway.families import FAMILIES, _kinds_of, _likeness, described_model, understood
from slipway.families.described import Described
from slipway.tensors.refs import TensorInfo

WHERE = Path("io.json")


def fields_of(kind: str) -> tuple[dict, dict[str, TensorInfo]]:
    """(NeMo's fields, Megatron's tensors) of a kind of model."""
    family, config = understood(config_of(kind), WHERE)
    return family.nemo_model(config)[2], family.rules(config).megatron


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_of_nemo_say_the_same_model(kind):
    fields, tensors = fields_of(kind)
    family, config = described_model(Described(fields, WHERE), tensors)
    assert KINDS[kind][0] == family.NAME
    assert family.nemo_model(config)[2] == fields
    assert family.rules(config).megatron == tensors


def test_the_names_of_megatron_lm():
    fields, tensors = fields_of("llama31")
    scaling = {"scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"}
    args = {name: value for name, value in fields.items() if name not in scaling | {"vocab_size", "layernorm_epsilon"}}
    args |= {"norm_epsilon": 1e-5, "use_rope_scaling": True, "rope_scaling_factor": 8.0, "swiglu": True}
    args |= {"untie_embeddings_and_output_weights": True, "group_query_attention": True, "max_position_embeddings": 99}
    _, config = described_model(Described(args, WHERE, rows=512), tensors)
    assert config["rms_norm_eps"] == 1e-5 and config["vocab_size"] == 512 and config["max_position_embeddings"] == 99
    assert not config["tie_word_embeddings"]
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    _, config = described_model(Described({**args, "use_rope_scaling": False}, WHERE, rows=512), tensors)
    assert config["rope_scaling"] is None
    heads = {**args, "group_query_attention": False, "num_query_groups": 1}
    assert Described(heads, WHERE)["num_query_groups"] == args["num_attention_heads"]


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "num_attention_heads", "rotary_base", "vocab_size"])
def test_a_field_that_is_missing_is_asked_for(field):
    fields, tensors = fields_of("qwen25_untied")
    del fields[field]
    with pytest.raises(DataError, match=f"io.json does not say {field}; give the model's config.json with --config"):
        described_model(Described(fields, WHERE), tensors)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("llama31", "normalization", "LayerNorm"),
        ("llama31", "rotary_percent", 0.5),
        ("llama31", "rotary_interleaved", True),
        ("llama31", "add_bias_linear", True),
        ("llama31", "qk_layernorm", True),
        ("qwen3_moe", "moe_shared_expert_intermediate_size", 48),
        ("qwen3_moe", "moe_router_score_function", "sigmoid"),
        ("deepseek_v3", "moe_router_enable_expert_bias", False),
        ("gpt_oss", "softmax_type", "vanilla"),
        ("gpt_oss", "glu_linear_offset", 0.0),
        ("qwen25_tied", "activation_func", "torch.nn.functional.gelu"),
    ],
)
def test_what_no_config_of_the_family_says_is_refused(kind, field, value):
    fields, tensors = fields_of(kind)
    with pytest.raises(DataError, match=f"{field} is .*, but a .* model has"):
        described_model(Described({**fields, field: value}, WHERE), tensors)


def test_tensors_of_no_family():
    fields, _ = fields_of("llama31")
    tensors = {"decoder.layers.mixer.in_proj.weight": TensorInfo((2, 3, 4))}
    with pytest.raises(DataError, match="the tensors are of none of the families"):
        described_model(Described(fields, WHERE), tensors)


def test_tensors_of_two_families_are_asked_for():
    """No family is guessed where the names fit two of them as well, whichever names are there."""
    fields, _ = fields_of("llama31")
    every = sorted(set().union(*map(_kinds_of, FAMILIES)))
    ties = 0
    for count in range(1, 5):
        for names in itertools.combinations(every, count):
            found = sorted((_likeness(frozenset(names), _kinds_of(name)), name) for name in FAMILIES)
            (second, one), (best, _) = found[-2:]
            if second != best or best < 0.5:
                continue
            ties += 1
            tensors = {f"decoder.layers.{name}": TensorInfo(()) for name in names}
            with pytest.raises(DataError, match=rf"as much of .*{one}.*; give the model's config.json"):
                described_model(Described(fields, WHERE), tensors)
    assert ties


LOOP: list[object] = []
LOOP.append(LOOP)
MANY: list[object] = [0]
for _ in range(40):
    MANY = [MANY, MANY]


ODD = {"loop": LOOP, "many": MANY, "digits": int("f" * 5000, 16), "table": {1: 2}, "bytes": b"x", "set": {1}}
ODD |= {"long": [0] * 20_000, "loop in a list": [LOOP]}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("field", ["normalization", "window_size", "num_layers", "hidden_size", "moe_layer_freq"])
def test_values_that_no_field_has(name, field):
    """In a few bytes a list may hold itself, or the same list 2^40 times: one line says so, at once."""
    fields, tensors = fields_of("deepseek_v3")
    with pytest.raises(DataError) as error:
        described_model(Described({**fields, field: ODD[name], 7: ODD[name]}, WHERE), tensors)
    assert len(str(error.value)) < 500


def test_fields_that_are_no_models():
    fields, tensors = fields_of("deepseek_v3")
    with pytest.raises(DataError, match=r"io\.json is damaged"):
        described_model(Described({**fields, "moe_layer_freq": "x"}, WHERE), tensors)
    with pytest.raises(DataError, match="moe_layer_freq"):
        described_model(Described({**fields, "moe_layer_freq": [1, 0, 1]}, WHERE), tensors)
