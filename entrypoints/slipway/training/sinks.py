"""Attention with sinks for packed samples, which Transformer Engine has only for samples that each have their own row.

A sink is one more score of each head, whose value is zero: it takes a share of the softmax and gives nothing. So flash
attention without sinks is computed, and its output is what it would be with them but for a factor, which follows from
the sums of exponentials that flash attention returns. In the backward pass its kernel computes the weights from such
sums again: given the sums that the sinks are a part of, it computes the weights with them.

Context parallel ranks have parts of every sample, and all heads. For the attention each gets all tokens, of its part of
the heads: a window and a sink are then what they are on one rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from slipway.errors import PreflightError
from slipway.training.patches import MEGATRON, wrap
from slipway.training.samples import ranks_of_positions

UNLIMITED = -1  # a window's size for flash attention
Share = Callable[[Tensor, Tensor, ProcessGroup], Tensor]


def attend_with_sinks() -> None:
    """Let Megatron's attention by Transformer Engine take packed samples where it has sinks."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    wrap(TEDotProductAttention, "forward", _packed_with_sinks, MEGATRON)


def _packed_with_sinks(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from megatron.core import parallel_state

    @functools.wraps(forward)
    def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        packed = options.get("packed_seq_params")
        if packed is None or layer.softmax_type == "vanilla":
            return forward(layer, query, key, value, *arguments, **options)
        if layer.attention_dropout:
            raise PreflightError(
                f"the model's context has an attention_dropout of {layer.attention_dropout}, and packed samples with "
                "sinks are computed without: use --pack=false"
            )
        sizes = packed.cu_seqlens_q, packed.max_seqlen_q, 1 / math.sqrt(query.size(-1)), layer.window_size[0]
        group = parallel_state.get_context_parallel_group(check_initialized=False)
        if group is None or group.size() == 1:
            return SinkAttention.apply(query, key, value, layer.softmax_offset, *sizes).flatten(1)
        return attend_by_heads(query, key, value, layer.softmax_offset, *sizes, group=group).flatten(1)

    return attend


def attend_by_heads(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, *sizes: Any, group: ProcessGroup
) -> Tensor:
    """SinkAttention where context parallel ranks share the tokens: for it, they share the heads.

    Args:
        query: [T / ranks, heads, D]; key, value: [T / ranks, groups, D]; ranks divide groups.
        sinks: [heads], of all ranks.
        bounds, sizes: those of SinkAttention, for all T tokens.

    Returns: [T / ranks, heads, D].
    """
    ranks = group.size()
    order = order_of(bounds, ranks)
    shared = [part.unflatten(1, (ranks, -1)) for part in (query, key, value)]  # [T / ranks, ranks, heads / ranks, D]
    mine = Exchange.apply(to_heads, to_tokens, torch.cat(shared, 2), order, group)
    found = SinkAttention.apply(
        *mine.split([part.size(2) for part in shared], 1), sinks.chunk(ranks)[group.rank()], bounds, *sizes
    )
    return Exchange.apply(to_tokens, to_heads, found, order, group).flatten(1, 2)


def order_of(bounds: Tensor, ranks: int) -> Tensor:
    """int [T]: the positions in the order of the ranks that have them; kept with the bounds, for all layers."""
    if not hasattr(bounds, "order"):
        bounds.order = ranks_of_positions(bounds, ranks).argsort(stable=True)
    return bounds.order


def to_heads(mine: Tensor, order: Tensor, group: ProcessGroup) -> Tensor:
    """[T / ranks, ranks, heads, D] of this rank's tokens → [T, heads, D] of this rank's heads."""
    found = _exchange(mine.transpose(0, 1), group).flatten(0, 1)
    return torch.empty_like(found).index_copy_(0, order, found)


def to_tokens(mine: Tensor, order: Tensor, group: ProcessGroup) -> Tensor:
    """[T, heads, D] of this rank's heads → [T / ranks, ranks, heads, D] of this rank's tokens."""
    return _exchange(mine[order].unflatten(0, (group.size(), -1)), group).transpose(0, 1)


def _exchange(parts: Tensor, group: ProcessGroup) -> Tensor:
    """Part i goes to rank i; the parts that come are in the order of the ranks."""
    found = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    distributed.all_to_all_single(found, parts.contiguous(), group=group)
    return found


class Exchange(torch.autograd.Function):
    """`to_heads` or `to_tokens`, whose gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, there: Share, back: Share, mine: Tensor, order: Tensor, group: ProcessGroup) -> Tensor:
        ctx.back, ctx.order, ctx.group = back, order, group
        return there(mine, order, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.back(gradient, ctx.order, ctx.group), None, None


class SinkAttention(torch.autograd.Function):
    """Causal attention of samples that stand one after the other.

    Args of apply:
        query: [T, heads, D], BF16.
        key, value: [T, groups, D].
        sinks: [heads], a score for each.
        bounds: int32 [samples + 1], where each sample begins, and T.
        longest: tokens of the longest sample.
        scale: of the other scores.
        window: how many tokens before its own a token sees; UNLIMITED for all of its sample.

    Returns: [T, heads, D].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, *sizes: Any):
        longest, scale, window = sizes
        found, sums, *state = forward_without_sinks(query, key, value, bounds, longest, scale, window)
        with_sinks = torch.logaddexp(sums, sinks.float().unsqueeze(1))
        found = found * (sums - with_sinks).exp().T.unsqueeze(-1).to(found.dtype)
        ctx.save_for_backward(query, key, value, sinks, bounds, found, with_sinks, *state)
        ctx.sizes = sizes
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        query, key, value, sinks, bounds, found, sums, *state = ctx.saved_tensors
        longest, scale, window = ctx.sizes
        of_inputs = backward_from_sums(gradient, query, key, value, found, sums, bounds, longest, scale, window, state)
        shares = (sinks.float().unsqueeze(1) - sums).exp()
        # The derivative of a softmax: the sink's value is zero, and the mean of all values, so weighted, is `found`.
        of_sinks = -(shares * (gradient.float() * found.float()).sum(-1).T).sum(1).to(sinks.dtype)
        return *of_inputs, of_sinks, None, None, None, None


def forward_without_sinks(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, ...]:
    """Flash attention: the output, the logarithms of the sums of exponentials (float32 [heads, T]), and its state."""
    found, sums, *state, _ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, bounds, bounds, longest, longest, 0.0, True, False),
        scale=scale,
        window_size_left=window,
        window_size_right=0,
    )
    return found, sums, *state


def backward_from_sums(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    found: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
    window: int,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's gradients of query, key and value, with the weights that belong to these sums."""
    return torch.ops.aten._flash_attention_backward(
        *(gradient.contiguous(), query, key, value, found, sums, bounds, bounds, longest, longest, 0.0, True, *state),
        scale=scale,
        window_size_left=window,
        window_size_right=0,
    )
