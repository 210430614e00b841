"""The heads' loss against its definition, written out plainly over the whole [tokens, vocabulary] tensor."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slipway.training.heads import DecodingHeads, distribution_features, token_losses
from slipway.training.heads_loss import heads_loss

HIDDEN, VOCABULARY, TOKENS = 24, 61, 50


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator),
        "weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "labels": torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
        "counted": torch.rand(TOKENS, generator=generator) < 0.8,
        "drop_if_easy": torch.rand(TOKENS, generator=generator) < 0.6,
    }


def make_heads(**options) -> DecodingHeads:
    torch.manual_seed(11)
    return DecodingHeads(HIDDEN, **options)


def by_definition(temperature: float, top_p: float, logits: list[float], label: int) -> float:
    """One token's loss in plain Python floats, line by line from the paper's formulas."""

    def softmax(values):
        top = max(values)
        powers = [math.exp(v - top) for v in values]
        return [p / sum(powers) for p in powers]

    p = softmax([x / temperature for x in logits])
    temperature_loss = -p[label] * math.log(p[label])
    order = sorted(range(len(p)), key=lambda i: -p[i])
    mass, kept = 0.0, {}
    for i in order:
        mass += p[i]
        kept[i] = p[i] * math.exp(-30 * max(0.0, mass - top_p))
    q = kept[label] / (sum(kept.values()) + 1e-9)
    return temperature_loss - softmax(logits)[label] * math.log(q + 1e-9)


def test_token_losses_are_the_definition():
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(20, 9, generator=generator)
    temperature = 0.2 + 1.6 * torch.rand(20, generator=generator)
    top_p = torch.rand(20, generator=generator)
    labels = torch.randint(0, 9, (20,), generator=generator)
    found = token_losses(temperature, top_p, logits, labels)
    rows = zip(temperature.tolist(), top_p.tolist(), logits.tolist(), labels.tolist(), strict=True)
    wanted = [by_definition(*row) for row in rows]
    assert torch.allclose(found, torch.tensor(wanted), rtol=2e-4, atol=1e-6)


def naive(heads: DecodingHeads, hidden, weight, labels, counted, drop_if_easy):
    logits = hidden @ weight.T
    keep = counted & ~(drop_if_easy & (logits.argmax(-1) == labels))
    outputs = heads(hidden, lambda temperature: distribution_features(logits, temperature))
    return (token_losses(*outputs, logits, labels) * keep).sum(), keep.sum()


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_neither_loss_nor_gradients(inputs, chunk, enhanced):
    heads = make_heads(use_enhanced_features=enhanced)
    wanted, count = naive(heads, **inputs)
    gradients = torch.autograd.grad(3 * wanted, list(heads.parameters()))
    weight = inputs.pop("weight")
    found, counted = heads_loss(heads, logits_of=lambda h: h @ weight.T, chunk_tokens=chunk, **inputs)
    (3 * found).backward()
    assert counted == count and torch.allclose(found, wanted, rtol=1e-5)
    for parameter, gradient in zip(heads.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm()


def test_the_temperature_head_learns_through_top_p_and_the_features_too(inputs):
    """The published gradient: the top-p loss reaches the temperature, through its distribution and its input."""
    heads = make_heads()
    weight = inputs.pop("weight")
    heads_loss(heads, logits_of=lambda h: h @ weight.T, **inputs)[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads.parameters())


def test_no_more_logits_exist_than_a_chunk_has(inputs):
    weight, sizes = inputs.pop("weight"), []

    def logits_of(hidden):
        sizes.append(len(hidden))
        return hidden @ weight.T

    heads_loss(make_heads(), logits_of=logits_of, chunk_tokens=8, **inputs)
    assert max(sizes) <= 8 and sum(sizes) == inputs["counted"].sum()


def test_nothing_to_learn_is_no_error(inputs):
    weight = inputs.pop("weight")
    inputs["counted"] = torch.zeros(TOKENS, dtype=torch.bool)
    heads = make_heads()
    loss, count = heads_loss(heads, logits_of=lambda h: h @ weight.T, **inputs)
    loss.backward()
    assert loss == 0 and count == 0 and all(not p.grad.any() for p in heads.parameters())


def test_outputs_stay_in_their_ranges(inputs):
    logits = 100 * inputs["hidden"] @ inputs["weight"].T
    temperature, top_p = make_heads()(100 * inputs["hidden"], lambda t: distribution_features(logits, t))
    assert ((temperature >= 0) & (temperature <= 2)).all() and ((top_p >= 0) & (top_p <= 1)).all()


def test_counts_say_the_same_as_the_logits():
    checks = Path(__file__).with_name("counted_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
