"""What an adapter adds to a linear layer, added where the layer's output lies, and what it keeps for its gradient.

NeMo writes the adapter's output, multiplies it by alpha / rank, and adds it: six passes over a tensor of the layer's
full width. One product that accumulates into the output makes two.

An adapter behind a gated activation keeps that activation's output for its gradient: a fifth of all that a layer of
Llama keeps. The activation's own gradient needs its inputs, so these are kept anyway, and the output is computed from
them again.
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

from slipway.training.patches import MEGATRON, NEMO, wrap


def add_in_place() -> None:
    """Make NeMo's adapters add in place where no rank shares them and no output is dropped."""
    from nemo.collections.llm.peft import lora

    wrap(lora.LoRALinear, "forward", _adding_in_place, NEMO)


def make_activations_again() -> None:
    """Let adapters that add in place keep no output of a gated activation. Call it beside `add_in_place`."""
    from megatron.core.transformer import mlp

    wrap(mlp, "bias_swiglu_impl", _to_be_made_again, MEGATRON)


def _adding_in_place(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(layer: Any, inputs: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not _is_plain(layer.adapter):
            return forward(layer, inputs, *arguments, **options)
        output, bias, inputs = layer.base_linear_forward(inputs, *arguments, **options)
        first, second = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
        with _making_again(inputs):
            low = functional.linear(inputs.reshape(-1, inputs.shape[-1]), first)
        return _AddProduct.apply(output, low, second, layer.adapter.alpha / layer.adapter.dim), bias

    return found


def _is_plain(adapter: Any) -> bool:
    """The adapter is two products and nothing else."""
    return (
        adapter.config.tensor_model_parallel_size == 1
        and (adapter.dropout is None or not adapter.training)
        and isinstance(adapter.activation, nn.Identity)
    )


def _to_be_made_again(swiglu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """bias_swiglu_impl, whose output knows how it was made, unless its inputs are kept in another form or place."""

    @functools.wraps(swiglu)
    def found(inputs: Tensor, bias: Tensor | None, *options: bool) -> Tensor:
        output = swiglu(inputs, bias, *options)
        if bias is None and not any(options):
            output.made_by = functools.partial(swiglu, inputs, bias, *options)
        return output

    return found


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


class _AddProduct(torch.autograd.Function):
    """output + scale · low · weightᵀ, in the memory of `output`, which nobody needs without it.

    Shapes: output [..., N], low [tokens, rank], weight [N, rank].
    """

    @staticmethod
    def forward(ctx, output, low, weight, scale):
        ctx.save_for_backward(low, weight)
        ctx.scale = scale
        # Another tensor for the same memory: a layer may have returned a view, which autograd lets nobody change.
        added = output.new_empty(0).set_(output.detach())
        added.view(-1, added.shape[-1]).addmm_(low, weight.t(), alpha=scale)
        return added

    @staticmethod
    def backward(ctx, gradient):
        low, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return gradient, (rows @ weight) * ctx.scale, (rows.t() @ low) * ctx.scale, None
