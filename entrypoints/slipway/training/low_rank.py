"""What an adapter adds to a linear layer, added where the layer's output lies.

NeMo writes the adapter's output, multiplies it by alpha / rank, and adds it: six passes over a tensor of the layer's
full width. One product that accumulates into the output makes two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slipway.training.patches import NEMO, wrap


def add_in_place() -> None:
    """Make NeMo's adapters add in place where no rank shares them and no output is dropped."""
    from nemo.collections.llm.peft import lora

    wrap(lora.LoRALinear, "forward", _adding_in_place, NEMO)


def _adding_in_place(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(layer: Any, inputs: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not _is_plain(layer.adapter):
            return forward(layer, inputs, *arguments, **options)
        output, bias, inputs = layer.base_linear_forward(inputs, *arguments, **options)
        first, second = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
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
