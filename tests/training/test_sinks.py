"""Packed samples with sinks: what a flash attention without sinks gives, and its derivatives, come to those with them.

The kernel runs on GPUs alone. Here its place is taken by the same formulas in plain torch.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from slipway.errors import PreflightError
from slipway.training import sinks
from slipway.training.sinks import UNLIMITED, SinkAttention
from torch import Tensor

HEADS, GROUPS, SIZE = 4, 2, 8
BOUNDS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
SCALE = 0.4


def hidden(window: int) -> Tensor:
    """True where a token must not see another: later ones, those of other samples, those beyond the window."""
    sample = torch.repeat_interleave(torch.arange(3), BOUNDS.diff())
    place = torch.arange(len(sample))
    behind = place[:, None] - place[None, :]
    seen = (behind >= 0) & (sample[:, None] == sample[None, :])
    return ~(seen & (behind <= window) if window != UNLIMITED else seen)


def scores(query: Tensor, key: Tensor, window: int) -> Tensor:
    """[heads, T, T]"""
    key = key.repeat_interleave(HEADS // GROUPS, 1)
    return (torch.einsum("qhd,khd->hqk", query, key) * SCALE).masked_fill(hidden(window), -torch.inf)


def plain_forward(query, key, value, bounds, longest, scale, window):
    assert (longest, scale) == (11, SCALE)
    found = scores(query, key, window)
    value = value.repeat_interleave(HEADS // GROUPS, 1)
    return torch.einsum("hqk,khd->qhd", found.softmax(-1), value), found.logsumexp(-1)


def plain_backward(gradient, query, key, value, found, sums, bounds, longest, scale, window, state):
    """As the kernel: weights from the scores and the given sums, and the output's part in their derivative."""
    weights = (scores(query, key, window) - sums.unsqueeze(-1)).exp()
    wide = [part.repeat_interleave(HEADS // GROUPS, 1) for part in (key, value)]
    of_weights = torch.einsum("qhd,khd->hqk", gradient, wide[1])
    of_scores = weights * (of_weights - (gradient * found).sum(-1).T.unsqueeze(-1)) * SCALE
    of_query = torch.einsum("hqk,khd->qhd", of_scores, wide[0])
    of_key = torch.einsum("hqk,qhd->khd", of_scores, query)
    of_value = torch.einsum("hqk,qhd->khd", weights, gradient)
    return of_query, *(part.unflatten(1, (GROUPS, -1)).sum(2) for part in (of_key, of_value))


def defined(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, window: int) -> Tensor:
    """A sink is a column of the scores that is dropped after the softmax, as in transformers."""
    both = torch.cat([scores(query, key, window), sinks[:, None, None].expand(-1, len(query), 1)], -1)
    value = value.repeat_interleave(HEADS // GROUPS, 1)
    return torch.einsum("hqk,khd->qhd", both.softmax(-1)[..., :-1], value)


@pytest.mark.parametrize("window", [UNLIMITED, 3])
def test_output_and_gradients_are_those_of_the_definition(window, monkeypatch):
    monkeypatch.setattr(sinks, "forward_without_sinks", plain_forward)
    monkeypatch.setattr(sinks, "backward_from_sums", plain_backward)
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, HEADS, SIZE), (17, GROUPS, SIZE), (17, GROUPS, SIZE), (HEADS,), (17, HEADS, SIZE)]
    *inputs, gradient = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    results = []
    for attend in (
        lambda *given: SinkAttention.apply(*given, BOUNDS, 11, SCALE, window),
        lambda *given: defined(*given, window),
    ):
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        out = attend(*given)
        results.append([out, *torch.autograd.grad(out, given, gradient)])
    for ours, theirs in zip(*results, strict=True):
        # The sinks count in float32, whatever the model's type is.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_dropout_is_refused_where_it_would_be_left_out():
    attend = sinks._packed_with_sinks(lambda *_, **__: "as upstream")
    layer = SimpleNamespace(softmax_type="learnable", attention_dropout=0.1)
    packed = SimpleNamespace(cu_seqlens_q=BOUNDS)
    with pytest.raises(PreflightError, match=r"attention_dropout of 0\.1.*--pack=false"):
        attend(layer, *torch.zeros(3, 1), packed_seq_params=packed)
    assert attend(layer, *torch.zeros(3, 1)) == "as upstream", "samples that are not packed"
