"""How the tensors of a Hugging Face folder are decoded: a codec for each, chosen by what is stored.

A quantised weight is stored under a name of its own with its scales beside it:

gpt-oss               X_blocks, X_scales                                          MXFP4, experts as a stack
compressed-tensors    X_packed, X_scale, X_global_scale (divided by)              NVFP4; without the last MXFP4
bitsandbytes          X as uint8, X.absmax, X.quant_map, X.quant_state.bitsandbytes__nf4  NF4
ModelOpt              X as uint8, X_scale, X_scale_2 (multiplied by)              NVFP4; without the last MXFP4
DeepSeek, Qwen        X as float8_e4m3fn, X_scale_inv (multiplied by)             FP8; MXFP8
the others            X as float8_e4m3fn, X_scale                                 FP8; MXFP8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from slipway.checkpoint import nf4
from slipway.checkpoint.quantization import (
    decode_fp8_block,
    decode_mxfp4,
    decode_mxfp8,
    decode_nvfp4,
    nvfp4_scales,
)
from slipway.checkpoint.shards import AGAIN
from slipway.errors import DataError
from slipway.tensors.bits import Bits, from_torch, to_float32, to_torch
from slipway.tensors.refs import Ref, TensorInfo

Infos = Mapping[str, TensorInfo]
FP8 = ("F8_E4M3",)
# DeepSeek and Qwen; compressed-tensors, fbgemm and ModelOpt. The weight is multiplied by both: "inv" is not 1 / scale.
FP8_SCALES = ("_scale_inv", "_scale")
FP8_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
E8M0 = ("U8", "F8_E8M0")  # compressed-tensors and ModelOpt write the bytes without their dtype
SCALES = (*FP8_SCALES, "_scales", "_scale_2", "_global_scale", "_zero_point")
MX_GROUP, NV_GROUP = 32, 16  # elements with a scale


class Source(Protocol):
    """What reads: huggingface.Reader."""

    def read_stored(self, name: str, ref: Ref) -> Bits:
        """A part of a tensor, as it is stored."""

    @property
    def on_gpu(self) -> bool:
        """GPUs decode."""

    def next_device(self) -> str:
        """The GPU whose turn it is."""


class Codec:
    """A tensor in its decoded form.

    name, info: of the decoded tensor. form: what it is stored in, "" = as it is. parts: the names that it is stored
    under. stored_bytes: of these.
    """

    name: str
    info: TensorInfo
    form = ""
    parts: Sequence[str]
    stored_bytes: int

    def read(self, reader: Source, ref: Ref) -> Bits:
        """A part of the decoded tensor."""
        raise NotImplementedError


def is_scale(name: str) -> bool:
    """The name is one that scales have."""
    return name.endswith((*SCALES, *nf4.PARTS))


def missing_scale(name: str, infos: Infos) -> str:
    """The scale that the quantised tensor stored under `name` lacks; "" if it has all, or is not quantised."""
    info = infos[name]
    if info.dtype == "U8" and name.endswith("_blocks"):
        return _unless(infos, name.removesuffix("_blocks") + "_scales")
    if info.dtype == "U8" and name.endswith("_packed"):
        base = name.removesuffix("_packed")
        return _unless(infos, f"{base}_scale", f"{base}_global_scale")
    if info.dtype == "U8" and (f"{name}_scale" in infos or f"{name}_scale_2" in infos):
        return _unless(infos, f"{name}_scale", f"{name}_scale_2")
    if info.dtype in FP8 and not is_scale(name) and not any(f"{name}{suffix}" in infos for suffix in FP8_SCALES):
        return f"{name}_scale_inv"
    return ""


def _unless(infos: Infos, scale: str, second: str = "") -> str:
    """The name that is not there. A second scale is needed where the first are float8: they are NVFP4's."""
    if scale not in infos:
        return scale
    return second if second and infos[scale].dtype in FP8 and second not in infos else ""


