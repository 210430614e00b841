"""Rotary positions of queries and keys in one kernel, for packed samples too.

Megatron asks the GPU for the length of each packed sample, in every layer, and gathers their angles anew. Transformer
Engine's kernel for packed samples starts as many programs for each sample as the longest could need. And it knows
neither the scale that YaRN puts on the positions nor the order of DeepSeek's. Under context parallelism Megatron rounds
the angles of packed samples to the type of the model.

One layer makes queries, keys and values, group by group. Where no norm comes in between, the same kernel takes them
apart: Megatron copies queries and values for that, and backward puts the gradients of all together again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipway.training.patches import MEGATRON, wrap


class Turning(NamedTuple):
    """How queries and keys are turned: what `rotary_gpu.turn` takes, with angles for their cosines and sines."""

    angles: Tensor
    bounds: Tensor | None
    scale: float
    share: tuple[int, int]


def turn_in_one_kernel() -> None:
    """Make Megatron's attention turn queries and keys by a kernel of ours where that computes the same."""
    from megatron.core.transformer import attention, multi_latent_attention

    for module in (attention, multi_latent_attention):
        wrap(module, "apply_rotary_pos_emb", _in_one_kernel, MEGATRON)
    wrap(attention.SelfAttention, "forward", _turning_first, MEGATRON)
    wrap(attention.SelfAttention, "get_query_key_value_tensors", _turned_when_parted, MEGATRON)


def _turning_first(forward: Callable[..., Any]) -> Callable[..., Any]:
    """SelfAttention.forward, which turns nothing where `get_query_key_value_tensors` has done so."""

    @functools.wraps(forward)
    def found(
        attention: Any,
        hidden: Tensor,
        *arguments: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> Any:
        turning = _turning_of(attention, hidden, rotary_pos_emb, packed_seq_params)
        options["packed_seq_params"] = packed_seq_params
        if turning is None or len(arguments) > 1 or options.get("inference_context") is not None:
            return forward(attention, hidden, *arguments, rotary_pos_emb=rotary_pos_emb, **options)
        attention.turning = turning
        try:
            return forward(attention, hidden, *arguments, rotary_pos_emb=None, **options)
        finally:
            del attention.turning

    return found


def _turning_of(attention: Any, hidden: Tensor, angles: Any, packed: Any) -> Turning | None:
    """How an attention turns its queries and keys; None where something else happens to them in between."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )
    from megatron.core.transformer.identity_op import IdentityOp

    config = attention.config
    if isinstance(angles, tuple):
        angles = angles[0] if angles[0] is angles[1] else None
    if not (isinstance(angles, Tensor) and has_kernels(hidden)) or config.rotary_interleaved or config.no_rope_freq:
        return None
    if config.test_mode or config.fused_single_qkv_rope or config.flash_decode:
        return None
    if not all(norm is None or isinstance(norm, IdentityOp) for norm in (attention.q_layernorm, attention.k_layernorm)):
        return None
    if not _are_of_one_row(angles) or angles.shape[-1] != attention.hidden_size_per_attention_head:
        return None
    bounds = None
    if packed is not None:
        padded = packed.cu_seqlens_q_padded
        bounds = packed.cu_seqlens_q if padded is None else padded
    share = share_of(attention.pg_collection.cp, bounds)
    return Turning(angles, bounds, _yarn_get_concentration_factor_from_config(config), share)


def _turned_when_parted(part: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(part)
    def found(attention: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        turning = getattr(attention, "turning", None)
        if turning is None:
            return part(attention, hidden, *arguments, **options)
        mixed, _ = attention.linear_qkv(hidden)
        groups = attention.num_query_groups_per_partition
        return Parted.apply(mixed, groups, attention.hidden_size_per_attention_head, turning)

    return found


def has_kernels(tensor: Tensor) -> bool:
    """Whether Triton's kernels run where the tensor is."""
    return tensor.is_cuda


def _in_one_kernel(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(apply)
    def found(
        inputs: Tensor,
        angles: Tensor,
        config: Any,
        cu_seqlens: Tensor | None = None,
        mscale: float = 1.0,
        cp_group: Any = None,
    ) -> Tensor:
        if cp_group is not None and not config.rotary_interleaved and has_kernels(inputs) and fits(inputs, angles):
            share = share_of(cp_group, cu_seqlens)
            return Turned.apply(inputs, angles, cu_seqlens, mscale, config.multi_latent_attention, share)
        return apply(inputs, angles, config, cu_seqlens, mscale, cp_group)

    return found


def share_of(group: Any, bounds: Tensor | None) -> tuple[int, int]:
    """(rank, ranks) that share each packed sample. Of whole rows Megatron gives each rank the angles of its part."""
    return (group.rank(), group.size()) if bounds is not None else (0, 1)


def fits(inputs: Tensor, angles: Tensor) -> bool:
    """Whether all of a head is turned, at each position by the same angles in every sample and head."""
    return _are_of_one_row(angles) and angles.shape[-1] == inputs.shape[-1] and inputs.stride(-1) == 1


def _are_of_one_row(angles: Tensor) -> bool:
    return angles.dim() == 4 and angles.shape[1:3] == (1, 1) and angles.stride(-1) == 1


def turns_of(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, float32, kept with them: all layers and passes have the same."""
    if not hasattr(angles, "turns"):
        exact = angles.float()
        angles.turns = exact.cos(), exact.sin()
    return angles.turns


class Turned(torch.autograd.Function):
    """`rotary_gpu.turn`; its gradient is turned back."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        angles: Tensor,
        bounds: Tensor | None,
        scale: float,
        by_pairs: bool,
        share: tuple[int, int],
    ) -> Tensor:
        from slipway.training.rotary_gpu import turn

        turns = turns_of(angles)
        ctx.save_for_backward(*turns, bounds)
        ctx.scale, ctx.by_pairs, ctx.share = scale, by_pairs, share
        return turn(inputs, turns, bounds, scale, share, by_pairs=by_pairs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from slipway.training.rotary_gpu import turn

        cosines, sines, bounds = ctx.saved_tensors
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        of_inputs = turn(gradient, (cosines, sines), bounds, ctx.scale, ctx.share, by_pairs=ctx.by_pairs, back=True)
        return of_inputs, *[None] * 5


class Parted(torch.autograd.Function):
    """`rotary_gpu.part`; the gradients of its parts are turned back and put together."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, groups: int, width: int, turning: Turning) -> tuple[Tensor, Tensor, Tensor]:
        from slipway.training.rotary_gpu import part

        angles, bounds, scale, share = turning
        turns = turns_of(angles)
        ctx.save_for_backward(*turns, bounds)
        ctx.scale, ctx.share = scale, share
        return part(mixed, groups, width, turns, bounds, scale, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from slipway.training.rotary_gpu import joined

        cosines, sines, bounds = ctx.saved_tensors
        return joined(gradients, (cosines, sines), bounds, ctx.scale, ctx.share), None, None, None
