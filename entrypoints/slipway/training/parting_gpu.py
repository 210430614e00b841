"""Queries, keys and values out of one tensor, as one kernel for a GPU and one back: see parting.py."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from slipway.training.rotary_gpu import BOUNDS, NO_END, WARPS, position_of


class Heads(NamedTuple):
    """How the heads lie, and what happens to those of queries and keys.

    Args:
        groups: of heads, which lie behind one another: queries, a key and a value each.
        width: D, of a head.
        turns: cosines and sines, float32 [positions, 1, 1, D] each, alike in memory.
        bounds: int32 [n], where each packed sample begins, and their end, in the tokens of all ranks; None where every
            row is one sample.
        scale: of what is turned.
        share: (rank, ranks) where context parallel ranks share each packed sample, as of `rotary_gpu.turn`.
        norms: weights [D] of the RMS norms of queries and keys, which come before they are turned; None without norms.
        epsilon: of the norms.
    """

    groups: int
    width: int
    turns: tuple[Tensor, Tensor]
    bounds: Tensor | None
    scale: float
    share: tuple[int, int] = (0, 1)
    norms: tuple[Tensor, Tensor] | None = None
    epsilon: float = 0.0


@triton.jit(do_not_specialize=["rows", "groups", "bound_count", "rank"])
def _part_kernel(
    mixed,
    of_mixed,
    query,
    key,
    value,
    cosines,
    sines,
    query_norm,
    key_norm,
    bounds,
    turn_stride,
    rows,
    groups,
    bound_count,
    rank,
    scale,
    epsilon,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUNDS: tl.constexpr,
    PACKED: tl.constexpr,
    RANKS: tl.constexpr,
    NO_END: tl.constexpr,
    NORMED: tl.constexpr,
    BACK: tl.constexpr,
):
    """All heads of one token, group by group, out of `mixed`, normed and turned; BACK into its gradient."""
    token = tl.program_id(0).to(tl.int64)
    position = position_of(token // rows, bounds, bound_count, rank, BOUNDS, PACKED, RANKS, NO_END)
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
    if NORMED:
        first_of_query = tl.load(query_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        second_of_query = tl.load(query_norm + HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        first_of_key = tl.load(key_norm + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        second_of_key = tl.load(key_norm + HALF + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        first_weight = tl.where(slot < QUERIES, first_of_query, tl.where(slot == QUERIES, first_of_key, 1.0))
        second_weight = tl.where(slot < QUERIES, second_of_query, tl.where(slot == QUERIES, second_of_key, 1.0))
    for group in range(groups):
        number = token * groups + group
        place = (number * (QUERIES + 2) + slot) * 2 * HALF + column[None, :]
        of_query = query + (number * QUERIES + slot) * 2 * HALF + column[None, :]
        of_key = key + number * 2 * HALF + column[None, :] + slot * 0
        of_value = value + number * 2 * HALF + column[None, :] + slot * 0
        if NORMED or not BACK:
            x = tl.load(mixed + place, mask=here, other=0.0).to(tl.float32)
            y = tl.load(mixed + place + HALF, mask=here, other=0.0).to(tl.float32)
        if NORMED:
            square = (tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF)
            factor = tl.where(is_turned, tl.rsqrt(square + epsilon)[:, None], 1.0)
            x *= factor
            y *= factor
        if BACK:
            first = tl.load(of_query, mask=is_query, other=0.0).to(tl.float32)
            second = tl.load(of_query + HALF, mask=is_query, other=0.0).to(tl.float32)
            first += tl.load(of_key, mask=is_key, other=0.0).to(tl.float32)
            second += tl.load(of_key + HALF, mask=is_key, other=0.0).to(tl.float32)
            first += tl.load(of_value, mask=is_value, other=0.0).to(tl.float32)
            second += tl.load(of_value + HALF, mask=is_value, other=0.0).to(tl.float32)
            of_x = first * first_cos + second * second_sin
            of_y = second * second_cos - first * first_sin
            if NORMED:
                of_x *= first_weight
                of_y *= second_weight
                along = (tl.sum(of_x * x, 1) + tl.sum(of_y * y, 1)) / (2 * HALF)
                along = tl.where(is_turned, along[:, None], 0.0)
                of_x = factor * (of_x - x * along)
                of_y = factor * (of_y - y * along)
            tl.store(of_mixed + place, of_x.to(of_mixed.dtype.element_ty), mask=here)
            tl.store(of_mixed + place + HALF, of_y.to(of_mixed.dtype.element_ty), mask=here)
        else:
            if NORMED:
                x *= first_weight
                y *= second_weight
            first = (x * first_cos - y * first_sin).to(query.dtype.element_ty)
            second = (y * second_cos + x * second_sin).to(query.dtype.element_ty)
            tl.store(of_query, first, mask=is_query)
            tl.store(of_query + HALF, second, mask=is_query)
            tl.store(of_key, first, mask=is_key)
            tl.store(of_key + HALF, second, mask=is_key)
            tl.store(of_value, first, mask=is_value)
            tl.store(of_value + HALF, second, mask=is_value)


def part(mixed: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normed and turned, and values, out of what one layer has made.

    Args:
        mixed: [S, B, groups · (queries + 2) · D] contiguous. Packed samples stand one behind the other in S.

    Returns: [S, B, groups · queries, D], [S, B, groups, D] and as many values: contiguous, of the type of `mixed`.
    """
    positions, rows, columns = mixed.shape
    queries = columns // (heads.groups * heads.width) - 2
    counts = heads.groups * queries, heads.groups, heads.groups
    query, key, value = (mixed.new_empty(positions, rows, count, heads.width) for count in counts)
    _part(mixed, None, (query, key, value), heads)
    return query, key, value


def joined(parts: tuple[Tensor, Tensor, Tensor], mixed: Tensor | None, heads: Heads) -> Tensor:
    """The gradient of what `part` was given, given those of what it returned, contiguous.

    Args:
        mixed: as `part` has it; None without norms.
    """
    positions, rows, count, width = parts[0].shape
    of_mixed = parts[0].new_empty(positions, rows, (count + 2 * heads.groups) * width)
    _part(mixed, of_mixed, parts, heads)
    return of_mixed


def _part(mixed: Tensor | None, of_mixed: Tensor | None, parts: tuple[Tensor, ...], heads: Heads) -> None:
    positions, rows, count, width = parts[0].shape
    queries = count // heads.groups
    bounds = heads.bounds
    if parts[0].numel():
        _part_kernel[(positions * rows,)](
            *(mixed, of_mixed, *parts, *heads.turns, *(heads.norms or (None, None)), bounds),
            *(heads.turns[0].stride(0), rows, heads.groups, 0 if bounds is None else len(bounds)),
            *(heads.share[0], float(heads.scale), float(heads.epsilon)),
            QUERIES=queries,
            SLOTS=triton.next_power_of_2(queries + 2),
            HALF=width // 2,
            COLUMNS=triton.next_power_of_2(width // 2),
            BOUNDS=BOUNDS,
            PACKED=bounds is not None,
            RANKS=heads.share[1],
            NO_END=NO_END,
            NORMED=heads.norms is not None,
            BACK=of_mixed is not None,
            num_warps=WARPS,
        )
