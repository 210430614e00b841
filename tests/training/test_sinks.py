"""Packed samples with sinks: what a flash attention without sinks gives, and its derivatives, come to those with them.

The kernel runs on GPUs alone. Here its place is taken by the same formulas in plain torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slipway.errors import PreflightError
from slipway.training import sinks
from slipway.training.samples import share_of_samples
from slipway.training.sinks import UNLIMITED, SinkAttention, attend_by_heads
from torch import Tensor

HEADS, GROUPS, SIZE = 4, 2, 8
BOUNDS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
SCALE = 0.4
WINDOWS = [UNLIMITED, 3]


def hidden(bounds: Tensor, window: int) -> Tensor:
    """True where a token must not see another: later ones, those of other samples, those beyond the window."""
    sample = torch.repeat_interleave(torch.arange(3), bounds.diff())
    place = torch.arange(len(sample))
    behind = place[:, None] - place[None, :]
    seen = (behind >= 0) & (sample[:, None] == sample[None, :])
    return ~(seen & (behind <= window) if window != UNLIMITED else seen)


def for_each_head(of_groups: Tensor, query: Tensor) -> Tensor:
    return of_groups.repeat_interleave(query.size(1) // of_groups.size(1), 1)


def scores(query: Tensor, key: Tensor, bounds: Tensor, window: int, scale: float = SCALE) -> Tensor:
    """[heads, T, T]"""
    return (torch.einsum("qhd,khd->hqk", query, for_each_head(key, query)) * scale).masked_fill(
        hidden(bounds, window), -torch.inf
    )


def plain_forward(query, key, value, bounds, longest, scale, window):
    assert longest == int(bounds.diff().max())
    found = scores(query, key, bounds, window, scale)
    return torch.einsum("hqk,khd->qhd", found.softmax(-1), for_each_head(value, query)), found.logsumexp(-1)


def plain_backward(gradient, query, key, value, found, sums, bounds, longest, scale, window, state):
    """As the kernel: weights from the scores and the given sums, and the output's part in their derivative."""
    weights = (scores(query, key, bounds, window, scale) - sums.unsqueeze(-1)).exp()
    of_weights = torch.einsum("qhd,khd->hqk", gradient, for_each_head(value, query))
    of_scores = weights * (of_weights - (gradient * found).sum(-1).T.unsqueeze(-1)) * scale
    of_query = torch.einsum("hqk,khd->qhd", of_scores, for_each_head(key, query))
    of_key = torch.einsum("hqk,qhd->khd", of_scores, query)
    of_value = torch.einsum("hqk,qhd->khd", weights, gradient)
    return of_query, *(part.unflatten(1, (key.size(1), -1)).sum(2) for part in (of_key, of_value))


def defined(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, window: int) -> Tensor:
    """A sink is a column of the scores that is dropped after the softmax, as in transformers."""
    both = torch.cat([scores(query, key, bounds, window), sinks[:, None, None].expand(-1, len(query), 1)], -1)
    value = for_each_head(value, query)
    return torch.einsum("hqk,khd->qhd", both.softmax(-1)[..., :-1], value)


def made(tokens: int) -> list[Tensor]:
    """Query, key, value, sinks, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS, SIZE), *2 * [(tokens, GROUPS, SIZE)], (HEADS,), (tokens, HEADS, SIZE)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def learned(attend: Callable[..., Tensor], tensors: list[Tensor], *more: Any, **named: Any) -> list[Tensor]:
    """The output, and the gradients of all but the last tensor, which is the output's."""
    *inputs, gradient = tensors
    given = [tensor.clone().requires_grad_() for tensor in inputs]
    out = attend(*given, *more, **named)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


