"""Queries, keys and values as one kernel takes them out of what one layer has made for them, group by group.

Megatron copies queries and values for that, Qwen3's norms read queries and keys once more, and then they are turned by
their positions. Backward each of these has a kernel again, and another one puts the gradients together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipway.training.patches import MEGATRON, wrap
from slipway.training.rotary import are_of_one_row, has_kernels, share_of, turns_of

if TYPE_CHECKING:
    from slipway.training.parting_gpu import Heads


def part_in_one_kernel() -> None:
    """Make Megatron's attention part, norm and turn its heads by a kernel of ours where that computes the same."""
    from megatron.core.transformer.attention import SelfAttention

    wrap(SelfAttention, "forward", _turning_first, MEGATRON)
    wrap(SelfAttention, "get_query_key_value_tensors", _parted, MEGATRON)


def _turning_first(forward: Callable[..., Any]) -> Callable[..., Any]:
    """SelfAttention.forward, which turns nothing where `get_query_key_value_tensors` has done so."""

    @functools.wraps(forward)
    def found(attention: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        is_usual = len(arguments) <= 1 and options.get("inference_context") is None and has_kernels(hidden)
        angles, packed = options.get("rotary_pos_emb"), options.get("packed_seq_params")
        heads = _heads_of(attention, angles, packed) if is_usual else None
        if heads is None:
            return forward(attention, hidden, *arguments, **options)
        attention.heads = heads
        try:
            return forward(attention, hidden, *arguments, **{**options, "rotary_pos_emb": None})
        finally:
            del attention.heads

    return found


def _parted(part: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(part)
    def found(attention: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        heads = getattr(attention, "heads", None)
        if heads is None:
            return part(attention, hidden, *arguments, **options)
        return Parted.apply(attention.linear_qkv(hidden)[0], heads)

    return found


def _heads_of(attention: Any, angles: Any, packed: Any) -> Heads | None:
    """The heads of an attention; None where something happens to them that the kernel does not know."""
    from megatron.core.transformer import attention as megatron

    from slipway.training.parting_gpu import Heads

    config, width = attention.config, attention.hidden_size_per_attention_head
    if isinstance(angles, tuple):
        angles = angles[0] if angles[0] is angles[1] else None
    if not isinstance(angles, Tensor) or not are_of_one_row(angles) or angles.shape[-1] != width:
        return None
    if config.rotary_interleaved or config.no_rope_freq or config.fused_single_qkv_rope:
        return None
    if config.test_mode or config.flash_decode:
        return None
    norms = attention.q_layernorm, attention.k_layernorm
    if all(norm is None or isinstance(norm, megatron.IdentityOp) for norm in norms):
        weights, epsilon = None, 0.0
    elif config.normalization == "RMSNorm" and all(map(_is_frozen, norms)) and norms[0].eps == norms[1].eps:
        weights, epsilon = (norms[0].weight, norms[1].weight), norms[0].eps
    else:
        return None
    bounds = None
    if packed is not None:
        padded = packed.cu_seqlens_q_padded
        bounds = packed.cu_seqlens_q if padded is None else padded
    scale = megatron._yarn_get_concentration_factor_from_config(config)
    share = share_of(attention.pg_collection.cp, bounds)
    groups = attention.num_query_groups_per_partition
    return Heads(groups, width, turns_of(angles), bounds, scale, share, weights, epsilon)


def _is_frozen(norm: Any) -> bool:
    """The norm is nothing but a weight that is not trained."""
    parameters = dict(norm.named_parameters()) if isinstance(norm, torch.nn.Module) else {}
    plain = not getattr(norm, "zero_centered_gamma", False)
    return plain and list(parameters) == ["weight"] and not parameters["weight"].requires_grad


class Parted(torch.autograd.Function):
    """`parting_gpu.part`; its gradient is `parting_gpu.joined`."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        from slipway.training.parting_gpu import part

        ctx.heads, mixed = heads, mixed.contiguous()
        ctx.save_for_backward(mixed if heads.norms else None)
        return part(mixed, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from slipway.training.parting_gpu import joined

        query, key, value = (gradient.contiguous() for gradient in gradients)
        (mixed,) = ctx.saved_tensors
        return joined((query, key, value), mixed, ctx.heads), None
