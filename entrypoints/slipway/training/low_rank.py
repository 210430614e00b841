"""What an adapter adds to a linear layer, added where the layer's output lies, and what it keeps for its gradient.

NeMo writes the adapter's output, multiplies it by alpha / rank, and adds it: six passes over a tensor of the layer's
full width. One product that accumulates into the output makes two. The gradient of the layer's inputs is the same
the other way round: the adapter's part is added where the layer's own lies.

An adapter behind a gated activation keeps that activation's output for its gradient: a fifth of all that a layer of
Llama keeps. The activation's own gradient needs its inputs, so these are kept anyway, and the output is computed from
them again (activations.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from slipway.training.patches import NEMO, wrap
from slipway.training.quantised import Peaks

LARGEST_RANK = 128  # of the kernel for GPUs, in which a larger factor does not fit beside the output


def add_in_place() -> None:
    """Make NeMo's adapters add in place where no rank shares them and no output is dropped."""
    from nemo.collections.llm.peft import lora

    wrap(lora.LoRALinear, "forward", _adding_in_place, NEMO)


def _adding_in_place(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(layer: Any, inputs: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not is_plain(layer.adapter):
            return forward(layer, inputs, *arguments, **options)
        output, bias, low = without_adapter(layer, inputs, *arguments, **options)
        return with_adapter(layer, output, low), bias

    return found


def is_plain(adapter: Any) -> bool:
    """The adapter is two products and nothing else."""
    return (
        adapter.config.tensor_model_parallel_size == 1
        and (adapter.dropout is None or not adapter.training)
        and isinstance(adapter.activation, nn.Identity)
    )


def without_adapter(
    layer: Any, inputs: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output of the layer alone, its bias, the adapter's first product) of a layer whose adapter is plain.

    Shapes: inputs [..., K]; the output is [..., N], the product [tokens, rank].
    """
    first = layer.adapter.linear_in.weight
    if getattr(layer.to_wrap, "return_layernorm_output", False):  # the adapter's inputs are made by the layer
        output, bias, inputs = layer.base_linear_forward(inputs, *arguments, **options)
        return output, bias, _LowProduct.apply(inputs, first)[1]
    with _making_again(inputs):
        inputs, low = _LowProduct.apply(inputs, first)
    output, bias, _ = layer.base_linear_forward(inputs, *arguments, **options)
    return output, bias, low


def with_adapter(layer: Any, output: Tensor, low: Tensor) -> Tensor:
    """The output of a layer with its adapter, in the memory of `output`; both as `without_adapter` gives them."""
    second = layer.adapter.linear_out.weight
    return _AddProduct.apply(output, low, second, scale_of(layer.adapter), is_in_fp8(layer))


def scale_of(adapter: Any) -> float:
    """What an adapter's product is multiplied by."""
    return adapter.alpha / adapter.dim


def is_in_fp8(layer: Any) -> bool:
    """The layer's last forward pass was in FP8."""
    return getattr(layer.to_wrap, "fp8", False)


def _making_again(inputs: Tensor) -> AbstractContextManager[Any]:
    """Let autograd keep how `inputs` are made in the place of them, where they know it."""
    made_by, address = getattr(inputs, "made_by", None), inputs.data_ptr()
    if made_by is None:
        return nullcontext()

    def unpack(kept: Tensor | tuple[int, ...]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return made_by().view(kept)

    # Autograd holds both functions as long as it holds what they packed: neither may hold the inputs.
    return saved_tensors_hooks(lambda kept: kept.shape if kept.data_ptr() == address else kept, unpack)


class _LowProduct(torch.autograd.Function):
    """(inputs for the layer, inputs · weightᵀ); the adapter's gradient of the inputs is added to the layer's.

    Shapes: inputs [..., K], weight [rank, K]; the product is [tokens, rank].
    """

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs, weight)
        same = inputs.view_as(inputs)
        if not ctx.needs_input_grad[0]:  # a first layer behind a frozen embedding
            ctx.mark_non_differentiable(same)
        return same, functional.linear(inputs.reshape(-1, inputs.shape[-1]), weight)

    @staticmethod
    def backward(ctx, of_inputs, of_low):
        inputs, weight = ctx.saved_tensors
        of_weight = None
        if of_low is not None:
            if ctx.needs_input_grad[1]:
                of_weight = of_low.t() @ inputs.reshape(-1, inputs.shape[-1])
            if ctx.needs_input_grad[0]:
                of_inputs = _added(of_inputs, of_low, weight).view(inputs.shape)
        return of_inputs, of_weight


def _added(gradient: Tensor | None, low: Tensor, weight: Tensor) -> Tensor:
    """gradient + low · weight in the memory of `gradient`, which the layer has made and nobody else sees."""
    if gradient is None:
        return low @ weight
    return gradient.reshape(-1, gradient.shape[-1]).addmm_(low, weight)


class _AddProduct(torch.autograd.Function):
    """output + scale · low · weightᵀ, in the memory of `output`, which nobody needs without it.

    Shapes: output [..., N], low [tokens, rank], weight [N, rank]. With `in_fp8` the layer will want to know the largest
    value of the output's gradient.
    """

    @staticmethod
    def forward(ctx, output, low, weight, scale, in_fp8):
        ctx.save_for_backward(low, weight)
        ctx.scale, ctx.in_fp8 = scale, in_fp8
        # Another tensor for the same memory: a layer may have returned a view, which autograd lets nobody change.
        added = output.new_empty(0).set_(output.detach())
        _add_product_(added.view(-1, added.shape[-1]), low, weight, scale)
        return added

    @staticmethod
    def backward(ctx, gradient):
        low, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_low = _product_noting_peaks(gradient, rows, weight, ctx.scale) if ctx.in_fp8 else None
        if of_low is None:
            of_low = scaled_product(rows, weight, ctx.scale)
        return gradient, of_low, scaled_product(rows.t(), low, ctx.scale), None, None


def _product_noting_peaks(gradient: Tensor, rows: Tensor, weight: Tensor, scale: float) -> Tensor | None:
    """scale · rows · weight, with the gradient's largest values noted for quantised.py; None where that is slower."""
    from slipway.training.low_rank_gpu import LEAST_ROWS, product_with_peaks

    if len(rows) < LEAST_ROWS or weight.shape[1] > LARGEST_RANK or not gradient.is_contiguous():
        return None
    product, peaks = product_with_peaks(rows, weight, scale)
    Peaks.note(gradient, peaks)
    return product


def _add_product_(output: Tensor, low: Tensor, weight: Tensor, scale: float) -> None:
    """output += scale · low · weightᵀ. Shapes: output [tokens, N], low [tokens, rank], weight [N, rank]."""
    if output.is_cuda and output.is_contiguous() and low.shape[1] <= LARGEST_RANK:
        from slipway.training.low_rank_gpu import add_product_

        add_product_(output, low, weight, scale)
    else:
        output.addmm_(low, weight.t(), alpha=scale)


def scaled_product(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """scale · first · second, scaled before it is rounded and without a kernel of its own for that."""
    product = first.new_empty(first.shape[0], second.shape[1])
    return product.addmm_(first, second, beta=0, alpha=scale)
