"""Rotary positions as one kernel for a GPU: see rotary.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that a program turns at once
BOUNDS = 64  # of packed samples that a program looks at at once
NO_END = 2**31 - 1
WARPS = 4


@triton.jit
def position_of(
    place,
    bounds,
    bound_count,
    rank,
    BOUNDS: tl.constexpr,
    PACKED: tl.constexpr,
    RANKS: tl.constexpr,
    NO_END: tl.constexpr,
):
    """In its sample, of the token at a place of this rank's."""
    position = place
    if PACKED:  # counted from where the token's sample begins
        left = place * 0 + NO_END  # tokens of the sample from this one on
        for start in range(0, bound_count, BOUNDS):
            number = start + tl.arange(0, BOUNDS)
            begins = tl.load(bounds + number, mask=number < bound_count, other=0).to(tl.int64) // RANKS
            position = tl.minimum(position, place - tl.max(tl.where(begins <= place, begins, 0), 0))
            left = tl.minimum(left, tl.min(tl.where(begins > place, begins, NO_END), 0) - place)
        if RANKS > 1:  # this rank has the sample's part `rank` of 2 RANKS, and as many from its end
            part = (position + left) // 2
            is_first = position < part
            position += tl.where(is_first, rank * part, (2 * RANKS - 2 - rank) * part)
    return position


# Not compiled anew for other numbers of heads and samples.
@triton.jit(do_not_specialize=["rows", "heads", "bound_count", "rank"])
def _turn_kernel(
    inputs,
    output,
    cosines,
    sines,
    bounds,
    position_stride,
    row_stride,
    head_stride,
    turn_stride,
    rows,
    heads,
    bound_count,
    rank,
    scale,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    BOUNDS: tl.constexpr,
    PACKED: tl.constexpr,
    RANKS: tl.constexpr,
    NO_END: tl.constexpr,
    BY_PAIRS: tl.constexpr,
    BACK: tl.constexpr,
):
    """All heads of one token. Two values are turned together: i and i + HALF of a head; BY_PAIRS 2 i and 2 i + 1 of the
    inputs, which become those two."""
    token = tl.program_id(0).to(tl.int64)
    place = token // rows
    position = position_of(place, bounds, bound_count, rank, BOUNDS, PACKED, RANKS, NO_END)
    column = tl.arange(0, COLUMNS)
    inside = column < HALF
    turn = position * turn_stride + column
    first_cos = (tl.load(cosines + turn, mask=inside, other=0.0) * scale)[None, :]
    first_sin = (tl.load(sines + turn, mask=inside, other=0.0) * scale)[None, :]
    second_cos = (tl.load(cosines + turn + HALF, mask=inside, other=0.0) * scale)[None, :]
    second_sin = (tl.load(sines + turn + HALF, mask=inside, other=0.0) * scale)[None, :]
    apart = column + HALF
    if BY_PAIRS:
        near = 2 * column
        far = 2 * column + 1
    else:
        near = column
        far = apart
    read_near, read_far, write_near, write_far = near, far, column, apart
    if BACK:
        read_near, read_far, write_near, write_far = column, apart, near, far
    inputs += place * position_stride + token % rows * row_stride
    output += token * heads * 2 * HALF
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        here = (head < heads) & inside[None, :]
        x = tl.load(inputs + head * head_stride + read_near[None, :], mask=here, other=0.0).to(tl.float32)
        y = tl.load(inputs + head * head_stride + read_far[None, :], mask=here, other=0.0).to(tl.float32)
        if BACK:
            first = x * first_cos + y * second_sin
            second = y * second_cos - x * first_sin
        else:
            first = x * first_cos - y * first_sin
            second = y * second_cos + x * second_sin
        into = output + head * 2 * HALF
        tl.store(into + write_near[None, :], first.to(output.dtype.element_ty), mask=here)
        tl.store(into + write_far[None, :], second.to(output.dtype.element_ty), mask=here)


def turn(
    inputs: Tensor,
    turns: tuple[Tensor, Tensor],
    bounds: Tensor | None,
    scale: float,
    share: tuple[int, int] = (0, 1),
    *,
    by_pairs: bool = False,
    back: bool = False,
) -> Tensor:
    """Each head turned as its token's position says, times `scale`: contiguous, of the inputs' shape and type.

    Args:
        inputs: [S, B, heads, D], or packed samples one behind the other as [T, heads, D]; the last dimension dense.
        turns: cosines and sines, float32 [positions, 1, 1, D] each, alike in memory.
        bounds: int32 [n], where each packed sample begins, and their end, in the tokens of all ranks; None where every
            row is one sample.
        share: (rank, ranks) where context parallel ranks share each packed sample: of its 2 · ranks equal parts a rank
            has that of its number, and the one that is as far from the end.
        by_pairs: neighbours of the inputs are turned together, and stand D / 2 apart afterwards, as DeepSeek's.
        back: the gradient of the inputs, given that of the output.
    """
    shape = inputs.shape
    inputs = inputs if inputs.dim() == 4 else inputs.unsqueeze(1)
    positions, rows, heads, width = inputs.shape
    output = inputs.new_empty(shape)
    if output.numel():
        _turn_kernel[(positions * rows,)](
            *(inputs, output, *turns, bounds, *inputs.stride()[:3], turns[0].stride(0), rows, heads),
            *(0 if bounds is None else len(bounds), share[0], float(scale)),
            HALF=width // 2,
            COLUMNS=triton.next_power_of_2(width // 2),
            HEADS=HEADS,
            BOUNDS=BOUNDS,
            PACKED=bounds is not None,
            RANKS=share[1],
            NO_END=NO_END,
            BY_PAIRS=by_pairs,
            BACK=back,
            num_warps=WARPS,
        )
    return output