@pytest.mark.parametrize("window", WINDOWS)
def test_output_and_gradients_are_those_of_the_definition(window, monkeypatch):
    monkeypatch.setattr(sinks, "forward_without_sinks", plain_forward)
    monkeypatch.setattr(sinks, "backward_from_sums", plain_backward)
    inputs = made(17)
    results = [
        learned(SinkAttention.apply, inputs, BOUNDS, 11, SCALE, window),
        learned(defined, inputs, BOUNDS, window),
    ]
    for ours, theirs in zip(*results, strict=True):
        # The sinks count in float32, whatever the model's type is.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


SHARED = torch.tensor([0, 8, 12, 32], dtype=torch.int32)  # samples that two ranks share: multiples of four
RANKS = 2


def rank_of(rank: int, folder: Path) -> None:
    """Save what a context parallel rank finds for its tokens, for each window."""
    torch.set_num_threads(1)
    sinks.forward_without_sinks, sinks.backward_from_sums = plain_forward, plain_backward
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    mine = share_of_samples(SHARED, RANKS, rank)
    query, key, value, of_sinks, gradient = made(32)
    given = [query[mine], key[mine], value[mine], of_sinks, gradient[mine]]
    group = torch.distributed.group.WORLD
    found = [learned(attend_by_heads, given, SHARED, 20, SCALE, window, group=group) for window in WINDOWS]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()  # a rank whose partner is gone is aborted
    torch.distributed.destroy_process_group()


def test_ranks_that_share_the_tokens_find_what_one_finds(tmp_path):
    torch.multiprocessing.spawn(rank_of, (tmp_path,), nprocs=RANKS)
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for number, window in enumerate(WINDOWS):
        whole = learned(defined, made(32), SHARED, window)
        *of_tokens, of_sinks = zip(*(found[number] for found in by_rank), strict=True)
        for parts, expected in zip(of_tokens, whole[:4], strict=True):
            for rank, part in enumerate(parts):
                mine = share_of_samples(SHARED, RANKS, rank)
                torch.testing.assert_close(part, expected[mine], rtol=1e-5, atol=1e-6)
        # Each rank has the gradient of its heads' sinks, and the ranks add theirs up, as of every weight.
        torch.testing.assert_close(sum(of_sinks), whole[4], rtol=1e-5, atol=1e-6)
        assert all((part == 0).sum() == HEADS // RANKS for part in of_sinks)


def test_a_model_of_which_ranks_have_parts_of_each_sample_is_the_whole_one(tmp_path):
    """With everything that a sample's position decides: sinks, windows, YaRN's angles, packed samples."""
    script = Path(__file__).with_name("sinks_in_parts.py")
    for ranks in (1, RANKS):
        started = [
            subprocess.Popen([sys.executable, script, str(rank), str(ranks), tmp_path], stderr=subprocess.PIPE)
            for rank in range(ranks)
        ]
        for one in started:
            assert one.wait() == 0, one.stderr.read().decode()
    whole, of_whole = torch.load(tmp_path / "1-0.pt")
    total = dict.fromkeys(of_whole, 0)
    for rank in range(RANKS):
        found, gradients = torch.load(tmp_path / f"{RANKS}-{rank}.pt")
        torch.testing.assert_close(found, whole[share_of_samples(SHARED, RANKS, rank)], rtol=1e-4, atol=1e-5)
        assert gradients.keys() == of_whole.keys()
        total = {name: total[name] + gradients[name] for name in total}
    for name, expected in of_whole.items():
        torch.testing.assert_close(total[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_dropout_is_refused_where_it_would_be_left_out():
    from slipway.training import cpu

    cpu.enable()
    attend = sinks._packed_with_sinks(lambda *_, **__: "as upstream")
    layer = SimpleNamespace(softmax_type="learnable", attention_dropout=0.1)
    packed = SimpleNamespace(cu_seqlens_q=BOUNDS)
    with pytest.raises(PreflightError, match=r"attention_dropout of 0\.1.*--pack=false"):
        attend(layer, *torch.zeros(3, 1), packed_seq_params=packed)
    assert attend(layer, *torch.zeros(3, 1)) == "as upstream", "samples that are not packed"
