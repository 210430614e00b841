"""What the training steps of all modes share: a micro batch on its device, the model inside its wrappers, the loss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from slipway.training.cross_entropy import linear_cross_entropy
from slipway.training.graphs import learn_graphed
from slipway.training.padding import RealTokens, only
from slipway.training.samples import computed_positions, share_of_samples

FIRST_STAGE_KEYS = ("tokens", "position_ids")
LAST_STAGE_KEYS = ("labels", "loss_mask", "drop_if_easy")
# Every layer's attention needs the bounds of packed samples, and every router what is padding.
EVERY_STAGE_KEYS = ("cu_seqlens", "is_real")


def data_step(iterator: Iterator) -> dict[str, Tensor | None]:
    """The next micro batch on the device, this rank's context-parallel share; None for what its stage does not need."""
    batch = next(iterator)
    batch = without_needless_padding(batch[0] if isinstance(batch, tuple) else batch)
    wanted: tuple[str, ...] = FIRST_STAGE_KEYS if parallel_state.is_pipeline_first_stage() else ()
    wanted += LAST_STAGE_KEYS if parallel_state.is_pipeline_last_stage() else ()
    wanted += EVERY_STAGE_KEYS
    batch = {key: value.cuda(non_blocking=True) for key, value in batch.items() if key in wanted}
    lengths = batch["is_real"].sum(1)
    batch = on_this_context_parallel_rank(batch)
    found = {key: batch.get(key) for key in (*FIRST_STAGE_KEYS, *LAST_STAGE_KEYS, *EVERY_STAGE_KEYS)}
    return found | {"lengths": lengths}


def on_this_context_parallel_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positions that this rank has: a light and a heavy part of each sequence, or of each packed sample."""
    if "cu_seqlens" not in batch:
        return get_batch_on_this_cp_rank(batch)
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if ranks == 1:
        return batch
    mine = share_of_samples(batch["cu_seqlens"].flatten(), ranks, rank)
    return {key: value if key == "cu_seqlens" else value[:, mine] for key, value in batch.items()}


def without_needless_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The micro batch, still on the CPU, cut behind its longest sample. Packed sequences stay as they are."""
    if "cu_seqlens" in batch:
        return batch
    is_real = batch["is_real"]
    kept = computed_positions(int(is_real.sum(1).max()), is_real.size(1), shares_of_positions())
    return {key: value[:, :kept] for key, value in batch.items()}


def shares_of_positions() -> int:
    """How many equal parts the positions of a sequence are shared in by the ranks."""
    context = parallel_state.get_context_parallel_world_size()
    # Of a causal mask each context parallel rank has a light and a heavy part.
    return parallel_state.get_tensor_model_parallel_world_size() * (2 * context if context > 1 else 1)


def attention_options(batch: dict[str, Tensor | None], longest: int | None = None) -> dict[str, Any]:
    """What keeps packed samples apart: their bounds for Transformer Engine, a mask for Megatron's own attention.

    Rotary positions need no change on the CPU, because attention depends only on their differences.

    Args:
        longest: no packed sample has more tokens; None = the GPU is asked for it.
    """
    bounds = batch.get("cu_seqlens")
    if bounds is None:
        return {"attention_mask": None}
    bounds = bounds.flatten()
    lengths = bounds.diff()
    if bounds.is_cuda:
        longest = longest or int(lengths.max())
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
    gpt = megatron_gpt(model)
    hidden = learn_graphed(gpt, functools.partial(hidden_states, gpt), batch)
    if not gpt.post_process:
        return hidden
    labels, counted = last_stage(batch, "labels"), last_stage(batch, "loss_mask")
    # With layers for multi-token prediction their hidden states follow the decoder's.
    further = gpt.config.mtp_num_layers if gpt.mtp_process else 0
    hidden, *others = hidden.chunk(1 + (further or 0))
    total = _loss(gpt, hidden, labels, counted)
    if others and gpt.training:
        more = _loss_of_further_tokens(gpt, others, labels, counted)
        total = total + more - more.detach()  # it is learned from, and not a part of what is reported
    return total, counted.sum()


def hidden_states(gpt: MegatronGPT, batch: dict[str, Tensor | None], longest: int | None = None) -> Tensor:
    """[S, B, H], what the last layer of this stage gives; after it, on the last stage, what those for multi-token
    prediction give."""
    with only(real_tokens(batch)), to_hidden_states(gpt):
        options = attention_options(batch, longest)
        return gpt(input_ids=batch["tokens"], position_ids=batch["position_ids"], **options)


@contextlib.contextmanager
def to_hidden_states(gpt: MegatronGPT) -> Iterator[None]:
    """In the block the last stage's forward() ends before the output layer, with the hidden states [S, B, H]."""
    before, gpt.post_process = gpt.post_process, False
    try:
        yield
    finally:
        gpt.post_process = before


def output_weight(gpt: MegatronGPT) -> Tensor:
    """The weight of the output layer [V, H], which may be the embedding's; this rank's rows of it."""
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def _loss(gpt: MegatronGPT, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """The sum of the cross entropies of the counted tokens.

    Args:
        hidden: [S, B, H], or this rank's part of the positions under sequence parallelism.
        labels, counted: [B, S].
    """
    group = parallel_state.get_tensor_model_parallel_group()
    # Either way Megatron adds up the gradients of the ranks, each of which has a part of the vocabulary.
    if gpt.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    rows = counted.T.flatten().nonzero().squeeze(-1)  # other tokens need no logits
    hidden = hidden.reshape(-1, hidden.size(-1))
    return linear_cross_entropy(hidden[rows], output_weight(gpt), labels.T.flatten()[rows], group)


def _loss_of_further_tokens(gpt: MegatronGPT, hidden: list[Tensor], labels: Tensor, counted: Tensor) -> Tensor:
    """What the layers for multi-token prediction add to the loss, weighted as the model's configuration says.

    Args:
        hidden: of each such layer; the first one predicts the token after the next.
    """
    total = torch.zeros((), device=labels.device)
    for states in hidden:
        labels, _ = roll_tensor(labels, shifts=-1, dims=-1, cp_group=gpt.cp_group)
        counted, _ = roll_tensor(counted, shifts=-1, dims=-1, cp_group=gpt.cp_group)
        total = total + _loss(gpt, states, labels, counted)
    return total * gpt.config.mtp_loss_scaling_factor / len(hidden)


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
