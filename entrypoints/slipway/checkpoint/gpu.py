"""The decoders of quantization.py as Triton kernels: the same bits, at the speed of the device's memory.

Each thread decodes eight neighbouring elements: one load of 4 or 8 bytes and one store of 16. The tile sizes were the
fastest on an H200 (benchmarks/gpu_decode.py --sweep).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOGETHER = 8


@triton.jit
def _fp8_block_kernel(
    weight, scale, out, rows, columns, scale_columns, first_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A program decodes GROUPS × TOGETHER elements of one row; no group crosses the edge of a block."""
    across = tl.cdiv(columns, GROUPS * TOGETHER)
    row = tl.program_id(0) // across
    group = tl.program_id(0) % across * GROUPS + tl.arange(0, GROUPS)
    place = (first_row + row) // BLOCK_ROWS * scale_columns + group * TOGETHER // BLOCK_COLUMNS
    scales = tl.load(scale + place, mask=group * TOGETHER < columns)
    column = group[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    offsets = row.to(tl.int64) * columns + column
    values = tl.load(weight + offsets, mask=column < columns).to(tl.float32) * scales[:, None]
    tl.store(out + offsets, values.to(tl.bfloat16), mask=column < columns)


def decode_fp8_block(
    weight: Tensor, scale: Tensor, block: tuple[int, int], first_row: int = 0, *, groups: int = 256, warps: int = 4
) -> Tensor:
    """quantization.decode_fp8_block for CUDA tensors."""
    weight, scale = weight.contiguous(), scale.float().contiguous()
    rows, columns = weight.shape
    out = torch.empty_like(weight, dtype=torch.bfloat16)
    together = TOGETHER if block[1] % TOGETHER == 0 else 1
    programs = rows * triton.cdiv(columns, groups * together)
    if programs:
        with torch.cuda.device(weight.device):
            _fp8_block_kernel[(programs,)](
                weight, scale, out, rows, columns, scale.shape[1], first_row, *block, groups, together, num_warps=warps
            )
    return out


@triton.jit
def _mxfp4_kernel(words, scales, out, count, WORDS: tl.constexpr):
    """A word is four bytes: eight elements, the lowest nibble first; four words share a scale."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    element = tl.arange(0, 8)
    inside = word < count
    nibbles = tl.load(words + word, mask=inside)[:, None] >> (4 * element)[None, :]
    # The three bits become the lowest exponent and the highest mantissa bit of a float32, and the sign its sign. The
    # value is then 2^126 too small, for zero and the subnormal as well.
    tiny = ((nibbles & 7) << 22) | ((nibbles & 8) << 28)
    exponent = tl.load(scales + word // 4, mask=inside).to(tl.int32)
    # 2^(exponent - 127): a float32 has the same bias. It is subnormal for 0; 255 means NaN.
    bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
    scale = bits.to(tl.float32, bitcast=True)
    values = tiny.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale[:, None]
    tl.store(out + word[:, None] * 8 + element[None, :], values.to(tl.bfloat16), mask=inside[:, None])


def decode_mxfp4(blocks: Tensor, scales: Tensor, *, words: int = 128, warps: int = 2) -> Tensor:
    """quantization.decode_mxfp4 for CUDA tensors."""
    packed = blocks.contiguous().view(-1).view(torch.int32)
    out = torch.empty(*scales.shape[:-1], 32 * scales.shape[-1], dtype=torch.bfloat16, device=blocks.device)
    if packed.numel():
        with torch.cuda.device(blocks.device):
            _mxfp4_kernel[(triton.cdiv(packed.numel(), words),)](
                packed, scales.contiguous(), out, packed.numel(), words, num_warps=warps
            )
    return out


@triton.jit
def _nvfp4_kernel(words, codes, values, out, count, WORDS: tl.constexpr):
    """As _mxfp4_kernel, but two words share a scale, whose float32 value is looked up by its code."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    element = tl.arange(0, 8)
    inside = word < count
    nibbles = tl.load(words + word, mask=inside)[:, None] >> (4 * element)[None, :]
    tiny = ((nibbles & 7) << 22) | ((nibbles & 8) << 28)
    scale = tl.load(values + tl.load(codes + word // 2, mask=inside, other=0).to(tl.int32))
    found = tiny.to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale[:, None]
    tl.store(out + word[:, None] * 8 + element[None, :], found.to(tl.bfloat16), mask=inside[:, None])


def decode_nvfp4(packed: Tensor, scales: Tensor, values: Tensor, *, words: int = 128, warps: int = 2) -> Tensor:
    """quantization.decode_nvfp4 for CUDA tensors."""
    words_of = packed.contiguous().view(-1).view(torch.int32)
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.bfloat16, device=packed.device)
    if words_of.numel():
        with torch.cuda.device(packed.device):
            _nvfp4_kernel[(triton.cdiv(words_of.numel(), words),)](
                words_of, scales.contiguous(), values, out, words_of.numel(), words, num_warps=warps
            )
    return out
