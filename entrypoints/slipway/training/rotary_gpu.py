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
def _position(
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
    position = _position(place, bounds, bound_count, rank, BOUNDS, PACKED, RANKS, NO_END)
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


@triton.jit(do_not_specialize=["rows", "groups", "bound_count", "rank"])
def _part_kernel(
    mixed,
    query,
    key,
    value,
    cosines,
    sines,
    bounds,
    turn_stride,
    rows,
    groups,
    bound_count,
    rank,
    scale,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUNDS: tl.constexpr,
    PACKED: tl.constexpr,
    RANKS: tl.constexpr,
    NO_END: tl.constexpr,
    BACK: tl.constexpr,
):
    """All heads of one token, group by group, out of `mixed` and turned; BACK into it and turned back."""
    token = tl.program_id(0).to(tl.int64)
    position = _position(token // rows, bounds, bound_count, rank, BOUNDS, PACKED, RANKS, NO_END)
    column = tl.arange(0, COLUMNS)
    inside = column < HALF
    turn = position * turn_stride + column
    slot = tl.arange(0, SLOTS)[:, None]
    is_turned = slot <= QUERIES
    first_cos = tl.where(is_turned, (tl.load(cosines + turn, mask=inside, other=0.0) * scale)[None, :], 1.0)
    first_sin = tl.where(is_turned, (tl.load(sines + turn, mask=inside, other=0.0) * scale)[None, :], 0.0)
    second_cos = tl.where(is_turned, (tl.load(cosines + turn + HALF, mask=inside, other=0.0) * scale)[None, :], 1.0)
    second_sin = tl.where(is_turned, (tl.load(sines + turn + HALF, mask=inside, other=0.0) * scale)[None, :], 0.0)
    here = (slot < QUERIES + 2) & inside[None, :]
    is_query, is_key, is_value = here & (slot < QUERIES), here & (slot == QUERIES), here & (slot == QUERIES + 1)
    for group in range(groups):
        number = token * groups + group
        whole = mixed + (number * (QUERIES + 2) + slot) * 2 * HALF + column[None, :]
        of_query = query + (number * QUERIES + slot) * 2 * HALF + column[None, :]
        of_key = key + number * 2 * HALF + column[None, :] + slot * 0
        of_value = value + number * 2 * HALF + column[None, :] + slot * 0
        if BACK:
            x = tl.load(of_query, mask=is_query, other=0.0).to(tl.float32)
            y = tl.load(of_query + HALF, mask=is_query, other=0.0).to(tl.float32)
            x += tl.load(of_key, mask=is_key, other=0.0).to(tl.float32)
            y += tl.load(of_key + HALF, mask=is_key, other=0.0).to(tl.float32)
            x += tl.load(of_value, mask=is_value, other=0.0).to(tl.float32)
            y += tl.load(of_value + HALF, mask=is_value, other=0.0).to(tl.float32)
            first = (x * first_cos + y * second_sin).to(mixed.dtype.element_ty)
            second = (y * second_cos - x * first_sin).to(mixed.dtype.element_ty)
            tl.store(whole, first, mask=here)
            tl.store(whole + HALF, second, mask=here)
        else:
            x = tl.load(whole, mask=here, other=0.0).to(tl.float32)
            y = tl.load(whole + HALF, mask=here, other=0.0).to(tl.float32)
            first = (x * first_cos - y * first_sin).to(mixed.dtype.element_ty)
            second = (y * second_cos + x * second_sin).to(mixed.dtype.element_ty)
            tl.store(of_query, first, mask=is_query)
            tl.store(of_query + HALF, second, mask=is_query)
            tl.store(of_key, first, mask=is_key)
            tl.store(of_key + HALF, second, mask=is_key)
            tl.store(of_value, first, mask=is_value)
            tl.store(of_value + HALF, second, mask=is_value)


def part(
    mixed: Tensor,
    groups: int,
    width: int,
    turns: tuple[Tensor, Tensor],
    bounds: Tensor | None,
    scale: float,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned as by `turn`, and values, out of what one layer has made: contiguous.

    Args:
        mixed: [S, B, groups · (queries + 2) · width], the heads of each group behind one another: queries, a key and a
            value. Packed samples stand one behind the other in S.
        turns, bounds, scale, share: as of `turn`.

    Returns: [S, B, groups · queries, width], [S, B, groups, width] and as many values.
    """
    positions, rows, columns = mixed.shape
    queries = columns // (groups * width) - 2
    shapes = [(positions, rows, heads, width) for heads in (groups * queries, groups, groups)]
    parts = tuple(mixed.new_empty(shape) for shape in shapes)
    _part(mixed.contiguous(), parts, turns, bounds, scale, share, back=False)
    return parts


def joined(
    parts: tuple[Tensor, Tensor, Tensor],
    turns: tuple[Tensor, Tensor],
    bounds: Tensor | None,
    scale: float,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """The gradient of what `part` was given, given those of what it returned."""
    positions, rows, heads, width = parts[0].shape
    mixed = parts[0].new_empty(positions, rows, (heads + 2 * parts[1].shape[2]) * width)
    _part(mixed, tuple(one.contiguous() for one in parts), turns, bounds, scale, share, back=True)
    return mixed


def _part(
    mixed: Tensor,
    parts: tuple[Tensor, ...],
    turns: tuple[Tensor, Tensor],
    bounds: Tensor | None,
    scale: float,
    share: tuple[int, int],
    *,
    back: bool,
) -> None:
    positions, rows, heads, width = parts[0].shape
    groups = parts[1].shape[2]
    queries = heads // groups
    if mixed.numel():
        _part_kernel[(positions * rows,)](
            *(mixed, *parts, *turns, bounds, turns[0].stride(0), rows, groups),
            *(0 if bounds is None else len(bounds), share[0], float(scale)),
            QUERIES=queries,
            SLOTS=triton.next_power_of_2(queries + 2),
            HALF=width // 2,
            COLUMNS=triton.next_power_of_2(width // 2),
            BOUNDS=BOUNDS,
            PACKED=bounds is not None,
            RANKS=share[1],
            NO_END=NO_END,
            BACK=back,
            num_warps=WARPS,
        )
