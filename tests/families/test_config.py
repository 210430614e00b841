"""One form of config.json, whichever major of transformers wrote it, in whichever place a value stands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, config_of
from slipway.errors import DataError
from slipway.families import understood

WHERE = Path("model/config.json")


def as_5(config: dict[str, Any], *, keep: bool = False) -> dict[str, Any]:
    """As transformers 5 writes it; `keep`: the old fields beside the new one."""
    c = copy.deepcopy(config)
    scaling = c.get("rope_scaling") or {"rope_type": "default"}
    rope = {"rope_type": scaling.get("rope_type") or scaling.get("type"), **scaling}
    if "rope_theta" in c:
        rope["rope_theta"] = c["rope_theta"]
    c |= {"rope_parameters": rope, "dtype": c.get("torch_dtype"), "transformers_version": "5.24.0"}
    if not keep:
        for name in ("rope_scaling", "rope_theta", "torch_dtype"):
            c.pop(name, None)
    return c


def nemo_fields(config: dict[str, Any]) -> Any:
    family, c = understood(config, WHERE)
    return family.nemo_model(c)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [False, True], ids=["new place", "both places"])
def test_every_place_gives_the_same_model(kind, keep):
    config = config_of(kind)
    assert nemo_fields(as_5(config, keep=keep)) == nemo_fields(config)
    _, written = understood(as_5(config, keep=keep), WHERE)
    assert "rope_parameters" not in written and "dtype" not in written  # the form that both majors read
    assert understood(written, WHERE)[1] == written


# (kind, what is added, the two places that must be named)
CONTRADICTIONS = [
    ("qwen3_moe", {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta rope_parameters.rope_theta"),
    ("llama31", {"dtype": "float32"}, "torch_dtype dtype"),
    ("llama31", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling.rope_type rope_parameters.rope_type"),
    ("llama31", {"rope_parameters": {"rope_type": "default"}}, "rope_scaling.rope_type rope_parameters.rope_type"),
    ("llama31", {"rope_parameters": {"factor": 4.0}}, "rope_scaling.factor rope_parameters.factor"),
    ("qwen3_moe", {"num_local_experts": 8}, "num_experts num_local_experts"),
    ("deepseek_v3", {"num_mtp_layers": 2}, "num_nextn_predict_layers num_mtp_layers"),
    (
        "llama31",
        {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0},
        "partial_rotary_factor rope_parameters.partial_rotary_factor",
    ),
]


@pytest.mark.parametrize("kind, changes, named", CONTRADICTIONS)
def test_a_contradiction_names_both_places(kind, changes, named):
    with pytest.raises(DataError) as error:
        understood({**config_of(kind), **changes}, WHERE)
    assert all(f"{name} is " in str(error.value) for name in named.split()) and "\n" not in str(error.value)


def test_a_table_for_each_kind_of_layer_is_read_where_they_are_the_same():
    c = as_5(config_of("gpt_oss"))
    one = c["rope_parameters"]
    nested = {"full_attention": one, "sliding_attention": dict(one)}
    assert nemo_fields({**c, "rope_parameters": nested}) == nemo_fields(c)
    nested["sliding_attention"] = {**one, "rope_theta": 10000}
    with pytest.raises(DataError, match="differs between full_attention and sliding_attention"):
        understood({**c, "rope_parameters": nested}, WHERE)


@pytest.mark.parametrize("kind", ["llama3", "qwen25_tied", "qwen3_dense", "qwen3_moe", "deepseek_v3_plain_rope"])
@pytest.mark.parametrize("form", [{"rope_type": "default"}, {"type": "default"}, None])
def test_the_type_default_means_no_scaling(kind, form):
    assert nemo_fields({**config_of(kind), "rope_scaling": form}) == nemo_fields(config_of(kind))


def test_what_transformers_assumes_is_assumed():
    config = config_of("llama2")
    assert not {"rope_theta", "num_key_value_heads"} & config.keys()
    _, c = understood(config, WHERE)
    assert (c["rope_theta"], c["num_key_value_heads"]) == (10000.0, config["num_attention_heads"])


@pytest.mark.parametrize("kind, value", [("llama31", 3565775107.26), ("qwen25_tied", 1e9), ("llama31", 5000000000)])
def test_a_large_base_of_rotary_positions_is_legal(kind, value):
    assert nemo_fields({**config_of(kind), "rope_theta": value})[2]["rotary_base"] == value


def test_an_unknown_field_that_is_off_is_no_matter():
    config = config_of("llama31")
    off = {"some_softcap": None, "use_something": False, "list_of_nothing": [], "table_of_nothing": {}}
    assert nemo_fields({**config, **off}) == nemo_fields(config)
