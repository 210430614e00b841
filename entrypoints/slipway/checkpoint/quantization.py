"""Decoders of quantised weights, bit-identical to their definitions in float32.

MXFP4       OCP Microscaling Formats 1.0: e2m1 elements, two to a byte with the low nibble first, one e8m0
            scale (2^(byte - 127), 255 = NaN) for every 32 of them
FP8 block   DeepSeek-V3: float8_e4m3fn times one scale for each block of rows × columns

Both compute the product in float32 and round it to bfloat16. MXFP4 uses a table, because a byte and a scale have only
65536 combinations. FP8 is computed, in parts that fit into a core's cache.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np

from slipway.errors import PreflightError
from slipway.tensors.bits import NAN, Bits, e8m0, empty, round_to_bfloat16, to_bfloat16

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CODES = 256
E4M3_NAN = 0x7F
E4M3_SCALE = np.float32(2**120)  # the difference of the exponents' biases: 127 of float32, 7 of e4m3
CODES_AT_ONCE = 1 << 18  # they fit into a core's cache, with all arrays that are computed from them
GPU_DRIVER = Path("/dev/nvidiactl")  # every process that uses a GPU opens it; so torch need not be imported to know


def devices(device: Literal["auto", "cpu", "cuda"]) -> list[str]:
    """What decodes: all GPUs, or "cpu" if there is none; PreflightError for "cuda" without a GPU."""
    count = 0
    if device == "cuda" or (device == "auto" and GPU_DRIVER.exists()):
        import torch

        count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise PreflightError("--device cuda: torch finds no GPU; leave the flag out to decode on the CPU")
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


@functools.cache
def _mxfp4() -> Bits:
    """[scale · 256 + byte] uint32: the two bfloat16 values of a byte; that of the low nibble is in the low half."""
    nibbles, byte = np.array(E2M1, np.float32), np.arange(CODES)
    pairs = np.stack([nibbles[byte & 15], nibbles[byte >> 4]], axis=-1)
    with np.errstate(all="ignore"):
        values = to_bfloat16(e8m0()[:, None, None] * pairs)
    return values.copy().reshape(-1).view(np.uint32)  # a copy: `values` may be memory of the current piece


def decode_mxfp4(blocks: Bits, scales: Bits) -> Bits:
    """bfloat16 [..., 32·G] from blocks uint8 [..., G, 16] and scales uint8 [..., G]."""
    size = blocks.shape[-1]
    values = empty((scales.size, size), np.uint32)
    codes, exponents = blocks.reshape(-1, size), scales.reshape(-1, 1).astype(np.uint16) << 8
    step = CODES_AT_ONCE // size
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        # "clip", although every index is in range: the default checks each of them first.
        np.take(_mxfp4(), exponents[part] | codes[part], out=values[part], mode="clip")
    return values.view(np.uint16).reshape(*scales.shape[:-1], 2 * size * scales.shape[-1])


def decode_fp8_block(weight: Bits, scale: Bits, block: tuple[int, int], first_row: int = 0) -> Bits:
    """bfloat16 [rows, columns] from float8_e4m3fn [rows, columns] and the scales of its blocks.

    Args:
        weight: some rows of the tensor, from row `first_row` on.
        scale: float32 [ceil(all rows / block[0]), ceil(columns / block[1])] of the whole tensor.
        block: rows and columns of a block; blocks at the lower and the right edge may be smaller.
    """
    rows, columns = weight.shape
    values = empty(weight.shape, np.uint16)
    step = min(rows, max(1, CODES_AT_ONCE // max(1, columns)))
    wide, spare = (empty((step, columns), np.uint32) for _ in range(2))
    start = 0
    while start < rows:
        row, inside = divmod(first_row + start, block[0])
        if scale.shape[1] == 1:  # one scale for whole rows: many blocks at once
            stop = min(start + step, rows)
            factors = scale[np.arange(first_row + start, first_row + stop) // block[0]]
        else:
            stop = min(start + step, start + block[0] - inside, rows)
            factors = np.repeat(scale[row], block[1])[:columns]
        _decode_e4m3(weight[start:stop], factors, values[start:stop], wide[: stop - start], spare[: stop - start])
        start = stop
    return values


def _decode_e4m3(codes: Bits, factors: Bits, out: Bits, wide: Bits, spare: Bits) -> None:
    """out = bfloat16(e4m3(codes) · factors), every NaN as bits.NAN; `wide` and `spare` are uint32 scratch memory.

    The seven lower bits of a code are moved to the lowest exponent bits and the highest mantissa bits of a float32.
    That float32 is the value times 2^-120, also for subnormal codes. Sign extension carries the sign along.
    """
    np.copyto(wide.view(np.int32), codes.view(np.int8))
    np.left_shift(wide, 20, out=wide)
    np.bitwise_and(wide, 0x87F00000, out=wide)
    floats = wide.view(np.float32)
    with np.errstate(all="ignore"):
        np.multiply(floats, E4M3_SCALE, out=floats)
        np.multiply(floats, factors, out=floats)
    round_to_bfloat16(wide, out, spare)
    codes = codes & 0x7F
    if codes.size and codes.max() == E4M3_NAN:
        out[codes == E4M3_NAN] = NAN
    if not np.isfinite(factors).all():
        out[np.isnan(floats)] = NAN
