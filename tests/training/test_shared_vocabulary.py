"""The heads' loss where two ranks share the vocabulary: what one process computes, on each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slipway.training.heads import DecodingHeads
from slipway.training.heads_loss import heads_loss

HIDDEN, VOCABULARY, TOKENS, RANKS = 24, 62, 51, 2  # an odd number of tokens: the ranks' shares differ


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator),
        "labels": torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
        "counted": torch.rand(TOKENS, generator=generator) < 0.8,
        "drop_if_easy": torch.rand(TOKENS, generator=generator) < 0.6,
    }


def weight() -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(4))


def learned(part: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Loss, number of tokens and gradients, from a part of the output layer."""
    torch.manual_seed(11)
    heads = DecodingHeads(HIDDEN)
    loss, count = heads_loss(heads, logits_of=lambda h: h @ part.T, chunk_tokens=9, group=group, **inputs())
    loss.backward()
    return [loss.detach(), count, *(parameter.grad for parameter in heads.parameters())]


def rank_of(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    part = weight().chunk(RANKS)[rank]
    torch.save(learned(part, torch.distributed.group.WORLD), folder / f"{rank}.pt")
    torch.distributed.barrier()  # a rank whose partner is gone is aborted
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[list[torch.Tensor]]:
    """What each rank has learned."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_of, (folder,), nprocs=RANKS)  # no forks: other tests leave a process group here
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_the_loss_of_a_shared_vocabulary_is_that_of_the_whole(ranks):
    wanted = learned(weight())
    for found in ranks:
        assert found[1] == wanted[1]
        for part, whole in zip(found, wanted, strict=True):
            assert torch.allclose(part, whole, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(*ranks, strict=True)), "the ranks stay the same"


def test_the_features_are_used_by_default():
    assert DecodingHeads(HIDDEN).use_enhanced_features
    assert not DecodingHeads(HIDDEN, use_enhanced_features=False).use_enhanced_features
