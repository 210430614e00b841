"""What is trained: the heads, all weights, or low-rank adapters. Each mode uses NeMo's own extension points."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.collections.llm.peft import DoRA as NemoDoRA
from nemo.collections.llm.peft import LoRA as NemoLoRA
from nemo.lightning.pytorch.callbacks.peft import PEFT

from slipway.training.heads_on_nemo import FromBase, HeadsTransform, heads_step, leave_out_backward
from slipway.training.recipe import Recipe
from slipway.training.repairs import carry_gradients_to_the_first_layer, mark_experts
from slipway.training.steps import language_model_step
from slipway.training.targets import ALL, EVERY


class Adapters(FromBase):
    """NeMo's adapters, which remember their base and have the same first weights in every parallel layout."""

    def __init__(
        self,
        base: str,
        seed: int,
        target_modules: list[str],
        dim: int,
        alpha: float,
        dropout: float,
        adapter: str = "",
    ) -> None:
        """`adapter`: a checkpoint of adapters whose weights these begin with; "" = new ones."""
        super().__init__(target_modules=target_modules, dim=dim, alpha=alpha, dropout=dropout)
        self.base, self.seed, self.adapter = base, seed, adapter

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        model = super().__call__(model)
        for layer in model.modules():
            if isinstance(layer, TransformerLayer):
                self._begin(layer)
        if self.adapter:
            self._continue(model)
        carry_gradients_to_the_first_layer(model)
        return mark_experts(model)

    def _continue(self, model: torch.nn.Module) -> None:
        """Load the weights of the adapters to continue from, before the optimizer copies them."""
        folder, strategy = Path(self.adapter) / "weights", model.trainer.strategy
        metadata = strategy.unwrapped_checkpoint_io.load_content_metadata(folder)
        states = model.sharded_state_dict(metadata=metadata)
        own = {key: state for key, state in states.items() if ".adapter." in key}
        strategy.load_model_state_dict(dist_checkpointing.load({"state_dict": own}, str(folder)), strict=False)

    def _begin(self, layer: TransformerLayer) -> None:
        """Set the first weights of a layer's adapters: draw the whole matrix, and keep this rank's part of it.

        The seed of a matrix is made from its name and layer. NeMo draws only the part of each rank, so that another
        layout would begin with other weights.
        """
        for name, weight in layer.named_parameters():
            if not name.endswith(".adapter.linear_in.weight"):
                continue
            name, ranks, rank = _place(name, layer.config.num_moe_experts)
            axis = getattr(weight, "partition_dim", -1)  # Megatron's mark: which dimension the ranks share
            ranks = ranks if axis in (0, 1) else 1
            shape = [size * (ranks if dim == axis else 1) for dim, size in enumerate(weight.shape)]
            # hash() differs from process to process.
            key = hashlib.sha256(f"{self.seed} {layer.layer_number} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
            whole = torch.randn(shape, generator=generator) * math.sqrt(2 / sum(shape))  # Xavier's, NeMo's default
            part = whole.chunk(ranks, axis)[rank] if ranks > 1 else whole
            with torch.no_grad():
                weight.copy_(part)


def _place(name: str, experts: int | None) -> tuple[str, int, int]:
    """(name of an adapter with the number of its expert in the whole model, ranks that share it, which one this is)."""
    # Megatron numbers the experts of a rank from 0. Experts are not split, so no ranks share their weights.
    found = re.search(r"local_experts\.(\d+)\.", name)
    if not found:
        state = parallel_state
        return name, state.get_tensor_model_parallel_world_size(), state.get_tensor_model_parallel_rank()
    here = experts // parallel_state.get_expert_model_parallel_world_size()
    number = parallel_state.get_expert_model_parallel_rank() * here + int(found.group(1))
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}", 1, 0


class LoRA(Adapters, NemoLoRA):
    """Low-rank adapters."""


class DoRA(Adapters, NemoDoRA):
    """Low-rank adapters, and the size of each row of the weight."""


@dataclass(frozen=True)
class Mode:
    """How a mode computes its loss, what NeMo attaches to a frozen base (None: all weights are trained), and what is
    called before NeMo begins."""

    forward_step: Callable[..., Any]
    transform: Callable[[Recipe], PEFT | None]
    prepare: Callable[[], None] = lambda: None


def _lora(recipe: Recipe) -> Adapters:
    # NeMo divides by the rank. Rank-stabilised adapters divide by its square root: the same with a larger alpha.
    return (DoRA if recipe.dora else LoRA)(
        recipe.model,
        recipe.seed,
        target_modules=list(EVERY) if recipe.lora_targets == ALL else recipe.lora_targets.split(","),
        dim=recipe.lora_rank,
        alpha=(recipe.lora_alpha or recipe.lora_rank) * (math.sqrt(recipe.lora_rank) if recipe.rslora else 1),
        dropout=recipe.lora_dropout,
        adapter=recipe.adapter,
    )


MODES = {
    "heads": Mode(
        heads_step, lambda recipe: HeadsTransform(base=recipe.model, seed=recipe.seed), prepare=leave_out_backward
    ),
    "sft": Mode(language_model_step, lambda recipe: None),
    "lora": Mode(language_model_step, _lora),
    "pretrain": Mode(language_model_step, lambda recipe: None),
}
