"""Which samples share a sequence where nobody says so, and how much of a micro batch is computed."""

from __future__ import annotations

import pytest
from slipway.families import FAMILIES
from slipway.training.recipe import Recipe
from slipway.training.samples import computed_positions

LLAMA = FAMILIES["llama31"].tiny_config()


def decided(config=LLAMA, chosen=(), data="d.jsonl", **values):
    return Recipe("m", data, "o", **values).should_pack(config, chosen)


@pytest.mark.parametrize("mode", ["sft", "lora"])
def test_samples_are_packed_where_nothing_is_against_it(mode):
    assert decided(mode=mode) == (True, "")
    assert decided(mode=mode, micro_batch_size=2) == (True, "")  # a recipe's, which nobody asked for


@pytest.mark.parametrize("mode", ["heads", "pretrain"])
def test_other_modes_are_as_they_were(mode):
    assert decided(mode=mode) == (False, "")


def test_full_sequences_are_not_worth_a_word():
    assert decided(mode="lora", data="web.bin") == (False, "")


@pytest.mark.parametrize(
    "config, chosen, values, said",
    [
        (FAMILIES["gpt_oss"].tiny_config(), (), {"mode": "lora"}, "no attention with sinks"),
        (FAMILIES["deepseek_v3"].tiny_config(), (), {"mode": "sft"}, "MTP layer"),
        (LLAMA, ("micro_batch_size",), {"mode": "lora", "micro_batch_size": 2}, "--micro-batch-size 1, not 2"),
        (LLAMA, (), {"mode": "sft", "context_parallel_size": 2}, "--context-parallel-size 1, not 2"),
        (None, (), {"mode": "sft"}, "config.json"),
    ],
)
def test_why_not_is_said(config, chosen, values, said):
    packs, problem = decided(config, chosen, **values)
    assert not packs and said in problem


@pytest.mark.parametrize(
    "longest, seq_length, ranks, expected",
    [
        (1, 4096, 1, 128),
        (128, 4096, 1, 128),
        (129, 4096, 1, 256),
        (4000, 4096, 1, 4096),
        (30, 56, 1, 56),
        (100, 4096, 48, 384),
        (4090, 4095, 2, 4095),
    ],
)
def test_a_micro_batch_is_as_long_as_its_longest_sample(longest, seq_length, ranks, expected):
    assert computed_positions(longest, seq_length, ranks) == expected
