"""Hugging Face folders of safetensors: read by offset, decode while reading, write at final offsets.

A file has 8 bytes with the length of the header (little endian), the header (JSON: name → dtype, shape, data_offsets)
and the data. Everything in a file is checked before it is used: the length of the header before it is read; of every
tensor, that it lies inside the file, has as many bytes as its shape and dtype need, and overlaps no other.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint.quantization import decode_fp8_block, decode_mxfp4
from slipway.errors import DataError
from slipway.tensors.bits import Bits, bits_type, contiguous, empty, from_torch, to_float32, to_torch
from slipway.tensors.refs import DTYPE_BYTES, INDEX, TORCH_NAMES, Ref, TensorInfo

SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
FP8 = ("F8_E4M3",)
# DeepSeek and Qwen; compressed-tensors and fbgemm. The weight is multiplied by both: "inv" is not 1 / scale.
FP8_SCALES = ("_scale_inv", "_scale")
FP8_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
QUANT_METHODS = ("fp8", "mxfp4", "compressed-tensors", "fbgemm_fp8")
AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: `offset` is that of its first byte, from the start of the file."""

    file: Path
    offset: int
    info: TensorInfo


def read_header(file: Path) -> dict[str, Stored]:
    """Name → place of every tensor of one file; DataError for a file that is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)  # fewer bytes if the file is that short
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DataError(
                    f"{file}: not a safetensors file, or incomplete (header of {length} bytes in {size}); {AGAIN}"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise DataError(f"{file}: cannot read it ({error.strerror}); {AGAIN}") from None
    except ValueError:
        raise DataError(f"{file}: the header is not JSON; {AGAIN}") from None
    if not isinstance(header, dict):
        raise DataError(f"{file}: the header is not a JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    stored = {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_overlap(file, stored)
    return stored


def _stored(file: Path, name: str, entry: Any, data_start: int, size: int) -> Stored:
    """The place of a tensor from its header entry, checked; `size`: bytes of the file."""
    try:
        begin, end = entry["data_offsets"]
        info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
        numbers = [begin, end, *info.shape]
        # Not isinstance: True is an int. JSON has numbers of any length, and what follows multiplies them.
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{file}: the header entry of tensor {name} is damaged; {AGAIN}") from None
    if info.dtype not in DTYPE_BYTES:
        raise DataError(f"{file}: tensor {name} has the unknown dtype {info.dtype!r}; {AGAIN}")
    if begin + info.bytes != end:
        raise DataError(f"{file}: tensor {name} has {end - begin} bytes, but its shape needs {info.bytes}; {AGAIN}")
    if data_start + end > size:
        raise DataError(f"{file}: the file ends inside tensor {name} ({size} bytes of {data_start + end}); {AGAIN}")
    return Stored(file, data_start + begin, info)


def _check_overlap(file: Path, stored: Mapping[str, Stored]) -> None:
    at, before = 0, ""
    # Of two at the same place an empty one comes first, else it would seem to lie inside the other.
    for name, place in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].info.bytes)):
        if place.offset < at:
            raise DataError(f"{file}: tensors {before} and {name} overlap; {AGAIN}")
        at, before = place.offset + place.info.bytes, name


def read_folder(folder: Path) -> dict[str, Stored]:
    """Name → place of every tensor of a model folder; DataError if the index and the files disagree."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return read_header(folder / SINGLE)
        raise DataError(f"{folder} has neither {INDEX} nor {SINGLE}; give the folder of a Hugging Face model")
    where = read_index(index)
    stored: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).exists():
            raise DataError(f"{index} names {file}, which is missing; download this file")
        for name, place in read_header(folder / file).items():
            if name in stored:
                raise DataError(f"{folder}: tensor {name} is in {stored[name].file.name} and in {file}; {AGAIN}")
            stored[name] = place
    for name, file in where.items():
        if name not in stored or stored[name].file.name != file:
            raise DataError(f"{index}: tensor {name} is not in {file}; {AGAIN}")
    return stored


