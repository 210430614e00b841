"""Decoders of quantised weights, bit-identical to their definitions in float32.

MXFP4       OCP Microscaling Formats 1.0: e2m1 elements, two to a byte with the low nibble first, one e8m0
            scale (2^(byte - 127), 255 = NaN) for every 32 of them
FP8 block   DeepSeek-V3: float8_e4m3fn times one scale for each block of rows × columns
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from entrypoints.errors import PreflightError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
E8M0_NAN = 255
NAN = 0x7FFF  # the bits of the NaN that GPUs write
ELEMENTS_AT_ONCE = 1 << 19  # what fits into a core's cache with all that is computed from it


def devices(device: Literal["auto", "cpu", "cuda"]) -> list[str]:
    """What decodes: every GPU there is, or "cpu"; PreflightError where a GPU is asked for and there is none."""
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not count:
        raise PreflightError("--device cuda: torch finds no GPU here; leave the flag out to decode on the CPU")
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


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


@functools.cache
def _e4m3() -> Tensor:
    """[256] float32: the value of each float8_e4m3fn code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """[codes.numel()]: the table's entry for each byte. Many times faster than indexing and than torch's own cast."""
    return table.index_select(0, codes.reshape(-1).int())


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [..., 32·G] from blocks uint8 [..., G, 16] and scales uint8 [..., G].

    Every product is exact in bfloat16 but for the smallest and largest scales, where it is rounded to nearest even.
    """
    if blocks.is_cuda:
        from entrypoints.checkpoint import gpu

        return gpu.decode_mxfp4(blocks, scales)
    exact = _exact_in_bfloat16(scales)
    size = 2 * blocks.shape[-1]
    step = ELEMENTS_AT_ONCE // size
    values = torch.empty(scales.numel(), size, dtype=torch.bfloat16)
    parts = (values, blocks.reshape(-1, blocks.shape[-1]), scales.reshape(-1))
    for part, codes, exponents in zip(*(whole.split(step) for whole in parts), strict=True):
        pairs = _look_up(_byte_pairs(), codes).view(torch.bfloat16).view(-1, size)
        scale = _look_up(_e8m0(), exponents).unsqueeze(1)
        if exact:
            torch.mul(pairs, scale.bfloat16(), out=part)
        else:
            part.copy_(pairs.float() * scale)
    if not exact:
        _make_nans_one(values)
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
    if weight.is_cuda:
        from entrypoints.checkpoint import gpu

        return gpu.decode_fp8_block(weight, scale, block, first_row)
    rows, columns = weight.shape
    values, scales = torch.empty(rows, columns, dtype=torch.bfloat16), scale.float()
    step = max(1, ELEMENTS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        codes = weight[start : start + step].view(torch.uint8)
        block_rows = torch.arange(first_row + start, first_row + start + len(codes)) // block[0]
        factors = scales[block_rows].repeat_interleave(block[1], dim=1)[:, :columns]
        values[start : start + step] = _look_up(_e4m3(), codes).view(codes.shape).mul_(factors)
    if not _is_finite(weight, scales):
        _make_nans_one(values)
    return values


def _is_finite(weight: Tensor, scale: Tensor) -> bool:
    """No code is NaN (0x7f and 0xff: the greatest signed and unsigned byte) and no scale is infinite or NaN."""
    if not weight.numel():
        return True
    greatest = (weight.view(torch.int8).max() < 127) & (weight.view(torch.uint8).max() < 255)
    return bool(greatest & scale.isfinite().all())


def _make_nans_one(values: Tensor) -> None:
    """Every NaN of a bfloat16 tensor becomes the same: processors differ in theirs, and a checkpoint must not."""
    values.view(torch.int16).masked_fill_(values.isnan(), NAN)
