"""The heads and their loss for any shape in front of the last dimension, and which code computes them."""

from __future__ import annotations

import sys
import types

import torch
from slipway.training import heads_loss
from slipway.training.heads import DecodingHeads, Head, Rows, distribution_features, token_losses

HIDDEN, VOCABULARY = 24, 61


def test_two_dimensions_in_front_are_as_one():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 5, HIDDEN, generator=generator)
    logits = torch.randn(2, 5, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    torch.manual_seed(11)
    assert Head(HIDDEN)(hidden).shape == (2, 5)
    heads = DecodingHeads(HIDDEN)
    temperature, top_p = heads(hidden, lambda t: distribution_features(logits, t))
    flat = heads(hidden.flatten(0, 1), lambda t: distribution_features(logits.flatten(0, 1), t))
    assert torch.allclose(temperature.flatten(), flat[0]) and torch.allclose(top_p.flatten(), flat[1])
    losses = token_losses(temperature, top_p, logits, labels)
    assert losses.shape == (2, 5)
    assert torch.allclose(losses.flatten(), token_losses(*flat, logits.flatten(0, 1), labels.flatten()))
    rows = Rows(logits, labels)
    assert torch.equal(rows.is_easy.flatten(), Rows(logits.flatten(0, 1), labels.flatten()).is_easy)
    assert torch.equal(rows.losses(temperature, top_p), losses)


def test_counts_are_used_for_bfloat16_on_a_gpu_alone(monkeypatch):
    counted = types.ModuleType("counted")
    counted.CountedRows = lambda logits, labels: ("counted", logits, labels)
    monkeypatch.setitem(sys.modules, "slipway.training.counted", counted)
    labels = torch.tensor([1])
    for dtype in (torch.bfloat16, torch.float32):
        assert isinstance(heads_loss.rows_of(torch.zeros(1, 3, dtype=dtype), labels), Rows)
    on_gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert heads_loss.rows_of(on_gpu, labels) == ("counted", on_gpu, labels)
    wide = torch.zeros(1, 3).as_subclass(type("OnGpu", (torch.Tensor,), {"is_cuda": True}))
    assert isinstance(heads_loss.rows_of(wide, labels), Rows)