def read_index(index: Path) -> dict[str, str]:
    """Tensor → file beside the index; DataError for an index without such a map."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # Only names of files in the folder: a foreign index must not lead to other files of this machine.
        if not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{index} is damaged, it does not map tensors to files; {AGAIN}") from None
    return where


# ---------------------------------------------------------------------------- reading


class Reader:
    """The tensors of a Hugging Face folder in their BF16 form, whatever form they are stored in.

    `tensors` maps each name to its decoded shape and dtype; `read` returns any part of one. Threads may share it.

    Args:
        folder: the model.
        stored: where its tensors are.
        config: its config.json, for `quantization_config`.
        devices: what decodes: "cpu", or GPUs, which take turns.
    """

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, Stored],
        config: Mapping[str, Any],
        devices: Sequence[str] = ("cpu",),
    ) -> None:
        self.folder, self.stored = folder, stored
        self._devices, self._turns = devices, itertools.cycle(devices)
        self.block = _block_size(config, folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._codecs: dict[str, _Codec] = {}
        self._descriptors: dict[Path, int] = {}
        for name in self.stored:
            if codec := self._codec_of(name):
                self.tensors[codec.name] = codec.info
                self._codecs[codec.name] = codec

    @property
    def quantized(self) -> list[str]:
        """The names of the tensors that `read` decodes."""
        return [name for name, codec in self._codecs.items() if not isinstance(codec, _Plain)]

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor, in its decoded dtype."""
        return self._codecs[ref.name].read(self, ref)

    @property
    def on_gpu(self) -> bool:
        """GPUs decode."""
        return self._devices[0] != "cpu"

    def next_device(self) -> str:
        """The GPU whose turn it is."""
        return next(self._turns)

    def source_bytes(self, ref: Ref) -> int:
        """How many bytes `read` reads for a part, for the progress and the memory."""
        codec = self._codecs[ref.name]
        part = TensorInfo(ref.shape(codec.info.shape), codec.info.dtype).bytes
        return part * codec.stored_bytes // max(1, codec.info.bytes)

    def files(self) -> list[Path]:
        """Every safetensors file of the folder."""
        return sorted({place.file for place in self.stored.values()})

    def read_stored(self, name: str, ref: Ref) -> Bits:
        """A part of a tensor, as it is stored."""
        place = self.stored[name]
        part = empty(ref.shape(place.info.shape), bits_type(place.info.dtype))
        offset = place.offset + ref.start(place.info.shape) * DTYPE_BYTES[place.info.dtype]
        self._fill(part.reshape(-1).view(np.uint8).data, place.file, offset, name)
        return part

    def _fill(self, view: memoryview, file: Path, offset: int, name: str) -> None:
        # Two threads may open the same file at the same time: the second descriptor is a waste, but no fault.
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = self._descriptors.setdefault(file, os.open(file, os.O_RDONLY))
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise DataError(f"{file}: the file ends inside tensor {name}; {AGAIN}")
            done += count

    def _codec_of(self, name: str) -> _Codec | None:
        """The codec of the tensor whose weights are stored under `name`; None for scales, which another tensor has."""
        info = self.stored[name].info
        if name.endswith("_blocks") and (scales := name.removesuffix("_blocks") + "_scales") in self.stored:
            return _Mxfp4(name.removesuffix("_blocks"), info, self.stored[scales].info, self.folder)
        if name.endswith("_blocks") and info.dtype == "U8":
            raise DataError(
                f"{self.folder}: {name} has no scales; download the file with {name.removesuffix('_blocks')}_scales"
            )
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in self.stored:
            return None
        if self._is_fp8(_scaled(name)):
            return None
        if info.dtype in FP8:
            return self._fp8_codec(name, info)
        return _Plain(name, info)

    def _is_fp8(self, name: str) -> bool:
        return name in self.stored and self.stored[name].info.dtype in FP8

    def _fp8_codec(self, name: str, info: TensorInfo) -> _Fp8:
        for scale in (f"{name}{suffix}" for suffix in FP8_SCALES):
            if scale in self.stored:
                return _Fp8(name, info, scale, self.stored[scale].info, self.block, self.folder)
        raise DataError(f"{self.folder}: FP8 tensor {name} has no scale; download the file with {name}_scale_inv")


