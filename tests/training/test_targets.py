"""Names of modules that get an adapter, as Megatron, Hugging Face and peft write them."""

from __future__ import annotations

import pytest
from conftest import config_of
from slipway.errors import UsageError
from slipway.training.targets import modules_of, resolved

DENSE = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LATENT = ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]


@pytest.mark.parametrize(
    "kind, modules",
    [
        ("llama31", DENSE),
        ("qwen3_moe", DENSE),
        ("gpt_oss", DENSE),
        ("deepseek_v3", [*LATENT, "linear_fc1", "linear_fc2"]),
        ("moonlight", ["linear_q_proj", *LATENT[2:], "linear_fc1", "linear_fc2"]),
    ],
)
def test_all_linear_is_every_linear_layer_of_the_family(kind, modules):
    assert sorted(modules_of(config_of(kind))) == sorted(modules)
    assert sorted(resolved("all-linear", config_of(kind))[0].split(",")) == sorted(modules)


@pytest.mark.parametrize(
    "kind, words, modules",
    [
        ("llama31", "q_proj,k_proj,v_proj,o_proj", "linear_qkv,linear_proj"),
        ("llama31", "gate_proj, up_proj, down_proj", "linear_fc1,linear_fc2"),
        ("llama31", "linear_qkv,o_proj", "linear_qkv,linear_proj"),
        ("gpt_oss", "gate_up_proj,down_proj", "linear_fc1,linear_fc2"),
        ("deepseek_v3", "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj", ",".join(LATENT)),
        ("moonlight", "q_proj", "linear_q_proj"),
    ],
)
def test_names_of_hugging_face_are_understood(kind, words, modules):
    found, notes = resolved(words, config_of(kind))
    assert found == modules and notes == []


def test_a_part_of_a_fused_module_is_said():
    found, notes = resolved("q_proj,v_proj", config_of("llama31"))
    assert found == "linear_qkv" and notes == [
        "linear_qkv also holds k_proj, so the adapter of linear_qkv is for these too"
    ]


@pytest.mark.parametrize(
    "kind, words, said",
    [
        ("llama31", "q_prj", "did you mean q_proj?"),
        ("llama31", "kv_b_proj", "the model has no module 'kv_b_proj'"),
        ("deepseek_v3", "q_proj", "the model has no module 'q_proj'"),
        ("llama31", "", "the model has no module ''"),
        ("llama31", "linear_qkv,", "the model has no module ''"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_those_there_are(kind, words, said):
    with pytest.raises(UsageError) as error:
        resolved(words, config_of(kind))
    assert said in str(error.value) and "linear_proj" in str(error.value) and "all-linear" in str(error.value)