def codec_of(name: str, infos: Infos, blocks: Sequence[tuple[int, int]], folder: Path, reader: Source) -> Codec | None:
    """The codec of the quantised tensor stored under `name`; None for one that is not quantised, or is a scale.

    Args:
        blocks: sizes of FP8 blocks that are possible.
        reader: reads what is stored, for forms that say their shape there.

    Errors: DataError for a scale that is missing, or shapes and dtypes that do not fit together.
    """
    info = infos[name]
    if name + nf4.STATE in infos:
        return Nf4(name, infos, reader, folder)
    if scale := missing_scale(name, infos):
        form = "FP8 tensor " if info.dtype in FP8 else ""
        raise DataError(f"{folder}: {form}{name} has no scale{'' if form else 's'}; download the file with {scale}")
    if name.endswith("_blocks") and (base := name.removesuffix("_blocks")) + "_scales" in infos:
        return ExpertsMxfp4(base, infos, folder)
    if info.dtype == "U8" and (name.endswith("_packed") or f"{name}_scale" in infos):
        return Fp4(name, infos, folder)
    if info.dtype in FP8 and not is_scale(name):
        return Fp8(name, infos, blocks, folder)
    return None


class Plain(Codec):
    """A tensor that is not quantised."""

    def __init__(self, name: str, info: TensorInfo) -> None:
        self.name, self.info, self.stored_bytes, self.parts = name, info, info.bytes, (name,)

    def read(self, reader: Source, ref: Ref) -> Bits:
        return reader.read_stored(self.name, ref)


class Rows(Codec):
    """Some rows of one matrix in a stack that is not quantised: [rows, columns] of a tensor [count, all rows, columns].

    Args:
        of: the matrix's number, and its rows.
    """

    def __init__(self, name: str, of: Ref, stack: TensorInfo) -> None:
        self.name, self.of, self.parts = name, of, (of.name,)
        self.info = TensorInfo(of.shape(stack.shape), stack.dtype)
        self.stored_bytes = self.info.bytes

    def read(self, reader: Source, ref: Ref) -> Bits:
        first, last = self.of.rows or (0, self.info.shape[0])
        rows = (first + ref.rows[0], first + ref.rows[1]) if ref.rows else (first, last)
        return reader.read_stored(self.of.name, Ref(self.of.name, self.of.index, rows))


class ExpertsMxfp4(Codec):
    """MXFP4 blocks [E, rows, G, 16] and scales [E, rows, G] → BF16 [E, 32·G, rows], Hugging Face's orientation."""

    form = "mxfp4"

    def __init__(self, name: str, infos: Infos, folder: Path) -> None:
        self.parts = (f"{name}_blocks", f"{name}_scales")
        blocks, scales = (infos[part] for part in self.parts)
        fits = len(blocks.shape) == 4 and blocks.shape[:3] == scales.shape and blocks.shape[3] == MX_GROUP // 2
        if not fits or (blocks.dtype, scales.dtype) != ("U8", "U8"):
            raise DataError(
                f"{folder}: the shapes of {name}_blocks {list(blocks.shape)} and "
                f"{name}_scales {list(scales.shape)} do not match, or they are not uint8; {AGAIN}"
            )
        experts, rows, groups, _ = blocks.shape
        self.name, self.info = name, TensorInfo((experts, MX_GROUP * groups, rows))
        self.stored_bytes = blocks.bytes + scales.bytes

    def read(self, reader: Source, ref: Ref) -> Bits:
        # The rows of the BF16 form are the columns of the stored one, so some rows are not one stretch of bytes.
        assert ref.rows is None and len(ref.index) <= 1, "MXFP4 is read by whole experts"
        blocks, scales = (reader.read_stored(part, ref) for part in self.parts)
        return _mxfp4(reader, blocks, scales).swapaxes(-1, -2)


def _mxfp4(reader: Source, blocks: Bits, scales: Bits) -> Bits:
    """bfloat16 [..., 32·G] of blocks [..., G, 16] and scales [..., G], on a GPU or here."""
    if not reader.on_gpu:
        return decode_mxfp4(blocks, scales)
    from slipway.checkpoint import gpu

    device = reader.next_device()
    found = gpu.decode_mxfp4(*(to_torch(part, "U8").to(device) for part in (blocks, scales)))
    return from_torch(found.cpu())