def _scaled(name: str) -> str:
    """The FP8 weight that a scale of this name belongs to, also a scale of its activations; "" for other names."""
    if name.endswith(".input_scale"):
        return name.removesuffix("input_scale") + "weight"
    return next((name.removesuffix(suffix) for suffix in FP8_SCALES if name.endswith(suffix)), "")


def _block_size(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Rows and columns of an FP8 block; DataError for a `quantization_config` of an unknown kind."""
    where = folder / "config.json"
    about = config.get("quantization_config") or {}
    try:
        method, block = about.get("quant_method"), about.get("weight_block_size")
        for group in (about.get("config_groups") or {}).values():
            block = block or group["weights"].get("block_structure")
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            f"{where}: quantization_config is damaged; download the config.json of this model again"
        ) from None
    if method not in (None, *QUANT_METHODS):
        raise DataError(
            f"{where}: quant_method is {method!r}, which is not supported; supported are {', '.join(QUANT_METHODS)}"
        )
    block = block or [128, 128]  # DeepSeek's; of no importance where scales are not for blocks
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise DataError(f"{where}: weight_block_size is {block!r}; it must be two positive numbers")
    return block[0], block[1]


class _Plain:
    """A tensor that is not quantised."""

    def __init__(self, name: str, info: TensorInfo) -> None:
        self.name, self.info, self.stored_bytes = name, info, info.bytes

    def read(self, reader: Reader, ref: Ref) -> Bits:
        return reader.read_stored(self.name, ref)


class _Mxfp4:
    """MXFP4 blocks [E, rows, G, 16] and scales [E, rows, G] → BF16 [E, 32·G, rows], Hugging Face's orientation."""

    def __init__(self, name: str, blocks: TensorInfo, scales: TensorInfo, folder: Path) -> None:
        if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape or blocks.shape[3] != 16:
            raise DataError(
                f"{folder}: the shapes of {name}_blocks {list(blocks.shape)} and "
                f"{name}_scales {list(scales.shape)} do not match; {AGAIN}"
            )
        experts, rows, groups, _ = blocks.shape
        self.name, self.info = name, TensorInfo((experts, 32 * groups, rows))
        self.stored_bytes = blocks.bytes + scales.bytes

    def read(self, reader: Reader, ref: Ref) -> Bits:
        # The rows of the BF16 form are the columns of the stored one, so some rows are not one stretch of bytes.
        assert ref.rows is None and len(ref.index) <= 1, "MXFP4 is read by whole experts"
        blocks = reader.read_stored(f"{self.name}_blocks", ref)
        scales = reader.read_stored(f"{self.name}_scales", ref)
        if reader.on_gpu:
            from slipway.checkpoint import gpu

            device = reader.next_device()
            found = gpu.decode_mxfp4(*(to_torch(part, "U8").to(device) for part in (blocks, scales)))
            return from_torch(found.cpu()).swapaxes(-1, -2)
        return decode_mxfp4(blocks, scales).swapaxes(-1, -2)


class _Fp8:
    """float8_e4m3fn [rows, columns] with a scale for the tensor, for each row or for each block → BF16."""

    def __init__(
        self, name: str, weight: TensorInfo, scale: str, scales: TensorInfo, block: tuple[int, int], folder: Path
    ) -> None:
        if scales.dtype not in FP8_SCALE_DTYPES:
            raise DataError(
                f"{folder}: {scale} is stored as {scales.dtype}; supported are {', '.join(FP8_SCALE_DTYPES)}"
            )
        if len(weight.shape) != 2 or name.endswith("bias"):  # the biases of experts are a matrix, read row by row
            shape = list(weight.shape)
            raise DataError(
                f"{folder}: FP8 tensor {name} has shape {shape}; FP8 is supported only for matrices of weights"
            )
        rows, columns = weight.shape
        # The shape of the scales tells what each is for; config.json only tells the size of blocks.
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if scales.shape in ((), (1,), (1, 1)):
            block, grid = (rows, columns), (1, 1)
        elif scales.shape in ((rows,), (rows, 1)):
            block, grid = (1, columns), (rows, 1)
        elif scales.shape != grid:
            raise DataError(
                f"{folder}: {name} {list(weight.shape)} in blocks of {list(block)} needs scales {list(grid)}, "
                f"but {scale} has {list(scales.shape)}; check weight_block_size in config.json"
            )
        self.name, self.info, self.scale, self.block, self.grid = name, TensorInfo(weight.shape), scale, block, grid
        self.scale_dtype, self.stored_bytes = scales.dtype, weight.bytes + scales.bytes

    def read(self, reader: Reader, ref: Ref) -> Bits:
        weight = reader.read_stored(self.name, ref)
        scales = to_float32(reader.read_stored(self.scale, Ref(self.scale)), self.scale_dtype).reshape(self.grid)
        first_row = ref.rows[0] if ref.rows else 0  # rows need not begin where a block does
        if reader.on_gpu:
            from slipway.checkpoint import gpu

            device = reader.next_device()
            on_gpu = to_torch(weight, "F8_E4M3").to(device), to_torch(scales, "F32").to(device)
            return from_torch(gpu.decode_fp8_block(*on_gpu, self.block, first_row).cpu())
        return decode_fp8_block(weight, scales, self.block, first_row)


_Codec = _Plain | _Mxfp4 | _Fp8


# ---------------------------------------------------------------------------- writing


class Layout:
    """Where every tensor of a new Hugging Face folder will be: shards are filled in order, up to a size.

    Args:
        tensors: name → TensorInfo, in the order of writing.
        shard_bytes: most bytes of data in a shard; a larger tensor gets a shard of its own.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], shard_bytes: int) -> None:
        shards: list[dict[str, TensorInfo]] = [{}]
        filled = 0
        for name, info in tensors.items():
            if shards[-1] and filled + info.bytes > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = info
            filled += info.bytes
        self.tensors = dict(tensors)
        self.headers: dict[str, bytes] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            self._lay_out(SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors", shard)

    def _lay_out(self, file: str, shard: Mapping[str, TensorInfo]) -> None:
        begins: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, info in shard.items():
            begins[name] = at
            header[name] = _header_entry(info, at)
            at += info.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as safetensors' own writer has it
        self.headers[file] = struct.pack("<Q", len(text)) + text
        start = len(self.headers[file])
        for name, begin in begins.items():
            self.places[name] = (file, start + begin)
        self.sizes[file] = start + at

    def place(self, ref: Ref) -> tuple[str, int]:
        """(file, byte offset) of a part."""
        file, offset = self.places[ref.name]
        info = self.tensors[ref.name]
        return file, offset + ref.start(info.shape) * DTYPE_BYTES[info.dtype]

    def index(self) -> bytes | None:
        """The content of the index file; None if there is only one shard, which needs none."""
        if len(self.sizes) == 1:
            return None
        weight_map = {name: file for name, (file, _) in self.places.items()}
        total = sum(info.bytes for info in self.tensors.values())
        parameters = sum(math.prod(info.shape) for info in self.tensors.values())
        metadata = {"total_parameters": parameters, "total_size": total}
        return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()


def _header_entry(info: TensorInfo, begin: int) -> dict[str, Any]:
    """The header's entry for a tensor; `begin`: offset of its first byte from the end of the header."""
    return {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.bytes]}


def one_file(parts: Mapping[str, tuple[Bits, str]]) -> bytes:
    """The content of a safetensors file.

    Args:
        parts: name → (tensor, dtype).
    """
    from safetensors import serialize

    described = {
        name: {"dtype": TORCH_NAMES[dtype], "shape": part.shape, "data": contiguous(part).tobytes()}
        for name, (part, dtype) in parts.items()
    }
    return serialize(described, metadata={"format": "pt"})
