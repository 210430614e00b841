"""Inputs and gradients in FP8: each is read as seldom as possible, and written once.

A product in FP8 needs the largest value of its factor before the factor can be scaled. Transformer Engine reads it for
that once more. An adapter has just read the gradient of its layer's output for its own product, and an activation has
written the layer's inputs: both have found the largest value by the way (`Peaks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipway.training.patches import TRANSFORMER_ENGINE, wrap


@dataclass(frozen=True)
class Peaks:
    """What is known of a tensor's largest value.

    Args:
        values: float32 [n], the largest absolute values of n parts of the tensor that are all of it.
        version: the tensor's, by which torch counts its changes.
    """

    values: Tensor
    version: int

    @classmethod
    def note(cls, tensor: Tensor, values: Tensor) -> None:
        """Remember them with the tensor, which torch hands on as the same object."""
        tensor.peaks = cls(values, tensor._version)

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor | None:
        """The values, or None where they are not known or the tensor was changed since."""
        found = getattr(tensor, "peaks", None)
        return found.values if found is not None and found.version == tensor._version else None


def quantise_once() -> None:
    """Let layers turn what they are given into FP8 in one pass where its largest value is known.

    Layers with a frozen weight do so with the gradient of their output, and one way round. The other way round is for
    the gradient of a weight. Transformer Engine leaves it out where a layer has no norm in front, and makes it where
    it has one.
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    wrap(TransformerEngineBaseModule, "grad_output_preprocess", _in_one_pass, TRANSFORMER_ENGINE)
    wrap(Float8CurrentScalingQuantizer, "quantize_impl", _knowing_the_largest, TRANSFORMER_ENGINE)


def _knowing_the_largest(quantize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(quantize)
    def found(quantizer: Any, tensor: Tensor) -> Any:
        peaks = Peaks.of(tensor)
        if peaks is None:
            return quantize(quantizer, tensor)
        with _largest_of(peaks, quantizer):
            return quantize(quantizer, tensor)

    return found


@contextmanager
def _largest_of(peaks: Tensor, quantizer: Any) -> Iterator[None]:
    """Let a quantizer of Transformer Engine's take the largest value from what is known."""
    torch.amax(peaks, 0, keepdim=True, out=quantizer.amax)
    quantizer.use_existing_amax = True
    try:
        yield
    finally:
        quantizer.use_existing_amax = False


def _in_one_pass(prepare: Callable[..., Any]) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    @functools.wraps(prepare)
    def found(context: Any, gradient: Tensor, row_parallel: bool, quantizer: Any) -> Any:
        if quantizer is None or context.requires_wgrad or context.use_bias:
            return prepare(context, gradient, row_parallel, quantizer)
        quantizer.set_usage(columnwise=False)
        peaks = Peaks.of(gradient)
        if peaks is None or not isinstance(quantizer, Float8CurrentScalingQuantizer):
            return prepare(context, gradient, row_parallel, quantizer)
        with _largest_of(peaks, quantizer):
            return prepare(context, gradient, row_parallel, quantizer)

    return staticmethod(found)
