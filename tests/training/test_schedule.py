"""The learning rate of each step: no step trains nothing, and the ends are those that were asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from slipway.training.recipe import Recipe


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    from slipway.training import cpu

    cpu.enable()


def recipe(**values) -> Recipe:
    return Recipe(model="m", data="d", out="o", **{"lr": 1e-3, "min_lr": 1e-5, **values})


def rates(chosen: Recipe) -> list[float]:
    """Those that the optimizer has while the steps of a run are done."""
    from slipway.training.schedule import Schedule

    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=chosen.lr)
    scheduler = Schedule(chosen).scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(chosen.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warm_up_cosine_and_constant_steps():
    found = rates(recipe(steps=20, warmup_steps=4, constant_steps=5))
    assert found[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[15:] == pytest.approx([1e-5] * 5)
    assert all(before > after for before, after in pairwise(found[3:16]))
    # The cosine is symmetric about the middle of its way.
    assert found[9] + found[9] == pytest.approx(found[4] + found[14]) and found[9] == pytest.approx(5.05e-4)


@pytest.mark.parametrize("steps, warmup, constant", [(1, 0, 0), (1, 1, 0), (3, 2, 1), (400, 20, 50), (7, 0, 7)])
def test_every_step_trains_and_none_leaves_the_range(steps, warmup, constant):
    found = rates(recipe(steps=steps, warmup_steps=warmup, constant_steps=constant))
    assert all(1e-5 <= rate <= 1e-3 or rate == pytest.approx(1e-3 / warmup) for rate in found)
    assert min(found) > 0


def test_the_same_rate_at_both_ends_is_a_constant():
    assert set(rates(recipe(steps=30, warmup_steps=0, constant_steps=0, min_lr=1e-3))) == {1e-3}


def test_nemo_trains_nothing_in_the_first_step():
    """If this fails, upstream has repaired it: its schedule can be taken."""
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    CosineAnnealingScheduler(max_steps=20, warmup_steps=4, constant_steps=5, min_lr=1e-5).scheduler(None, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0
