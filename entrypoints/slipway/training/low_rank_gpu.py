"""Products of low_rank.py as kernels for a GPU.

One factor has a rank of few dozens, so that nearly all of the time goes into reading a layer's output and writing it
back. Where that is added to, cuBLAS takes 1.5 times as long; where it is read, its largest value is found by the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128  # of the part of the output that a program adds to
WARPS = 4
PROGRAMS = 128  # that read all rows of a layer's output; a GPU has some more processors
READ_AT_ONCE = 128  # columns
STAGES = 4  # of columns that are on their way
LEAST_ROWS = 16 * PROGRAMS  # of fewer a program would have less than a product needs


@triton.jit(do_not_specialize=["rows"])  # the tokens of packed samples and of experts differ from step to step
def _add_product_kernel(
    output,
    low,
    weight,
    rows,
    columns,
    scale,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of output += scale · low · weightᵀ; neighbours share the rows of `low`, whose weight is in the cache."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_rank = tl.arange(0, PADDED)
    first = tl.load(
        low + row[:, None] * RANK + of_rank[None, :],
        mask=(row[:, None] < rows) & (of_rank[None, :] < RANK),
        other=0.0,
    )
    second = tl.load(
        weight + column[None, :] * RANK + of_rank[:, None],
        mask=(column[None, :] < columns) & (of_rank[:, None] < RANK),
        other=0.0,
    )
    place = output + row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    before = tl.load(place, mask=inside, other=0.0)
    added = before.to(tl.float32) + scale * tl.dot(first, second)
    tl.store(place, added.to(before.dtype), mask=inside)


def add_product_(output: Tensor, low: Tensor, weight: Tensor, scale: float) -> None:
    """output += scale · low · weightᵀ, in the memory of `output`.

    Args:
        output: [tokens, N] contiguous, bfloat16 or another float type.
        low: [tokens, rank] contiguous, of the same type; rank ≤ low_rank.LARGEST_RANK.
        weight: [N, rank] contiguous, of the same type.
    """
    rows, columns = output.shape
    if not rows:
        return
    rank = low.shape[1]
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _add_product_kernel[grid](
        output,
        low,
        weight,
        rows,
        columns,
        scale,
        RANK=rank,
        PADDED=max(16, triton.next_power_of_2(rank)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    output,
    weight,
    product,
    peaks,
    rows,
    columns,
    scale,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some rows of scale · output · weight, and the largest absolute value in these rows of the output."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_rank = tl.arange(0, PADDED)
    found = tl.zeros((ROWS, PADDED), tl.float32)
    peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = tl.load(
            output + row[:, None].to(tl.int64) * columns + column[None, :],
            mask=(row[:, None] < rows) & (column[None, :] < columns),
            other=0.0,
        )
        factor = tl.load(
            weight + column[:, None] * RANK + of_rank[None, :],
            mask=(column[:, None] < columns) & (of_rank[None, :] < RANK),
            other=0.0,
        )
        found = tl.dot(part, factor, found)
        peak = tl.maximum(peak, tl.abs(part).to(tl.float32))
    place = product + row[:, None] * RANK + of_rank[None, :]
    inside = (row[:, None] < rows) & (of_rank[None, :] < RANK)
    tl.store(place, (scale * found).to(product.dtype.element_ty), mask=inside)
    tl.store(peaks + tl.program_id(0), tl.max(tl.max(peak, 1), 0))


def product_with_peaks(output: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale · output · weight, the largest absolute values of parts of the output: float32 [n]).

    Args:
        output: [tokens, N] contiguous, bfloat16 or another float type; tokens ≥ LEAST_ROWS.
        weight: [N, rank] contiguous, of the same type; rank ≤ low_rank.LARGEST_RANK.
    """
    rows, columns = output.shape
    rank = weight.shape[1]
    of_program = min(64, triton.next_power_of_2(triton.cdiv(rows, PROGRAMS)))
    programs = triton.cdiv(rows, of_program)
    product = output.new_empty(rows, rank)
    peaks = torch.empty(programs, dtype=torch.float32, device=output.device)
    _product_kernel[(programs,)](
        output,
        weight,
        product,
        peaks,
        rows,
        columns,
        scale,
        RANK=rank,
        PADDED=max(16, triton.next_power_of_2(rank)),
        ROWS=of_program,
        COLUMNS=READ_AT_ONCE,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return product, peaks
