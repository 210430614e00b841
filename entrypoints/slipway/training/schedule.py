"""The learning rate of each step: a linear warm-up, half a cosine, and constant steps at the end."""

from __future__ import annotations

import math
from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from slipway.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """That of a step, which is counted from 0.

    The first step trains with lr / warmup_steps, the step warmup_steps - 1 with lr. NeMo's own schedule begins at 0, so
    that its first step trains nothing.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    falling = recipe.steps - recipe.warmup_steps - recipe.constant_steps
    done = min(1.0, (step - recipe.warmup_steps + 1) / (falling + 1))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * done)) / 2


class Schedule(LRSchedulerModule):
    """`learning_rate` in the form that NeMo needs.

    What is saved of it is the number of steps: a run that goes on with other --steps follows their curve from there.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """The schedule of an optimizer whose learning rate is the recipe's."""
        shares = LambdaLR(optimizer, lambda step: learning_rate(self.recipe, step) / self.recipe.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shares, "interval": "step", "frequency": 1}}
