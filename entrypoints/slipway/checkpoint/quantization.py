"""Decoders of quantised weights, bit-identical to their definitions in float32.

MXFP4       OCP Microscaling Formats 1.0: e2m1 elements, two to a byte with the low nibble first, one e8m0
            scale (2^(byte - 127), 255 = NaN) for every 32 of them
MXFP8       the same with e4m3 elements, one to a byte
NVFP4       NVIDIA: e2m1 elements like those of MXFP4, one e4m3 scale for every 16 of them, and one float32 for the
            tensor, by which all scales are multiplied or divided
FP8 block   DeepSeek-V3: float8_e4m3fn times one scale for each block of rows × columns

All compute in float32 and round the product to bfloat16. NVFP4's two scales become one float32 first, as in ModelOpt,
compressed-tensors and vLLM. A byte and a byte of scale have only 65536 combinations: those come from a table. FP8 with
float32 scales is computed, in parts that fit into a core's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipway.errors import PreflightError
from slipway.tensors.bits import NAN, Bits, e8m0, empty, round_to_bfloat16, to_bfloat16

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CODES = 256
E4M3_NAN = 0x7F
E4M3_SCALE = np.float32(2**120)  # the difference of the exponents' biases: 127 of float32, 7 of e4m3
CODES_AT_ONCE = 1 << 18  # they fit into a core's cache, with all arrays that are computed from them
IN_EACH_HIGH_BYTE = np.uint64(0x0100_0100_0100_0100)  # times a byte: that byte as the high one of four uint16
GPU_DRIVER = Path("/dev/nvidiactl")  # every process that uses a GPU opens it; so torch need not be imported to know


def devices(device: Literal["auto", "cpu", "cuda"]) -> Sequence[str]:
    """What decodes: all GPUs, or "cpu" if there is none; PreflightError for "cuda" without a GPU."""
    if device == "auto" and GPU_DRIVER.exists():
        return _Gpus()
    found = gpus() if device == "cuda" else []
    if device == "cuda" and not found:
        raise PreflightError("--device cuda: torch finds no GPU; leave the flag out to decode on the CPU")
    return found or ["cpu"]


def gpus() -> list[str]:
    """Every GPU, as torch calls it."""
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


class _Gpus(Sequence[str]):
    """All GPUs, looked for when one is needed: a model in BF16 needs none, and torch takes seconds to look."""

    @functools.cached_property
    def _found(self) -> list[str]:
        return gpus() or ["cpu"]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, place: Any) -> Any:
        return self._found[place]


@functools.cache
def _mxfp4() -> Bits:
    """The table of _pairs for scales in e8m0."""
    return _pairs(e8m0())


def _pairs(scales: Bits) -> Bits:
    """[scale · 256 + byte] uint32: the two bfloat16 values of a byte; that of the low nibble is in the low half.

    Args:
        scales: float32 [256], the value of each byte of scale.
    """
    byte = np.arange(CODES)
    with np.errstate(all="ignore"):
        values = to_bfloat16(scales[:, None] * np.array(E2M1, np.float32)).astype(np.uint32)
    return (values[:, byte & 15] | values[:, byte >> 4] << 16).reshape(-1)


@functools.cache
def _mxfp8() -> Bits:
    """[scale · 256 + code] uint16: e4m3 times e8m0 as bfloat16."""
    with np.errstate(all="ignore"):
        return to_bfloat16(e8m0()[:, None] * e4m3()).reshape(-1).copy()  # what `empty` gave is the piece's


@functools.cache
def e4m3() -> Bits:
    """float32 [256]: the value of each code of float8_e4m3fn; 0x7F and 0xFF are NaN."""
    code = np.arange(CODES)
    exponent, fraction = (code >> 3) & 15, (code & 7).astype(np.float32) / 8
    values = np.ldexp(np.where(exponent == 0, fraction, 1 + fraction), np.maximum(exponent, 1) - 7)
    values[code & 0x7F == E4M3_NAN] = np.nan
    return np.where(code & 0x80, -values, values).astype(np.float32)


def _look_up(table: Bits, codes: Bits, scales: Bits) -> Bits:
    """table[scale · 256 + code] for all codes, flat.

    Args:
        codes: uint8, flat; the same number of them, a multiple of 4, for each scale.
        scales: uint8, flat.
    """
    values = empty(codes.shape, table.dtype)
    each = codes.size // max(1, scales.size)
    step = CODES_AT_ONCE // max(1, each)
    lanes = empty((min(step, scales.size), each // 4), np.uint64)
    for start in range(0, scales.size, step):
        part = scales[start : start + step]
        some = lanes[: part.size]
        # Four indices in a word: NumPy is slow at repeating each scale a few times, and quick at copying columns.
        np.multiply(part, IN_EACH_HIGH_BYTE, out=some[:, 0])
        for column in range(1, some.shape[1]):
            some[:, column] = some[:, 0]
        at = slice(start * each, (start + part.size) * each)
        index = some.reshape(-1).view(np.uint16)
        np.bitwise_or(index, codes[at], out=index)
        # "clip", although every index is in range: the default checks each of them first.
        np.take(table, index, out=values[at], mode="clip")
    return values


def decode_mxfp4(blocks: Bits, scales: Bits) -> Bits:
    """bfloat16 [..., 32·G] from blocks uint8 [..., G, 16] and scales uint8 [..., G]."""
    values = _look_up(_mxfp4(), blocks.reshape(-1), scales.reshape(-1))
    return values.view(np.uint16).reshape(*scales.shape[:-1], 2 * blocks.shape[-1] * scales.shape[-1])


def decode_mxfp8(weight: Bits, scales: Bits) -> Bits:
    """bfloat16 [rows, columns] from float8_e4m3fn [rows, columns] and scales uint8 [rows, columns / 32] in e8m0."""
    return _look_up(_mxfp8(), weight.reshape(-1), scales.reshape(-1)).reshape(weight.shape)


def decode_nvfp4(packed: Bits, scales: Bits, values: Bits) -> Bits:
    """bfloat16 [rows, columns] from uint8 [rows, columns / 2] and the scales of 16 elements each.

    Args:
        scales: the bits of float8_e4m3fn [rows, columns / 16].
        values: float32 [256], what each of these codes multiplies by: nvfp4_scales of the tensor.
    """
    found = _look_up(_pairs(values), packed.reshape(-1), scales.reshape(-1))
    return found.view(np.uint16).reshape(len(packed), 2 * packed.shape[1])


def nvfp4_scales(of_tensor: Bits, *, divide: bool) -> Bits:
    """float32 [256]: each code of e4m3 times, or by, the float32 scale of the tensor."""
    with np.errstate(all="ignore"):
        return e4m3() / of_tensor if divide else e4m3() * of_tensor


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
        if scale.shape[1] == 1 or block[0] == 1:  # a scale for whole rows, or scales of single rows: many rows at once
            stop = min(start + step, rows)
            factors = scale[np.arange(first_row + start, first_row + stop) // block[0]]
            if scale.shape[1] > 1:
                factors = np.repeat(factors, block[1], axis=1)[:, :columns]
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
