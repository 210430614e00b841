"""The heads as an extension of NeMo: a PEFT transform, a data step, a forward step and a loss.

NeMo's PEFT machinery loads the base, freezes it, asks `HeadsTransform` to attach the trainable part and from then
on saves that part alone, under keys with `.adapter.` in them. The forward step runs the base without a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.utils import unwrap_model
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.callbacks.peft import PEFT
from torch import Tensor

from entrypoints.training.heads import DecodingHeads, heads_loss

FIRST_STAGE_KEYS = ("tokens", "position_ids")
LAST_STAGE_KEYS = ("labels", "loss_mask", "drop_if_easy")


class HeadsTransform(PEFT):
    """Puts the heads on the last pipeline stage as `adapter`; everything else is frozen.

    Args:
        base: the base model's checkpoint, noted beside the heads.
        seed: of the heads' first weights, so that every rank and every layout begins with the same.
        use_enhanced_features: see DecodingHeads.
    """

    def __init__(self, base: str, seed: int = 1234, use_enhanced_features: bool = True) -> None:
        super().__init__()
        self.base, self.seed, self.use_enhanced_features = base, seed, use_enhanced_features

    def apply_transform(self, trainer: Any) -> None:
        super().apply_transform(trainer)
        # After a resume NeMo takes the heads' own checkpoint for the base, and the next resume would fail.
        self.wrapped_io.model_ckpt_path = Path(self.base)

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None):
        if isinstance(module, MegatronGPT) and module.post_process:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                heads = DecodingHeads(module.config.hidden_size, self.use_enhanced_features)
            module.adapter = heads.to(next(module.parameters()).device)
        return module


def data_step(iterator: Iterator) -> dict[str, Tensor | None]:
    """The next micro batch with the tensors this pipeline stage needs on its device, the others None."""
    batch = next(iterator)
    batch = batch[0] if isinstance(batch, tuple) else batch
    wanted = FIRST_STAGE_KEYS if parallel_state.is_pipeline_first_stage() else ()
    wanted += LAST_STAGE_KEYS if parallel_state.is_pipeline_last_stage() else ()
    return {key: value.cuda(non_blocking=True) if key in wanted else None for key, value in batch.items()}


def forward_step(model: torch.nn.Module, batch: dict[str, Tensor | None]) -> Tensor | tuple[Tensor, Tensor]:
    """(loss sum, tokens counted) on the last stage, hidden states before it. The base runs without a gradient."""
    gpt = megatron_gpt(model)
    with torch.no_grad(), frozen(gpt):
        hidden = gpt(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)
    if not gpt.post_process:
        return hidden

    def logits_of(rows: Tensor) -> Tensor:
        with torch.no_grad():
            weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
            return gpt.output_layer(rows.unsqueeze(1), weight=weight)[0].squeeze(1)

    hidden = hidden.transpose(0, 1).reshape(-1, hidden.size(-1))
    return heads_loss(
        gpt.adapter,
        hidden,
        logits_of,
        batch["labels"].reshape(-1),
        batch["loss_mask"].reshape(-1).bool(),
        batch["drop_if_easy"].reshape(-1),
    )


def megatron_gpt(model: torch.nn.Module) -> MegatronGPT:
    """Megatron's model inside NeMo's module and whatever wraps it."""
    return next(module for module in unwrap_model(model).modules() if isinstance(module, MegatronGPT))


@contextlib.contextmanager
def frozen(gpt: MegatronGPT) -> Iterator[None]:
    """The base in evaluation mode (no dropout, no router update), returning its last hidden states, not logits."""
    if gpt.training:
        gpt.eval()
    post_process, mtp_process = gpt.post_process, gpt.mtp_process
    gpt.post_process = gpt.mtp_process = False
    try:
        yield
    finally:
        gpt.post_process, gpt.mtp_process = post_process, mtp_process


class HeadsLossReduction(MegatronLossReduction):
    """Hands Megatron the sum and the count, so that the loss is a mean over the tokens of the global batch."""

    def forward(self, batch: dict[str, Any], forward_out: tuple[Tensor, Tensor]):
        total, count = forward_out
        return total, count.to(torch.int), {"sum_and_count": torch.stack([total.detach(), count])}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        both = torch.stack([part["sum_and_count"] for part in losses_reduced_per_micro_batch]).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(both, group=group)
        return both[0] / both[1].clamp(min=1)
