"""Which way tokens go to the experts of other ranks. That both ways train the same is in test_parallel.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from slipway.tokens.lines import as_line
from slipway.tokens.scan import scan
from slipway.training.preflight import index_file
from slipway.training.recipe import Recipe
from slipway.training.worker import has_equal_lengths


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
    config = SimpleNamespace(variable_seq_lengths=False, moe_token_dispatcher_type="allgather")
    vars(config).update({name: changes.get(name, value) for name, value in values.items()})
    recipe = Recipe("m", "d", "o", expert_parallel_size=changes.get("expert_parallel_size", 2))
    from slipway.training.dispatch import choose_dispatcher

    choose_dispatcher(config, recipe, changes.get("equally_long", True))
    assert config.moe_token_dispatcher_type == chosen


def test_stages_that_tell_each_other_lengths_need_the_usual_way():
    """Megatron refuses its own default there, of a model without experts too."""
    config = SimpleNamespace(variable_seq_lengths=True, moe_token_dispatcher_type="allgather", num_moe_experts=None)
    from slipway.training.dispatch import choose_dispatcher

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
    assert has_equal_lengths(recipe, tmp_path) is expected


def test_the_ranks_send_the_precision_of_the_model(monkeypatch):
    """Megatron's own dispatcher sends float32 back. If this fails, upstream has repaired it."""
    from megatron.core.transformer.moe import token_dispatcher
    from slipway.training import dispatch

    sent = []
    for module in (token_dispatcher, dispatch):
        name = "reduce_scatter_to_sequence_parallel_region"
        monkeypatch.setattr(module, name, lambda rows, group: sent.append(rows.dtype) or rows)
    ranks = SimpleNamespace(tp_size=1, ep_size=2, tp_ep_group=None, local_probs=torch.ones(2), _shared=None)
    for dispatcher in (token_dispatcher.MoEAllGatherTokenDispatcher, dispatch.Dispatcher):
        dispatcher.token_combine(ranks, torch.ones(2, 3, dtype=torch.bfloat16))
    assert sent == [torch.float32, torch.bfloat16]
