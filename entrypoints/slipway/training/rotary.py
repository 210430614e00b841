"""Rotary positions of queries and keys in one kernel, for packed samples too.

Megatron asks the GPU for the length of each packed sample, in every layer, and gathers their angles anew. Transformer
Engine's kernel for packed samples starts as many programs for each sample as the longest could need. And it knows
neither the scale that YaRN puts on the positions nor the order of DeepSeek's. Under context parallelism Megatron rounds
the angles of packed samples to the type of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipway.training.patches import MEGATRON, wrap


def turn_in_one_kernel() -> None:
    """Make Megatron's attention turn queries and keys by a kernel of ours where that computes the same."""
    from megatron.core.transformer import attention, multi_latent_attention

    for module in (attention, multi_latent_attention):
        wrap(module, "apply_rotary_pos_emb", _in_one_kernel, MEGATRON)


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
    return are_of_one_row(angles) and angles.shape[-1] == inputs.shape[-1] and inputs.stride(-1) == 1


def are_of_one_row(angles: Tensor) -> bool:
    """Whether angles are the same in every sample and head."""
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
