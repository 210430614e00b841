"""Tokens between GPUs that read and write each other's memory, by Triton's interpreter: two ranks in one process.

tests/image-gpu/exchange does the same between GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

# Both ranks' memory is this process's, and no rank waits for the other: what it waits for is done before.
TWO_RANKS = """
import torch
from slipway.training.exchange_gpu import Places, Shared

RANKS, EXPERTS = 2, 3  # of each rank

class InOneProcess(Shared):
    def __init__(self, rank, tokens, width, made):
        self.size, self.ranks, self.rank = tokens * width, RANKS, rank
        self._own = made[rank]
        self._is_read = self._is_summed = False
        starts = [one.data_ptr() for one in made]
        self.sent = torch.tensor(starts)
        self.made = torch.tensor(starts) + (1 + rank) * self.size * made[rank].element_size()

    def wait(self):
        self._is_read = self._is_summed = False

def rows_of(chosen):
    # As Transformer Engine's make_row_id_map lays them out.
    numbers = torch.full(chosen.shape[::-1], -1)
    numbers[chosen.t()] = torch.arange(int(chosen.sum()))
    rows, experts = numbers.t().sort(1, descending=True)
    return torch.cat([rows, experts, chosen.sum(1, keepdim=True)], 1).int()

def check(tokens, width, room):
    chosen = torch.rand(RANKS * tokens, RANKS * EXPERTS) < 0.4
    chosen[0] = False  # a token without any expert
    probs = torch.rand(chosen.shape)
    hidden = torch.randn(RANKS, tokens, width)
    made = [torch.full(((1 + RANKS) * room * width,), float("nan")) for _ in range(RANKS)]
    shared = [InOneProcess(rank, room, width, made) for rank in range(RANKS)]
    of_rank = [slice(rank * EXPERTS, (rank + 1) * EXPERTS) for rank in range(RANKS)]
    places = []
    for rank, mine in enumerate(of_rank):
        local = chosen[:, mine]
        places.append(Places(shared[rank], rows_of(local), int(local.sum()), tokens))
        shared[rank].send(hidden[rank])
    expected = torch.zeros(RANKS * tokens, width)
    results = []
    for rank, mine in enumerate(of_rank):
        local = chosen[:, mine]
        rows, of_rows = places[rank].spread(hidden[rank], probs[:, mine].contiguous())
        experts, of_tokens = local.t().nonzero().t()
        assert torch.equal(rows, hidden.flatten(0, 1)[of_tokens])
        assert torch.equal(of_rows, probs[:, mine].t()[local.t()])
        assert torch.equal(places[rank].of_tokens(of_rows), probs[:, mine] * local)
        results.append(rows * (1 + experts[:, None] + 10 * rank))
        expected.index_add_(0, of_tokens, results[-1])
    for _ in range(2):  # a rank's sums are right once all have written, in the second round
        sums = [places[rank].collect(results[rank]) for rank in range(RANKS)]
    torch.testing.assert_close(torch.cat(sums), expected)

torch.manual_seed(0)
check(tokens=5, width=1030, room=5)
check(tokens=4, width=16, room=7)
print("equal")
"""


def test_kernels_read_and_write_the_memory_of_all_ranks():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWO_RANKS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


class Waiting:
    """Shared memory that notes when its rank waits."""

    def __init__(self) -> None:
        from slipway.training.exchange_gpu import Shared

        self.waits = 0
        self._handle = SimpleNamespace(barrier=lambda channel, timeout: setattr(self, "waits", self.waits + 1))
        self._own, self.size = torch.zeros(8), 8
        self._is_read = self._is_summed = False
        self.send, self.wait = Shared.send.__get__(self), Shared.wait.__get__(self)
        self.begin_to_make = Shared.begin_to_make.__get__(self)


def test_nothing_is_written_where_another_rank_may_still_read():
    """What is sent lies there until all have waited once more: two sends in a row, as in a backward pass of a layer
    whose input needs no gradient, wait between them."""
    shared = Waiting()
    shared.send(torch.ones(2, 4))
    assert shared.waits == 1
    shared.wait()  # what `collect` ends with
    shared.send(torch.ones(2, 4))
    assert shared.waits == 3
    shared.send(torch.ones(2, 4))
    assert shared.waits == 5


def test_nothing_is_made_where_another_rank_may_still_add_up():
    """As a send waits after every sum, this costs nothing between a send and a sum."""
    shared = Waiting()
    shared.begin_to_make()
    assert shared.waits == 0
    shared._is_summed = True  # as `summed` leaves it
    shared.begin_to_make()
    assert shared.waits == 1
    shared._is_summed = True
    shared.send(torch.ones(2, 4))
    shared.begin_to_make()
    assert shared.waits == 2


@pytest.mark.parametrize("ranks, of_node, expected", [([0, 1], 2, True), ([1, 2], 2, False), ([4, 5, 6, 7], 4, True)])
def test_memory_is_shared_inside_one_node_alone(monkeypatch, ranks, of_node, expected):
    from slipway.training import exchange_gpu

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_node))
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: ranks)
    assert exchange_gpu.is_on_one_node(object()) is expected


def test_without_it_the_ranks_agree_on_nccl(monkeypatch, capsys):
    """One rank that cannot reach another's memory is enough, and says so."""
    from slipway.training import exchange_gpu

    def refused(*_: object) -> None:
        raise RuntimeError("peer access is not supported\nmore")

    monkeypatch.setattr(exchange_gpu, "is_on_one_node", lambda group: True)
    monkeypatch.setattr(exchange_gpu, "Shared", refused)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda failed, group: None)
    assert exchange_gpu.share(object(), torch.ones(2, 4)) is None
    assert "(peer access is not supported): NCCL brings the tokens" in capsys.readouterr().err
    full = RuntimeError("CUDA driver error: out of memory")
    monkeypatch.setattr(exchange_gpu, "Shared", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange_gpu.share(object(), torch.ones(2, 4))
    monkeypatch.setattr(exchange_gpu, "Shared", lambda *_: "shared")
    assert exchange_gpu.share(object(), torch.ones(2, 4)) == "shared"
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda failed, group: failed.fill_(1))
    assert exchange_gpu.share(object(), torch.ones(2, 4)) is None
