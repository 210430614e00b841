"""Which way tokens go to the experts of other ranks. That both ways train the same is in test_parallel.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from slipway.tokens.lines import as_line
from slipway.tokens.scan import scan
from slipway.training import patches
from slipway.training.dispatch import choose_dispatcher
from slipway.training.preflight import index_file
from slipway.training.recipe import Recipe
from slipway.training.worker import equally_long


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    from slipway.training import cpu

    cpu.enable()


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({}, "allgather"),
        ({"expert_parallel_size": 4}, "allgather"),
        ({"expert_parallel_size": 8}, "alltoall"),  # more than a token has experts
        ({"expert_parallel_size": 1}, "alltoall"),
        ({"equally_long": False}, "alltoall"),
        ({"moe_shared_expert_overlap": True}, "alltoall"),
        ({"num_moe_experts": None}, "alltoall"),
    ],
)
def test_every_token_goes_to_all_ranks_where_that_is_less(changes, chosen):
    values = {"num_moe_experts": 32, "moe_router_topk": 4, "moe_shared_expert_overlap": False}
    config = SimpleNamespace(variable_seq_lengths=False, moe_token_dispatcher_type="alltoall")
    vars(config).update({name: changes.get(name, value) for name, value in values.items()})
    recipe = Recipe("m", "d", "o", expert_parallel_size=changes.get("expert_parallel_size", 2))
    choose_dispatcher(config, recipe, changes.get("equally_long", True))
    assert config.moe_token_dispatcher_type == chosen


def test_stages_that_tell_each_other_lengths_need_the_usual_way():
    """Megatron refuses its own default there, of a model without experts too."""
    config = SimpleNamespace(variable_seq_lengths=True, moe_token_dispatcher_type="allgather", num_moe_experts=None)
    choose_dispatcher(config, Recipe("m", "d", "o", pipeline_parallel_size=2), False)
    assert config.moe_token_dispatcher_type == "alltoall"


@pytest.mark.parametrize(
    "lengths, pack, expected",
    [
        ([300, 9], False, False),
        ([300, 9], True, True),
        ([300, 260], False, True),  # both compute 384
        ([513, 513], False, True),
        ([513, 100], False, False),
    ],
)
def test_micro_batches_are_equally_long(tmp_path, lengths, pack, expected):
    (tmp_path / "data.jsonl").write_bytes(b"".join(as_line([], [5] * length) for length in lengths))
    recipe = Recipe("m", str(tmp_path / "data.jsonl"), "o", seq_length=512, pack=pack)
    scan(tmp_path / "data.jsonl", 514, 512).save(index_file(tmp_path, "train", 0))
    assert equally_long(recipe, tmp_path) is expected


def test_what_the_ranks_add_up_has_the_precision_of_the_model(monkeypatch):
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
    from slipway.training.dispatch import _in_its_own_precision

    sent = []
    monkeypatch.setattr(
        token_dispatcher, "reduce_scatter_to_sequence_parallel_region", lambda rows, group: sent.append(rows) or rows
    )
    hidden = torch.ones(2, 3, dtype=torch.bfloat16)

    def dispatcher() -> SimpleNamespace:
        return SimpleNamespace(tp_size=1, ep_size=2, tp_ep_group=None, local_probs=torch.ones(2))

    upstream = MoEAllGatherTokenDispatcher.token_combine
    patch = patches.APPLIED.get(f"{token_dispatcher.__name__}.MoEAllGatherTokenDispatcher.token_combine")
    upstream = patch.before if patch else upstream
    for combine in (upstream, _in_its_own_precision(upstream)):
        assert torch.equal(combine(dispatcher(), hidden), hidden)
    assert [rows.dtype for rows in sent] == [torch.float32, torch.bfloat16]
