"""What lies between the two layers of a dense feed-forward block that both have adapters, as one function.

Behind the first layer its adapter reads and writes the layer's whole output, then the activation reads it, then the
second adapter reads the activation's output. Backward the activation's output is made again, for the second adapter's
gradient, and each of the adapters' products reads or writes a tensor of the block's full width once more. All of
these are computed from the same parts of the same tensors, so that they are read once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipway.training.low_rank import is_in_fp8, is_plain, scale_of, scaled_product, with_adapter, without_adapter
from slipway.training.patches import MEGATRON, wrap
from slipway.training.quantised import Peaks
from slipway.training.rotary import has_kernels

LARGEST_RANK = 64  # three sums of the rank's height are held at once


def activate_between_adapters() -> None:
    """Let a dense block with adapters on both layers compute its activation together with these."""
    from megatron.core.transformer.mlp import MLP

    wrap(MLP, "forward", _between_adapters, MEGATRON)


def _between_adapters(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(block: Any, hidden: Tensor, per_token_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if per_token_scale is not None or not _is_adapted(block):
            return forward(block, hidden, per_token_scale)
        first, second = block.linear_fc1, block.linear_fc2
        base, bias, low = without_adapter(first, hidden)
        if bias is not None:
            raise RuntimeError("a feed-forward layer without a bias gave one")
        before, after = first.adapter.linear_out.weight, second.adapter.linear_in.weight
        active, low = _Between.apply(base, low, before, after, scale_of(first.adapter), is_in_fp8(first))
        output, bias, _ = second.base_linear_forward(active)
        return with_adapter(second, output, low), bias

    return found


def _is_adapted(block: Any) -> bool:
    """Both layers have plain adapters of one rank, and between them there is a gate with SiLU and nothing else."""
    from nemo.collections.llm.peft.lora import LoRALinear

    config = block.config
    if not (isinstance(block.linear_fc1, LoRALinear) and isinstance(block.linear_fc2, LoRALinear)):
        return False
    adapters = block.linear_fc1.adapter, block.linear_fc2.adapter
    return (
        all(map(is_plain, adapters))
        and adapters[0].dim == adapters[1].dim <= LARGEST_RANK
        and config.gated_linear_unit
        and config.activation_func is functional.silu
        and config.bias_activation_fusion
        and not config.add_bias_linear
        and not config.use_te_activation_func
        and not config.activation_func_fp8_input_store
        and not config.cpu_offloading
    )


class _Between(torch.autograd.Function):
    """(active, active · afterᵀ), where active is silu(first half) · second half of base + scale · low · beforeᵀ.

    Shapes: base [..., 2 F], low [tokens, rank], before [2 F, rank], after [rank, F]; active is [..., F], the product
    [tokens, rank]. With `in_fp8` the layers will want to know the largest value of `active` and that of the base's
    gradient.
    """

    @staticmethod
    def forward(ctx, base, low, before, after, scale, in_fp8):
        ctx.save_for_backward(base, low, before, after)
        ctx.scale, ctx.in_fp8 = scale, in_fp8
        width = base.shape[-1] // 2
        active = base.new_empty(*base.shape[:-1], width)
        peaks = _forward(base.reshape(-1, 2 * width), low, before, scale, active.view(-1, width), noted=in_fp8)
        if peaks is not None:
            Peaks.note(active, peaks)
        return active, functional.linear(active.view(-1, width), after)

    @staticmethod
    def backward(ctx, of_active, of_low):
        base, low, before, after = ctx.saved_tensors
        width = base.shape[-1] // 2
        rows = base.reshape(-1, 2 * width)
        of_active = of_active.reshape(-1, width)
        of_rows, of_before, of_after, peaks = _backward(
            of_active, of_low, after, rows, low, before, ctx.scale, noted=ctx.in_fp8
        )
        of_base = of_rows.view(base.shape)
        if peaks is not None:
            Peaks.note(of_base, peaks)
        return of_base, scaled_product(of_rows, before, ctx.scale), of_before, of_after, None, None


def _forward(base: Tensor, low: Tensor, before: Tensor, scale: float, active: Tensor, *, noted: bool) -> Tensor | None:
    """adapted_activation_gpu.forward; None without a GPU."""
    if has_kernels(base):
        from slipway.training.adapted_activation_gpu import forward

        return forward(base, low, before, scale, active, noted=noted)
    gate, up = torch.addmm(base, low, before.t(), alpha=scale).chunk(2, -1)
    torch.mul(functional.silu(gate), up, out=active)
    return None


def _backward(
    of_active: Tensor,
    of_low: Tensor,
    after: Tensor,
    base: Tensor,
    low: Tensor,
    before: Tensor,
    scale: float,
    *,
    noted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """adapted_activation_gpu.backward; the peaks are None without a GPU."""
    if has_kernels(base):
        from slipway.training.adapted_activation_gpu import backward

        return backward(of_active.contiguous(), of_low.contiguous(), after, base, low, before, scale, noted=noted)
    with torch.enable_grad():
        base = base.detach().requires_grad_()
        gate, up = torch.addmm(base, low, before.t(), alpha=scale).chunk(2, -1)
        active = functional.silu(gate) * up
    (of_base,) = torch.autograd.grad(active, base, torch.addmm(of_active, of_low, after))
    return of_base, scaled_product(of_base.t(), low, scale), of_low.t() @ active, None
