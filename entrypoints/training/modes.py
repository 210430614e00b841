"""What is trained: the heads, all weights, or low-rank adapters; each on NeMo's own machinery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo.collections.llm.peft import LoRA as NemoLoRA
from nemo.lightning.pytorch.callbacks.peft import PEFT

from entrypoints.training.heads_on_nemo import FromBase, HeadsTransform, heads_step
from entrypoints.training.recipe import Recipe
from entrypoints.training.steps import language_model_step


class LoRA(FromBase, NemoLoRA):
    """NeMo's LoRA on the base that it is for."""

    def __init__(self, base: str, target_modules: list[str], dim: int, alpha: int, dropout: float) -> None:
        super().__init__(target_modules=target_modules, dim=dim, alpha=alpha, dropout=dropout)
        self.base = base


@dataclass(frozen=True)
class Mode:
    """How a mode computes its loss, and what NeMo attaches to a frozen base; None trains every weight."""

    forward_step: Callable[..., Any]
    transform: Callable[[Recipe], PEFT | None]


def _lora(recipe: Recipe) -> LoRA:
    return LoRA(
        recipe.model,
        target_modules=recipe.lora_targets.split(","),
        dim=recipe.lora_rank,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
    )


MODES = {
    "heads": Mode(heads_step, lambda recipe: HeadsTransform(base=recipe.model, seed=recipe.seed)),
    "sft": Mode(language_model_step, lambda recipe: None),
    "lora": Mode(language_model_step, _lora),
    "pretrain": Mode(language_model_step, lambda recipe: None),
}
