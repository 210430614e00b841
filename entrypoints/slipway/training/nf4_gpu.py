"""Unpacking NF4 on a GPU: see nf4_base.py. It reads 0.56 bytes of an element and writes two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipway.checkpoint.nf4 import BLOCK

BYTES = 2048  # that a program unpacks


@triton.jit
def _unpack_kernel(codes, scales, table, found, count, BYTES: tl.constexpr, BYTES_OF_A_SCALE: tl.constexpr):
    """Two elements of each byte: the value of its code, times the scale of its block."""
    start = tl.program_id(0).to(tl.int64) * BYTES  # more than 32 bits for the experts of a large layer
    at = start + tl.arange(0, BYTES)
    packed = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
    scale = tl.load(scales + at // BYTES_OF_A_SCALE, mask=at < count, other=0.0)
    high = tl.load(table + (packed >> 4)) * scale
    low = tl.load(table + (packed & 15)) * scale
    into = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(found + into, tl.interleave(high, low).to(found.dtype.element_ty), mask=into < 2 * count)


def unpack_rows(codes: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[rows, elements of the packed row, which may be more than those of the matrix].

    Args:
        codes: uint8 [rows, n / 2], contiguous.
        scales: float32 [rows, n / 64], contiguous.
        table: float32 [16], the value of each code.
    """
    found = torch.empty(len(codes), 2 * codes.shape[1], dtype=dtype, device=codes.device)
    grid = (triton.cdiv(codes.numel(), BYTES),)
    _unpack_kernel[grid](codes, scales, table, found, codes.numel(), BYTES=BYTES, BYTES_OF_A_SCALE=BLOCK // 2)
    return found
