"""Parts of tensors as NumPy arrays of bits: for every element an unsigned integer, as wide as the dtype.

NumPy has no bfloat16, and torch needs seconds and half a gigabyte for its import. So everything that only moves
elements does without torch. The dtype is passed separately, in safetensors' spelling.

While a thread works on a piece, its arrays come from a region that it uses again for the next piece. The kernel would
have to clear fresh memory, which costs more than most of the work here. The peak is that of the largest piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from slipway.tensors.refs import DTYPE_BYTES, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

Bits = np.ndarray

NAN = 0x7FFF  # every NaN becomes this bfloat16, which GPUs write; processors differ, and results must not
E8M0_BIAS = 127
E8M0_NAN = 255
REGION_BYTES = 1 << 30  # of addresses: memory is taken page by page, when it is first written
ALIGNMENT = 64  # a line of the cache: two arrays share none
TILE = (512, 64)  # rows and columns that are transposed together


def bits_type(dtype: str) -> np.dtype:
    """The NumPy dtype for the bits of a dtype."""
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")


class _Region(threading.local):
    """A thread's memory for its current piece; `used` counts bytes."""

    memory: Bits | None = None
    used: int | None = None  # None while the thread works on no piece
    number: int = 0  # of the piece


_region = _Region()


@contextmanager
def piece() -> Iterator[None]:
    """Inside the block, arrays from `empty` are valid only until its end."""
    if _region.memory is None:
        _region.memory = np.empty(REGION_BYTES, np.uint8)
    _region.used = 0
    _region.number += 1
    try:
        yield
    finally:
        _region.used = None


@contextmanager
def scratch() -> Iterator[None]:
    """Inside the block, arrays from `empty` are valid only until its end; the piece's others stay."""
    before = _region.used
    try:
        yield
    finally:
        _region.used = before
        _region.number += 1


def piece_number() -> int:
    """A number that changes when memory of this thread's piece is given up: what was in it is gone."""
    return _region.number


def empty(shape: Sequence[int], kind: np.dtype | type) -> Bits:
    """An array with any content, like numpy.empty: from the thread's region if there is room."""
    count = math.prod(shape) * np.dtype(kind).itemsize
    if _region.memory is None or _region.used is None or _region.used + count > REGION_BYTES:
        return np.empty(shape, kind)
    start = _region.used
    _region.used += -(-count // ALIGNMENT) * ALIGNMENT
    return _region.memory[start : start + count].view(kind).reshape(shape)


def contiguous(part: Bits) -> Bits:
    """The part in row-major order; no copy if it is in this order already."""
    if part.flags.c_contiguous:
        return part
    copy = empty(part.shape, part.dtype)
    if part.ndim == 2 and part.strides[0] < part.strides[1]:
        transpose(part, copy)
    else:
        copy[...] = part
    return copy


def transpose(part: Bits, copy: Bits) -> None:
    """copy = part, a matrix in column-major order.

    Tile by tile: NumPy goes row by row, and each element of a row would bring a line of 64 bytes into the cache that is
    gone before its neighbour is needed.
    """
    rows, columns = part.shape
    for row in range(0, rows, TILE[0]):
        for column in range(0, columns, TILE[1]):
            tile = slice(row, row + TILE[0]), slice(column, column + TILE[1])
            copy[tile] = part[tile]


def address(content: memoryview) -> int:
    """The address in memory of the first byte."""
    return np.frombuffer(content, np.uint8).__array_interface__["data"][0]


def data(part: Bits) -> memoryview:
    """The bytes of a part in row-major order; no copy if it is in this order already."""
    return contiguous(part).reshape(-1).view(np.uint8).data


def to_bfloat16(values: Bits) -> Bits:
    """float32 → the bits of bfloat16, rounded to nearest, ties to even; every NaN becomes NAN."""
    found, wide = empty(values.shape, np.uint16), values.view(np.uint32)
    round_to_bfloat16(wide, found, empty(values.shape, np.uint32))
    found[np.isnan(values)] = NAN
    return found


def round_to_bfloat16(wide: Bits, out: Bits, spare: Bits) -> None:
    """The bits of float32 → the bits of bfloat16, rounded to nearest, ties to even; the result for NaN is undefined.

    Args:
        wide, out: uint32 and uint16 of the same shape.
        spare: uint32 scratch memory of this shape.
    """
    # Add just under half of the last kept bit, and one more if that bit is set; then cut off. It works on bits, in
    # place: five fast passes, where a conversion with a test for NaN would take ten.
    np.right_shift(wide, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(spare, wide, out=spare)
    np.right_shift(spare, 16, out=out, casting="unsafe")


def to_float32(part: Bits, dtype: str) -> Bits:
    """The values of a floating-point part, as float32 of the same shape."""
    if dtype == "BF16":
        return (part.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E8M0":
        return e8m0()[part]
    return part.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32)


def e8m0() -> Bits:
    """float32 [256]: the value of each scale byte, 2^(byte - 127); 255 is NaN."""
    values = np.ldexp(np.float32(1), np.arange(E8M0_NAN) - E8M0_BIAS)
    return np.append(values, np.float32(np.nan))


def as_dtype(part: Bits, have: str, want: str) -> Bits:
    """The part in another floating-point dtype, BF16 or F32."""
    if have == want:
        return part
    values = to_float32(contiguous(part), have)
    return to_bfloat16(values) if want == "BF16" else values.view(np.uint32)


def to_torch(part: Bits, dtype: str) -> Tensor:
    """The same elements as a torch tensor; it shares the memory if the part is in row-major order."""
    import torch

    return torch.from_numpy(contiguous(part)).view(getattr(torch, TORCH_NAMES[dtype]))


def from_torch(tensor: Tensor) -> Bits:
    """The bits of a tensor on the CPU; they share its memory."""
    import torch

    kinds = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.detach().view(kinds[tensor.element_size()]).numpy()
