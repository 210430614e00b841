"""Decoders of quantised weights, bit-identical to their definitions in float32.

MXFP4       OCP Microscaling Formats 1.0: e2m1 elements, two to a byte with the low nibble first, one e8m0
            scale (2^(byte - 127), 255 = NaN) for every 32 of them
FP8 block   DeepSeek-V3: float8_e4m3fn times one scale for each block of rows × columns
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
E8M0_NAN = 255
NAN = 0x7FFF  # the bits of the NaN that GPUs write


@functools.cache
def _byte_pairs() -> Tensor:
    """[256] int32: both bfloat16 values of a byte, the low nibble's in the low half."""
    nibbles = torch.tensor(E2M1, dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack([nibbles[byte & 15], nibbles[byte >> 4]], dim=-1)
    return pairs.view(torch.int32).squeeze(-1)


@functools.cache
def _e8m0() -> Tensor:
    """[256] float32: the value of each scale byte."""
    values = torch.ldexp(torch.ones(256), torch.arange(256) - E8M0_BIAS)
    values[E8M0_NAN] = float("nan")
    return values


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [..., 32·G] from blocks uint8 [..., G, 16] and scales uint8 [..., G].

    Every product is exact in bfloat16 but for the smallest and largest scales, where it is rounded to nearest even.
    """
    pairs = _byte_pairs()[blocks.reshape(-1).int()].view(torch.bfloat16).view(-1, 2 * blocks.shape[-1])
    scale = _e8m0()[scales.reshape(-1, 1).int()]
    exact = _exact_in_bfloat16(scales)
    values = pairs.mul_(scale.bfloat16()) if exact else _with_one_nan((pairs.float() * scale).bfloat16())
    return values.view(*scales.shape[:-1], -1)


def _exact_in_bfloat16(scales: Tensor) -> bool:
    """No product is subnormal, infinite or NaN, so that multiplying in bfloat16 rounds nothing."""
    low, high = scales.aminmax() if scales.numel() else (torch.tensor(127), torch.tensor(127))
    return low.item() >= 3 and high.item() <= 251


def decode_fp8_block(weight: Tensor, scale: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """bfloat16 [rows, columns] from float8_e4m3fn [rows, columns] and the scales of its blocks.

    Args:
        weight: some rows of the tensor, from row `first_row` on.
        scale: [ceil(all rows / block[0]), ceil(columns / block[1])], float32 or float8_e8m0fnu; the whole tensor's.
        block: rows and columns of a block; the blocks at the lower and right edge may be cut off.
    """
    rows, columns = weight.shape
    wanted = torch.arange(first_row, first_row + rows) // block[0]
    spread = scale.float()[wanted].repeat_interleave(block[1], dim=1)[:, :columns]
    values = weight.float().mul_(spread).bfloat16()
    return values if _is_finite(weight, scale) else _with_one_nan(values)


def _is_finite(weight: Tensor, scale: Tensor) -> bool:
    """No code is NaN (0x7f and 0xff: the greatest signed and unsigned byte) and no scale is infinite or NaN."""
    if not weight.numel():
        return True
    greatest = (weight.view(torch.int8).max() < 127) & (weight.view(torch.uint8).max() < 255)
    return bool(greatest & scale.float().isfinite().all())


def _with_one_nan(values: Tensor) -> Tensor:
    """bfloat16 with every NaN the same: processors differ in the one they write, and a checkpoint must not."""
    return values.view(torch.int16).masked_fill_(values.isnan(), NAN).view(torch.bfloat16)
