"""Which samples share a sequence where nobody says so, and how much of a micro batch is computed."""

from __future__ import annotations

import pytest
import torch
from slipway.families import FAMILIES
from slipway.training.recipe import Recipe
from slipway.training.samples import computed_positions, share_of_samples

LLAMA, GPT_OSS = (FAMILIES[family].tiny_config() for family in ("llama31", "gpt_oss"))


def decided(config=LLAMA, data="d.jsonl", **values):
    return Recipe("m", data, "o", **values).should_pack(config)


@pytest.mark.parametrize("mode", ["sft", "lora"])
def test_samples_are_packed_where_nothing_is_against_it(mode):
    assert decided(mode=mode) == (True, "")
    assert decided(mode=mode, micro_batch_size=2) == (True, "")
    assert decided(GPT_OSS, mode=mode) == (True, "")
    assert decided(mode=mode, context_parallel_size=2) == (True, "")


@pytest.mark.parametrize("mode", ["heads", "pretrain"])
def test_other_modes_are_as_they_were(mode):
    assert decided(mode=mode) == (False, "")


def test_full_sequences_are_not_worth_a_word():
    assert decided(mode="lora", data="web.bin") == (False, "")


@pytest.mark.parametrize(
    "config, values, said",
    [
        (FAMILIES["deepseek_v3"].tiny_config(), {"mode": "sft"}, "MTP layer"),
        (None, {"mode": "sft"}, "config.json"),
    ],
)
def test_why_not_is_said(config, values, said):
    packs, problem = decided(config, **values)
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_ranks_share_each_packed_sample(ranks):
    """Each has an early part of every sample and the late one that makes up for it, as Transformer Engine wants it."""
    bounds = torch.tensor([0, 2 * ranks, 8 * ranks, 12 * ranks], dtype=torch.int32)
    shares = [share_of_samples(bounds, ranks, rank) for rank in range(ranks)]
    assert torch.equal(torch.stack(shares).sum(0), torch.ones(12 * ranks, dtype=torch.int64))
    for rank, share in enumerate(shares):
        expected = []
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            size = (end - start) // (2 * ranks)
            expected += range(start + rank * size, start + (rank + 1) * size)
            expected += range(end - (rank + 1) * size, end - rank * size)
        assert share.nonzero().flatten().tolist() == expected
