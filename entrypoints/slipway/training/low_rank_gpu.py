"""The product that low_rank.py adds to a layer's output, as a kernel for a GPU.

It has a rank of few dozens, so that nearly all of its time goes into reading the output and writing it back. cuBLAS
takes 1.5 times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 128  # of the part of the output that a program adds to
WARPS = 4


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
