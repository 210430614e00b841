"""Experts' gated activation, weighted by the router, as one kernel for a GPU forward and one backward.

Every value is read once and written once; the clamp, the offset and the weight cost nothing beside that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_PART = 1024  # columns of a row that a program has at once
WARPS = 4


class Gate(NamedTuple):
    """weight · x · sigmoid(steepness · x) · (y + offset), where x is the first half of a row and y the second.

    With a `limit` x is at most that, and y is between -limit and limit.
    """

    steepness: float
    offset: float = 0.0
    limit: float | None = None


@triton.jit
def _gated_kernel(
    inputs,
    weights,
    output,
    steepness,
    offset,
    limit,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """One row of the output."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    for start in range(0, WIDTH, PART):
        column = start + tl.arange(0, PART)
        inside = column < WIDTH
        x = tl.load(inputs + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(inputs + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            x = tl.minimum(x, limit)
            y = tl.minimum(tl.maximum(y, -limit), limit)
        found = weight * x * tl.sigmoid(steepness * x) * (y + offset)
        tl.store(output + row * WIDTH + column, found.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    gradient,
    inputs,
    weights,
    of_inputs,
    of_weights,
    steepness,
    offset,
    limit,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """One row's gradients of the inputs and of the weight."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    of_weight = tl.zeros((PART,), tl.float32)
    for start in range(0, WIDTH, PART):
        column = start + tl.arange(0, PART)
        inside = column < WIDTH
        first = row * 2 * WIDTH + column
        x = tl.load(inputs + first, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(inputs + first + WIDTH, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(gradient + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        passes_x = inside
        passes_y = inside
        if LIMITED:
            passes_x = x <= limit
            passes_y = (y >= -limit) & (y <= limit)
            x = tl.minimum(x, limit)
            y = tl.minimum(tl.maximum(y, -limit), limit)
        share = tl.sigmoid(steepness * x)
        linear = y + offset
        of_weight += given * x * share * linear
        given = given * weight
        of_x = tl.where(passes_x, given * share * (1 + steepness * x * (1 - share)) * linear, 0.0)
        of_y = tl.where(passes_y, given * x * share, 0.0)
        tl.store(of_inputs + first, of_x.to(of_inputs.dtype.element_ty), mask=inside)
        tl.store(of_inputs + first + WIDTH, of_y.to(of_inputs.dtype.element_ty), mask=inside)
    tl.store(of_weights + row, tl.sum(of_weight, 0).to(of_weights.dtype.element_ty))


def gated(inputs: Tensor, weights: Tensor, gate: Gate) -> Tensor:
    """The activation of each row: [rows, F], of the inputs' type.

    Args:
        inputs: [rows, 2 F] contiguous.
        weights: [rows, 1] contiguous, of any float type.
    """
    output = inputs.new_empty(len(inputs), inputs.shape[1] // 2)
    if len(inputs):
        _gated_kernel[(len(inputs),)](inputs, weights, output, *_arguments(output, gate), num_warps=WARPS)
    return output


def gradients(gradient: Tensor, inputs: Tensor, weights: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Gradients of `gated`'s inputs and weights, given that of its output: [rows, F] contiguous."""
    of_inputs, of_weights = torch.empty_like(inputs), torch.empty_like(weights)
    if len(inputs):
        _gradient_kernel[(len(inputs),)](
            gradient, inputs, weights, of_inputs, of_weights, *_arguments(gradient, gate), num_warps=WARPS
        )
    return of_inputs, of_weights


def _arguments(output: Tensor, gate: Gate) -> tuple[float | int | bool, ...]:
    """What both kernels are given after their tensors."""
    width = output.shape[1]
    part = min(LARGEST_PART, triton.next_power_of_2(width))
    return gate.steepness, gate.offset, gate.limit or 0.0, width, part, gate.limit is not None
