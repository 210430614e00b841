"""Gated activations without a compiler, whose outputs can be made again.

Megatron lets torch.compile write them: five seconds of the first step on a machine that has not compiled them yet,
which every new container is. Transformer Engine brings the kernels of layers without experts along; those of experts,
whose outputs the router weights, are our own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipway.training.patches import MEGATRON, wrap

SILU, QUICK_GELU = 1.0, 1.702  # how steep the sigmoid of the gate is


def bring_activations() -> None:
    """Give Megatron's layers activations that need no compiler, and that say how they were made."""
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import experts, shared_experts

    for module in (mlp, shared_experts):
        wrap(module, "bias_swiglu_impl", _ready_made, MEGATRON)
    for module in (mlp, experts):
        wrap(module, "weighted_bias_swiglu_impl", functools.partial(_ready_made_weighted, steepness=SILU), MEGATRON)
        wrap(
            module,
            "weighted_bias_quick_geglu_impl",
            functools.partial(_ready_made_weighted, steepness=QUICK_GELU),
            MEGATRON,
        )


def activate_in_one_kernel(config: Any) -> None:
    """Let gated activations be one kernel wherever there is one that computes the same, with weights and limits.

    A checkpoint's context says no where it is for machines without a GPU too, or means one of Megatron's two functions
    of the same name, which Megatron does not know as one with a kernel.
    """
    from megatron.core.activations import quick_gelu as another_quick_gelu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    if config.activation_func is another_quick_gelu:
        config.activation_func = quick_gelu
    is_plain = not config.glu_linear_offset and config.activation_func_clamp_value is None
    # The kernels of experts take no bias: only grouped ones add theirs before.
    has_biases = config.num_moe_experts and config.add_bias_linear and not config.moe_grouped_gemm
    # Layers without experts have no kernel of the second activation.
    has_experts_alone = config.num_moe_experts and not config.moe_shared_expert_intermediate_size
    has_experts_alone = has_experts_alone and config.moe_layer_freq in (1, [1] * config.num_layers)
    config.bias_activation_fusion = bool(
        config.gated_linear_unit
        and not has_biases
        and (
            (config.activation_func is functional.silu and is_plain)
            or (config.activation_func is quick_gelu and has_experts_alone)
        )
    )


def add_without_compiler(config: Any) -> None:
    """Let what a layer adds to its input be added by torch: without dropout that is one kernel, two with a bias."""
    if not config.hidden_dropout:
        config.bias_dropout_fusion = False


def _ready_made(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """bias_swiglu_impl; its output has an attribute `made_by`, unless its inputs are kept in another form or place."""

    @functools.wraps(swiglu)
    def found(inputs: Tensor, bias: Tensor | None, *options: bool) -> Tensor:
        if bias is not None or any(options):
            return swiglu(inputs, bias, *options)
        return _noting(_SwiGLU.apply if inputs.is_cuda else functools.partial(swiglu, bias=None), inputs)

    return found


def _ready_made_weighted(activation: Callable[..., Tensor], steepness: float) -> Callable[..., Tensor]:
    """weighted_bias_swiglu_impl or weighted_bias_quick_geglu_impl; the output has `made_by` as above."""

    @functools.wraps(activation)
    def found(inputs: Tensor, bias: Tensor | None, weights: Tensor, in_fp8: bool = False, *options: Any) -> Tensor:
        if bias is not None or in_fp8:
            return activation(inputs, bias, weights, in_fp8, *options)
        if inputs.is_cuda:
            from slipway.training.activations_gpu import Gate

            return _noting(_Gated.apply, inputs, weights, Gate(steepness, *options))
        return _noting(activation, inputs, None, weights, False, *options)

    return found


def _noting(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    output = make(*arguments)
    output.made_by = functools.partial(make, *arguments)
    return output


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


class _Gated(torch.autograd.Function):
    """activations_gpu.gated. Shapes: inputs [rows, 2 F], weights [rows, 1]; the output is [rows, F]."""

    @staticmethod
    def forward(ctx, inputs, weights, gate):
        from slipway.training.activations_gpu import gated

        inputs, weights, ctx.gate = inputs.contiguous(), weights.contiguous(), gate
        ctx.save_for_backward(inputs, weights)
        return gated(inputs, weights, gate)

    @staticmethod
    def backward(ctx, gradient):
        from slipway.training.activations_gpu import gradients

        inputs, weights = ctx.saved_tensors
        return *gradients(gradient.contiguous(), inputs, weights, ctx.gate), None
