"""Gated activations without a compiler, whose outputs can be made again.

Megatron lets torch.compile write them: five seconds of the first step on a machine that has not compiled them yet,
which every new container is. Transformer Engine brings the same kernels along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipway.training.patches import MEGATRON, wrap


def bring_activations() -> None:
    """Give Megatron's layers without experts an activation that is compiled already, and that says how it was made."""
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import shared_experts

    for module in (mlp, shared_experts):
        wrap(module, "bias_swiglu_impl", _ready_made, MEGATRON)


def add_without_compiler(config: Any) -> None:
    """Let what a layer adds to its input be added by torch, which without a bias or dropout is one kernel anyway."""
    if not config.add_bias_linear and not config.hidden_dropout:
        config.bias_dropout_fusion = False


def _ready_made(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """bias_swiglu_impl; its output has an attribute `made_by`, unless its inputs are kept in another form or place."""

    @functools.wraps(swiglu)
    def found(inputs: Tensor, bias: Tensor | None, *options: bool) -> Tensor:
        if bias is not None or any(options):
            return swiglu(inputs, bias, *options)
        make = _SwiGLU.apply if inputs.is_cuda else functools.partial(swiglu, bias=None)
        output = make(inputs)
        output.made_by = functools.partial(make, inputs)
        return output

    return found


class _SwiGLU(torch.autograd.Function):
    """silu(first half) · second half of the last dimension, in Transformer Engine's kernels."""

    @staticmethod
    def forward(ctx, inputs):
        import transformer_engine_torch

        ctx.save_for_backward(inputs)
        return transformer_engine_torch.swiglu(inputs, None)

    @staticmethod
    def backward(ctx, gradient):
        import transformer_engine_torch

        return transformer_engine_torch.dswiglu(gradient.contiguous(), *ctx.saved_tensors, None)
