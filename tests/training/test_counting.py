"""Counting the values of logits, against what is seen one by one."""

from __future__ import annotations

import torch
from slipway.training.counting import SMALLEST, VALUES, count


def test_every_value_is_counted_in_descending_order():
    logits = torch.tensor([[1.5, -2.0, 1.5, 0.0, -0.0, 3.0, 1e-9, -1e-9], [2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    found = count(logits.bfloat16(), torch.tensor([2, 0]))
    runs = [[int(n) for n in row[row > 0]] for row in found.counts]
    # 0, -0 and 1e-9 share a place, which is that of 2^-18; -1e-9 has the next.
    assert runs == [[1, 2, 3, 1, 1], [3, 1, 4]]
    assert found.counts.shape == (2, VALUES) and found.ranks.tolist() == [2, 1]
    assert found.is_first.tolist() == [False, True]
    assert found.largest.tolist() == [0x4040, 0x4000] and SMALLEST < 0x4000


def test_the_first_of_equal_logits_is_the_largest():
    logits = torch.tensor([[5.0, 7.0, 7.0], [5.0, 7.0, 7.0], [0.0, -0.0, -1.0]]).bfloat16()
    assert count(logits, torch.tensor([1, 2, 1])).is_first.tolist() == [True, False, False]
    labels = torch.randint(50, (500,), generator=torch.Generator().manual_seed(1))
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits[torch.arange(500), labels] += 2
    assert torch.equal(count(logits, labels).is_first, logits.argmax(-1) == labels)