class Fp4(Codec):
    """Two e2m1 in a byte [rows, columns / 2] with a scale for each 16 (NVFP4) or 32 (MXFP4) of them → BF16."""

    def __init__(self, stored: str, infos: Infos, folder: Path) -> None:
        self.name, self.stored = stored.removesuffix("_packed"), stored
        self.scale, packed = f"{self.name}_scale", infos[stored]
        scales = infos[self.scale]
        self.form, group = ("nvfp4", NV_GROUP) if scales.dtype in FP8 else ("mxfp4", MX_GROUP)
        self.parts = [stored, self.scale]
        if len(packed.shape) != 2 or scales.dtype not in (*FP8, *E8M0):
            raise DataError(
                f"{folder}: {stored} {list(packed.shape)} with scales of {scales.dtype} is in a form that is not "
                "supported; supported are matrices in NVFP4 (scales of F8_E4M3) and MXFP4 (of U8 or F8_E8M0)"
            )
        rows, half = packed.shape
        if scales.shape != (rows, 2 * half // group) or 2 * half % group:
            raise DataError(
                f"{folder}: {stored} {list(packed.shape)} in {self.form.upper()} needs scales "
                f"{[rows, -(-2 * half // group)]}, but {self.scale} has {list(scales.shape)}; {AGAIN}"
            )
        self.info, self.stored_bytes = TensorInfo((rows, 2 * half)), packed.bytes + scales.bytes
        if self.form == "nvfp4":
            self._find_scale_of_tensor(infos, folder)

    def _find_scale_of_tensor(self, infos: Infos, folder: Path) -> None:
        """compressed-tensors divides by it, ModelOpt multiplies."""
        self.divide = f"{self.name}_global_scale" in infos
        self.of_tensor = f"{self.name}_global_scale" if self.divide else f"{self.name}_scale_2"
        self.parts = [*self.parts, self.of_tensor]
        info = infos[self.of_tensor]
        if info.shape not in ((), (1,), (1, 1)) or info.dtype not in FP8_SCALE_DTYPES:
            raise DataError(
                f"{folder}: {self.of_tensor} is {info.dtype} {list(info.shape)}; one number is needed; {AGAIN}"
            )
        self.of_tensor_dtype = info.dtype

    def read(self, reader: Source, ref: Ref) -> Bits:
        packed, scales = reader.read_stored(self.stored, ref), reader.read_stored(self.scale, ref)
        if self.form == "mxfp4":
            blocks = packed.reshape(*scales.shape, MX_GROUP // 2)
            return _mxfp4(reader, blocks, scales)
        one = to_float32(reader.read_stored(self.of_tensor, Ref(self.of_tensor)), self.of_tensor_dtype).reshape(1)
        values = nvfp4_scales(one, divide=self.divide)
        if not reader.on_gpu:
            return decode_nvfp4(packed, scales, values)
        from slipway.checkpoint import gpu

        device = reader.next_device()
        on_gpu = (to_torch(packed, "U8"), to_torch(scales, "U8"), to_torch(values.view(np.uint32), "F32"))
        return from_torch(gpu.decode_nvfp4(*(part.to(device) for part in on_gpu)).cpu())


class Fp8(Codec):
    """float8_e4m3fn [rows, columns] with a scale for the tensor, each row, each block or each 32 elements → BF16."""

    def __init__(self, name: str, infos: Infos, blocks: Sequence[tuple[int, int]], folder: Path) -> None:
        self.name, weight = name, infos[name]
        self.scale = next(f"{name}{suffix}" for suffix in FP8_SCALES if f"{name}{suffix}" in infos)
        self.parts, scales = (name, self.scale), infos[self.scale]
        if len(weight.shape) != 2 or name.endswith("bias"):  # the biases of experts are a matrix, read row by row
            shape = list(weight.shape)
            raise DataError(
                f"{folder}: FP8 tensor {name} has shape {shape}; FP8 is supported only for matrices of weights"
            )
        self.mx = scales.dtype in E8M0 and scales.shape == (weight.shape[0], -(-weight.shape[1] // MX_GROUP))
        if scales.dtype not in FP8_SCALE_DTYPES and not self.mx:
            raise DataError(
                f"{folder}: {self.scale} is stored as {scales.dtype}; supported are {', '.join(FP8_SCALE_DTYPES)}"
            )
        sizes = [(1, MX_GROUP)] if self.mx else blocks
        if (found := _fp8_grid(weight.shape, scales.shape, sizes)) is None:
            raise self._unfit(weight, scales, sizes[0], folder)
        self.block, self.grid = found
        self.info, self.form = TensorInfo(weight.shape), "mxfp8" if self.mx else "fp8"
        self.scale_dtype, self.stored_bytes = "F8_E8M0" if self.mx else scales.dtype, weight.bytes + scales.bytes

    def _unfit(self, weight: TensorInfo, scales: TensorInfo, block: tuple[int, int], folder: Path) -> DataError:
        rows, columns = weight.shape
        return DataError(
            f"{folder}: {self.name} {[rows, columns]} in blocks of {list(block)} needs scales "
            f"{[-(-rows // block[0]), -(-columns // block[1])]}, but {self.scale} has {list(scales.shape)}; "
            "check weight_block_size in config.json"
        )

    def read(self, reader: Source, ref: Ref) -> Bits:
        weight = reader.read_stored(self.name, ref)
        if self.mx and not reader.on_gpu and weight.shape[1] % MX_GROUP == 0:
            return decode_mxfp8(weight, reader.read_stored(self.scale, ref))
        scales = to_float32(reader.read_stored(self.scale, Ref(self.scale)), self.scale_dtype).reshape(self.grid)
        first_row = ref.rows[0] if ref.rows else 0  # rows need not begin where a block does
        if reader.on_gpu:
            from slipway.checkpoint import gpu

            device = reader.next_device()
            on_gpu = to_torch(weight, "F8_E4M3").to(device), to_torch(scales, "F32").to(device)
            return from_torch(gpu.decode_fp8_block(*on_gpu, self.block, first_row).cpu())
        return decode_fp8_block(weight, scales, self.block, first_row)


class Nf4(Codec):
    """Two 4-bit codes in a byte with a scale for each 64, of bitsandbytes → BF16 (nf4.py)."""

    form = "nf4"

    def __init__(self, name: str, infos: Infos, reader: Source, folder: Path) -> None:
        self.name, self._infos = name, infos
        held = {suffix: infos[name + suffix] for suffix in ("", *nf4.PARTS) if name + suffix in infos}
        self.parts = [name + suffix for suffix in held]
        self.stored_bytes = sum(info.bytes for info in held.values())
        shape = nf4.source_of(held, self._reading(reader), f"{folder}: {name}", None).shape
        self._held, self._where, self.info = held, f"{folder}: {name}", TensorInfo(shape)

    def _reading(self, reader: Source) -> Callable[[str, int, int], Bits]:
        def part(suffix: str, begin: int, end: int) -> Bits:
            info = self._infos[self.name + suffix]
            width = math.prod(info.shape[1:])  # of one row, in whole numbers of which parts of tensors are read
            rows = (begin // width, -(-end // width))
            found = reader.read_stored(self.name + suffix, Ref(self.name + suffix, (), rows)).reshape(-1)
            return found[begin - rows[0] * width : end - rows[0] * width]

        return part

    def read(self, reader: Source, ref: Ref) -> Bits:
        source = nf4.source_of(self._held, self._reading(reader), self._where, None)
        begin = ref.start(self.info.shape)
        shape = ref.shape(self.info.shape)
        return source.read(begin, begin + math.prod(shape)).reshape(shape)


def _fp8_grid(
    weight: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(rows and columns of a block, number of blocks down and across); None if scales of this shape fit none.

    The shape of the scales tells what each is for; config.json only tells the size of blocks.
    """
    rows, columns = weight
    if len(scales) == 4 and scales[1] == scales[3] == 1:  # ModelOpt's FP8_PB_WO: [down, 1, across, 1]
        scales = (scales[0], scales[2])
    if scales in ((), (1,), (1, 1)):
        return (rows, columns), (1, 1)
    if scales in ((rows,), (rows, 1)):
        return (1, columns), (rows, 1)
    grids = ((block, (-(-rows // block[0]), -(-columns // block[1]))) for block in blocks)
    return next(((block, grid) for block, grid in grids if grid == scales), None)
