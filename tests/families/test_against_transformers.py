"""What transformers' own classes say of the same config.json: the tensors' names and shapes, and YaRN's factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, config_of
from slipway.families import rope, understood
from slipway.families.mtp import without_mtp

WHERE = Path("model/config.json")


def config_class(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    known = {"kimi_k2": "deepseek_v3"}  # whose class Kimi's own code copies
    return AutoConfig.for_model(**{**config, "model_type": known.get(config["model_type"], config["model_type"])})


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_are_those_of_transformers(kind):
    from transformers import AutoModelForCausalLM

    family, c = understood(config_of(kind), WHERE)
    found = {name: info.shape for name, info in family.rules(without_mtp(c)).hf.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_class(config_of(kind)))
    wanted = {name: tuple(part.shape) for name, part in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert found == wanted


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"factor": 1.0}, {"factor": 0.5}, {"factor": 40.0}, {"attention_factor": 0.7}, {"attention_factor": 1},
        {"mscale": 0.707}, {"mscale_all_dim": 0.5}, {"mscale": 0.707, "mscale_all_dim": 0.5},
        {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 0.5, "attention_factor": 1.3},
    ],
)  # fmt: skip
def test_yarns_factor_is_that_of_transformers(changes):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**YARN, **changes}
    config = config_class(config_of("deepseek_v3", rope_scaling=scaling))
    wanted = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1]
    assert rope.attention_factor(scaling) == pytest.approx(wanted)
