"""What the training steps of all modes share: a micro batch on its device, the model inside its wrappers, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from slipway.training.padding import RealTokens, only

FIRST_STAGE_KEYS = ("tokens", "position_ids")
LAST_STAGE_KEYS = ("labels", "loss_mask", "drop_if_easy")
# Every layer's attention needs the bounds of packed samples, and every router what is padding.
EVERY_STAGE_KEYS = ("cu_seqlens", "is_real")


def data_step(iterator: Iterator) -> dict[str, Tensor | None]:
    """The next micro batch on the device, this rank's context-parallel share; None for what its stage does not need."""
    batch = next(iterator)
    batch = batch[0] if isinstance(batch, tuple) else batch
    wanted: tuple[str, ...] = FIRST_STAGE_KEYS if parallel_state.is_pipeline_first_stage() else ()
    wanted += LAST_STAGE_KEYS if parallel_state.is_pipeline_last_stage() else ()
    wanted += EVERY_STAGE_KEYS
    batch = {key: value.cuda(non_blocking=True) for key, value in batch.items() if key in wanted}
    lengths = batch["is_real"].sum(1)
    batch = get_batch_on_this_cp_rank(batch)  # Recipe.check refuses packed samples with context parallelism
    found = {key: batch.get(key) for key in (*FIRST_STAGE_KEYS, *LAST_STAGE_KEYS, *EVERY_STAGE_KEYS)}
    return found | {"lengths": lengths}


def attention_options(batch: dict[str, Tensor | None]) -> dict[str, Any]:
    """What keeps packed samples apart: their bounds for Transformer Engine, a mask for Megatron's own attention.

    Rotary positions need no change on the CPU, because attention depends only on their differences.
    """
    bounds = batch.get("cu_seqlens")
    if bounds is None:
        return {"attention_mask": None}
    bounds = bounds.flatten()
    lengths = bounds.diff()
    if bounds.is_cuda:
        longest = int(lengths.max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return {"attention_mask": None, "packed_seq_params": packed}
    # Which sample each position belongs to; a position sees earlier ones of its own sample. Megatron masks where True.
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    seen = torch.ones(len(sample), len(sample), dtype=torch.bool).tril() & (sample[:, None] == sample[None, :])
    return {"attention_mask": ~seen[None, None]}


def real_tokens(batch: dict[str, Tensor | None]) -> RealTokens:
    """Which of the tokens that this rank's routers see are no padding."""
    is_real, lengths = batch["is_real"], batch["lengths"]
    assert is_real is not None and lengths is not None
    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    here = is_real.T.chunk(ranks)[rank].flatten()  # tensor parallel ranks share the positions, see sequence_parallel
    return RealTokens(here, lengths, 1 / (ranks * parallel_state.get_context_parallel_world_size()))


def megatron_gpt(model: torch.nn.Module) -> MegatronGPT:
    """Megatron's model inside NeMo's module and its wrappers."""
    return next(module for module in unwrap_model(model).modules() if isinstance(module, MegatronGPT))


def language_model_step(model: torch.nn.Module, batch: dict[str, Tensor | None]) -> Tensor | tuple[Tensor, Tensor]:
    """(sum of the cross entropies of the counted tokens, their number) on the last stage, hidden states before it."""
    with only(real_tokens(batch)):
        output = megatron_gpt(model)(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            **attention_options(batch),
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    if batch["labels"] is None:  # not the last stage: these are hidden states for the next one
        return output
    counted = last_stage(batch, "loss_mask")
    return (output.float() * counted).sum(), counted.sum()


def last_stage(batch: dict[str, Tensor | None], key: str) -> Tensor:
    """A part of the batch that only the last pipeline stage has."""
    part = batch[key]
    assert part is not None, f"{key} is for the last pipeline stage"
    return part


class TokenLoss(MegatronLossReduction):
    """Gives Megatron the sum and the count, so that the loss is a mean over the tokens of the global batch.

    A mean of the micro batches' means would give tokens of short samples more weight, and depend on the layout.
    """

    def forward(self, batch: dict[str, Any], forward_out: tuple[Tensor, Tensor]):
        total, count = forward_out
        return total, count.to(torch.int), {"sum_and_count": torch.stack([total.detach(), count])}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        both = torch.stack([part["sum_and_count"] for part in losses_reduced_per_micro_batch]).sum(0)
        # Context-parallel ranks have other tokens of the same samples.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(both, group=group)
        return both[0] / both[1].clamp(min=1)
