"""What adapted_activation.py computes, as one kernel for a GPU forward and one backward.

Nearly all of the time goes into reading and writing the tensors that are as wide as the block. Every value of them is
read once and written once; the adapters' products have one factor of few columns, and cost little beside that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # of what a program has at once
WARPS, STAGES = 8, 3  # the latter: how many of them are on their way
PARTS = 16  # of the rows, each gone through by a program of its own
BACK_ROWS, BACK_COLUMNS = 64, 32
BACK_WARPS, BACK_STAGES = 4, 3
BACK_PARTS = 4
SUM_COLUMNS = 64


if triton.knobs.runtime.interpret:
    _sigmoid = tl.sigmoid
else:

    @triton.jit
    def _sigmoid(x):
        """tl.sigmoid in six instructions for its eighteen, most of which are for numbers next to zero or infinity."""
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 power;
            mul.ftz.f32 power, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 power, power;
            add.ftz.f32 power, power, 0f3F800000;
            rcp.approx.ftz.f32 $0, power;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit(do_not_specialize=["rows", "of_part"])  # the tokens of packed samples differ from step to step
def _adapted_activation_kernel(
    base,
    low,
    weight,
    output,
    peaks,
    rows,
    of_part,
    width,
    scale,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NOTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some columns, in a part of the rows, of silu(first half) · second half of base + scale · low · weightᵀ."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    of_rank = tl.arange(0, PADDED)
    of_weight = weight + column[None, :] * RANK + of_rank[:, None]
    inside = (column[None, :] < width) & (of_rank[:, None] < RANK)
    for_gate = tl.load(of_weight, mask=inside, other=0.0)
    for_up = tl.load(of_weight + width * RANK, mask=inside, other=0.0)
    row = tl.arange(0, ROWS)[:, None]
    lows = row * RANK + of_rank[None, :]
    once, twice = row * width + column[None, :], row * 2 * width + column[None, :]
    peak = tl.zeros((ROWS,), tl.float32)
    start = tl.program_id(1).to(tl.int64) * of_part
    left = tl.minimum(rows - start, of_part).to(tl.int32)
    low += start * RANK
    base += start * 2 * width
    output += start * width
    for done in tl.range(0, left, ROWS, num_stages=STAGES):
        there = row < left - done
        here = there & (column[None, :] < width)
        had_low = tl.load(low + done * RANK + lows, mask=there & (of_rank[None, :] < RANK), other=0.0)
        of_base = base + tl.cast(done, tl.int64) * 2 * width
        gate = tl.load(of_base + twice, mask=here, other=0.0).to(tl.float32)
        up = tl.load(of_base + width + twice, mask=here, other=0.0).to(tl.float32)
        gate += scale * tl.dot(had_low, for_gate)
        up += scale * tl.dot(had_low, for_up)
        found = (gate * _sigmoid(gate) * up).to(output.dtype.element_ty)
        tl.store(output + tl.cast(done, tl.int64) * width + once, found, mask=here)
        if NOTED:
            peak = tl.maximum(peak, tl.max(tl.abs(found.to(tl.float32)), 1))
    if NOTED:
        tl.store(peaks + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(peak, 0))


@triton.jit(do_not_specialize=["rows", "of_part"])
def _adapted_gradients_kernel(
    gradient,
    of_low,
    second,
    base,
    low,
    first,
    of_base,
    sums,
    peaks,
    rows,
    of_part,
    width,
    scale,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NOTED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some columns of the gradient of the base, in a part of the rows, and this part's sums for both weights."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    of_rank = tl.arange(0, PADDED)
    in_width, in_rank = column[None, :] < width, of_rank[None, :] < RANK
    of_first = first + column[None, :] * RANK + of_rank[:, None]
    inside = in_width & (of_rank[:, None] < RANK)
    for_gate = tl.load(of_first, mask=inside, other=0.0)
    for_up = tl.load(of_first + width * RANK, mask=inside, other=0.0)
    # Subtracted below: what is added to a product becomes its accumulator, which is not read ahead.
    less = -tl.load(second + of_rank[:, None] * width + column[None, :], mask=inside, other=0.0)
    of_gate_weight = tl.zeros((PADDED, COLUMNS), tl.float32)
    of_up_weight = tl.zeros((PADDED, COLUMNS), tl.float32)
    of_second = tl.zeros((PADDED, COLUMNS), tl.float32)
    peak = tl.zeros((ROWS,), tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    lows = row * RANK + of_rank[None, :]
    once, twice = row * width + column[None, :], row * 2 * width + column[None, :]
    start = part.to(tl.int64) * of_part
    left = tl.minimum(rows - start, of_part).to(tl.int32)
    of_low += start * RANK
    low += start * RANK
    gradient += start * width
    base += start * 2 * width
    of_base += start * 2 * width
    for done in tl.range(0, left, ROWS, num_stages=STAGES):
        there = row < left - done
        here = there & in_width
        given_low = tl.load(of_low + done * RANK + lows, mask=there & in_rank, other=0.0)
        had_low = tl.load(low + done * RANK + lows, mask=there & in_rank, other=0.0)
        behind = tl.cast(done, tl.int64) * width
        given = tl.load(gradient + behind + once, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(base + 2 * behind + twice, mask=here, other=0.0).to(tl.float32)
        up = tl.load(base + 2 * behind + width + twice, mask=here, other=0.0).to(tl.float32)
        given = given - tl.dot(given_low, less)
        gate += scale * tl.dot(had_low, for_gate)
        up += scale * tl.dot(had_low, for_up)
        share = _sigmoid(gate)
        active = gate * share
        of_up = (given * active).to(of_base.dtype.element_ty)
        of_gate = (given * up * (share + active * (1 - share))).to(of_base.dtype.element_ty)
        tl.store(of_base + 2 * behind + twice, of_gate, mask=here)
        tl.store(of_base + 2 * behind + width + twice, of_up, mask=here)
        transposed = tl.trans(had_low)
        of_gate_weight = tl.dot(transposed, of_gate, of_gate_weight)
        of_up_weight = tl.dot(transposed, of_up, of_up_weight)
        of_second = tl.dot(tl.trans(given_low), (active * up).to(of_base.dtype.element_ty), of_second)
        if NOTED:
            peak = tl.maximum(peak, tl.max(tl.abs(of_gate.to(tl.float32)), 1))
            peak = tl.maximum(peak, tl.max(tl.abs(of_up.to(tl.float32)), 1))
    place = sums + (part * RANK + of_rank[:, None]) * (3 * width) + column[None, :]
    tl.store(place, of_gate_weight, mask=inside)
    tl.store(place + width, of_up_weight, mask=inside)
    tl.store(place + 2 * width, of_second, mask=inside)
    if NOTED:
        tl.store(peaks + tl.program_id(0) * tl.num_programs(1) + part, tl.max(peak, 0))


@triton.jit(do_not_specialize=["parts"])
def _weight_gradients_kernel(
    sums, of_first, of_second, parts, width, scale, RANK: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr
):
    """Some columns of what all parts have summed up, as the gradients of the weights."""
    column, of_rank = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    columns = 3 * width
    inside = (column[None, :] < columns) & (of_rank[:, None] < RANK)
    total = tl.zeros((PADDED, COLUMNS), tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * RANK + of_rank[:, None]) * columns + column[None, :], mask=inside, other=0.0)
    is_first = column[None, :] < 2 * width
    first = (scale * total).to(of_first.dtype.element_ty)
    tl.store(of_first + column[None, :] * RANK + of_rank[:, None], first, mask=inside & is_first)
    second = of_second + of_rank[:, None] * width + column[None, :] - 2 * width
    tl.store(second, total.to(of_second.dtype.element_ty), mask=inside & (column[None, :] >= 2 * width))


def forward(base: Tensor, low: Tensor, weight: Tensor, scale: float, output: Tensor, *, noted: bool) -> Tensor | None:
    """Write silu(first half) · second half of base + scale · low · weightᵀ into `output`.

    Args:
        base: [tokens, 2 F] contiguous, bfloat16 or another float type, as all others.
        low: [tokens, rank] contiguous; rank ≤ adapted_activation.LARGEST_RANK.
        weight: [2 F, rank] contiguous.
        output: [tokens, F] contiguous.

    Returns: float32 [n], the largest absolute values of parts of the output, if they are to be `noted`.
    """
    rows, width = output.shape
    grid, of_part, peaks = _parts(output, ROWS, COLUMNS, PARTS, noted=noted)
    if rows:
        _adapted_activation_kernel[grid](
            *(base, low, weight, output, peaks, rows, of_part, width, scale),
            **_padded(low.shape[1]),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            NOTED=noted,
            num_warps=WARPS,
            STAGES=STAGES,
        )
    return peaks


def backward(
    gradient: Tensor,
    of_low: Tensor,
    second: Tensor,
    base: Tensor,
    low: Tensor,
    first: Tensor,
    scale: float,
    *,
    noted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of what `forward` was given, and of the second adapter's first factor.

    Args:
        gradient: [tokens, F] contiguous, that of the output by way of the second layer.
        of_low: [tokens, rank] contiguous, that of the output · secondᵀ.
        second: [rank, F] contiguous.
        base, low, first, scale, noted: as `forward` has them, `first` as its weight.

    Returns: the gradients of base, first and second, in their shapes; float32 [n], the largest absolute values of parts
    of the first of these, if they are to be noted.
    """
    (rows, width), rank = gradient.shape, low.shape[1]
    grid, of_part, peaks = _parts(gradient, BACK_ROWS, BACK_COLUMNS, BACK_PARTS, noted=noted)
    of_base, of_first, of_second = torch.empty_like(base), torch.zeros_like(first), torch.zeros_like(second)
    if rows:
        sums = torch.empty(grid[1], rank, 3 * width, dtype=torch.float32, device=base.device)
        _adapted_gradients_kernel[grid](
            *(gradient, of_low, second, base, low, first, of_base, sums, peaks, rows, of_part, width, scale),
            **_padded(rank),
            ROWS=BACK_ROWS,
            COLUMNS=BACK_COLUMNS,
            NOTED=noted,
            num_warps=BACK_WARPS,
            STAGES=BACK_STAGES,
        )
        _weight_gradients_kernel[(triton.cdiv(3 * width, SUM_COLUMNS),)](
            *(sums, of_first, of_second, grid[1], width, scale), **_padded(rank), COLUMNS=SUM_COLUMNS
        )
    return of_base, of_first, of_second, peaks


def _parts(
    output: Tensor, rows: int, columns: int, parts: int, *, noted: bool
) -> tuple[tuple[int, int], int, Tensor | None]:
    """(programs for the columns and for the rows, rows of each of these, room for what all of them note)."""
    of_part = max(1, triton.cdiv(triton.cdiv(len(output), parts), rows)) * rows
    grid = triton.cdiv(output.shape[1], columns), triton.cdiv(len(output), of_part)
    peaks = torch.empty(grid, dtype=torch.float32, device=output.device).view(-1) if noted and len(output) else None
    return grid, of_part, peaks


def _padded(rank: int) -> dict[str, int]:
    return {"RANK": rank, "PADDED": max(16, triton.next_power_of_2(rank))}
