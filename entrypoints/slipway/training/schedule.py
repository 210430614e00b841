"""The recipe's learning rate of each step in the form that NeMo needs."""

from __future__ import annotations

from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from slipway.training.recipe import Recipe


class Rates(LambdaLR):
    """A resumed run's next step has the rate of its schedule now, not the one that was saved with the old schedule."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class Schedule(LRSchedulerModule):
    """`Recipe.learning_rate`. NeMo's own schedule begins at 0, so that its first step trains nothing.

    A run that goes on with other --steps follows their curve from there.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """The schedule of an optimizer whose learning rate is the recipe's."""
        shares = Rates(optimizer, lambda step: self.recipe.learning_rate(step) / self.recipe.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": shares, "interval": "step", "frequency": 1}}
