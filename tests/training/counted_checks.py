"""The heads' loss from counts against its definition in float64, its kernels run by Triton's interpreter.

Run by test_heads.py in a process of its own: Triton must be told before it is imported.
"""

from __future__ import annotations

import pytest
import torch
from slipway.training.counted import CountedRows
from slipway.training.heads import Rows

VOCABULARY = 3000


def some_logits(kind: str, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17)
    logits = torch.randn(tokens, VOCABULARY, generator=generator)
    if kind == "sharp":  # a real model's: a few tokens hold nearly everything
        logits = 2 * logits
        logits[:, 100:108] += 12
    if kind == "ties":  # whole runs of equal logits, at the top too
        logits = logits.round()
        logits[:, :3] = 9
    return (logits.double() * (0.01 if kind == "flat" else 1)).bfloat16()


@pytest.mark.parametrize("kind", ["wide", "sharp", "ties", "flat"])
def test_counts_give_the_definition_and_its_derivatives(kind):
    tokens = 24
    logits = some_logits(kind, tokens)
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 110, (tokens,), generator=generator)
    temperature = 0.1 + 1.8 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    top_p = 0.02 + 0.97 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    weights = torch.rand(4, generator=generator, dtype=torch.float64)

    def evaluate(rows, dtype):
        t, p = (part.to(dtype).requires_grad_() for part in (temperature, top_p))
        features = rows.features(t)
        slope_of_features = torch.autograd.grad((features * weights.to(dtype)).sum(), t)[0]
        losses = rows.losses(t, p)
        slopes = torch.autograd.grad(losses.sum(), (t, p))
        return [part.double() for part in (features, slope_of_features, losses, *slopes)]

    definition = Rows(logits, labels)
    definition.logits = logits.double()
    found = evaluate(CountedRows(logits, labels), torch.float32)
    for part, wanted in zip(found, evaluate(definition, torch.float64), strict=True):
        assert (part - wanted).norm() <= 2e-4 * wanted.norm()
    assert torch.equal(CountedRows(logits, labels).is_easy, definition.is_easy)


def test_a_logit_that_is_no_number_makes_no_loss():
    logits = some_logits("wide", 3)
    logits[1, 5], logits[2, 7] = float("nan"), float("inf")
    rows = CountedRows(logits, torch.tensor([1, 2, 3]))
    losses = rows.losses(torch.ones(3), torch.full((3,), 0.5))
    assert losses.isnan().tolist() == [False, True, True]
