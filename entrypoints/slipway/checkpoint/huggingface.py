"""Hugging Face folders: read by offset, decode while reading, write at final offsets.

The tensors lie in safetensors (shards.py) or, in old models, in pytorch_model.bin (pytorch_bin.py). codecs.py decodes
the quantised ones.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import formats, pytorch_bin
from slipway.checkpoint.codecs import FP8, FP8_SCALES, Codec, Plain, Rows, codec_of
from slipway.checkpoint.descriptors import Descriptors
from slipway.checkpoint.shards import AGAIN, Stored, read_header
from slipway.errors import DataError
from slipway.tensors.bits import Bits, bits_type, contiguous, empty
from slipway.tensors.refs import DTYPE_BYTES, INDEX, TORCH_NAMES, Ref, TensorInfo
from slipway.untrusted import read_json, tell, unreadable

__all__ = ["FP8", "FP8_SCALES", "INDEX", "SINGLE", "Layout", "Reader", "Stored", "one_file", "read_header"]
SINGLE = "model.safetensors"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
KINDS = ((SINGLE, INDEX), (BIN, BIN_INDEX))
MAX_SHARDS = 100_000
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
HEAD = "lm_head.weight"
# Other forms of the weights, which transformers does not read as a model's own.
OTHERS = {
    ".gguf": "GGUF", ".pth": "Meta's original form (*.pth)", ".ckpt": "TensorFlow's form", ".h5": "TensorFlow's form",
    ".msgpack": "Flax's form", ".onnx": "ONNX", ".nemo": "NeMo 1's form",
}  # fmt: skip
# The last part of a name → what such tensors are. They scale what is quantised at inference, not the weights.
CACHE, ACTIVATIONS = "the KV cache", "activations"
LEFT_OUT = {
    **dict.fromkeys(("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "prob_output_scale"), CACHE),
    **dict.fromkeys(("k_zero_point", "v_zero_point", "q_zero_point", "kv_zero_point"), CACHE),
    **dict.fromkeys(("k_global_scale", "v_global_scale", "q_global_scale", "kv_cache_scale"), CACHE),
    **dict.fromkeys(("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub"), ACTIVATIONS),
    **dict.fromkeys(("output_scale", "output_zero_point", "output_global_scale", "activation_scale"), ACTIVATIONS),
}
BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")  # of rotary_emb, computed from config.json
OF_CACHE = ("q_proj", "k_proj", "v_proj", "qkv_proj")  # whose outputs are what is cached


@dataclass(frozen=True)
class Files:
    """The files with a folder's weights, in the order in which transformers reads them.

    Args:
        names: those that are there.
        missing: those that should be.
        where: tensor → file, as the index has it; None without an index.
        index: the name of the index.
        note: what a person should know of the choice.
    """

    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    where: Mapping[str, str] | None = None
    index: str = ""
    note: str = ""


def weight_files(folder: Path) -> Files | None:
    """The files with the weights; None where there are none.

    transformers takes one file before an index, and safetensors before pytorch_model.bin. It reads no shards without
    an index; here they are read if all are there, because their names tell how many there must be.
    """
    for single, index in KINDS:
        if (folder / single).exists():
            both = f"{single} is read, and not the files of {index}, as transformers does"
            return Files((single,), note=both if (folder / index).exists() else "")
        if (folder / index).exists():
            return _of_index(folder, index)
    return next(filter(None, (_shards(folder, single) for single, _ in KINDS)), None)


def _of_index(folder: Path, index: str) -> Files:
    where = read_index(folder / index)
    named = sorted(set(where.values()))
    there = tuple(file for file in named if (folder / file).exists())
    return Files(there, tuple(file for file in named if file not in there), where, index)


def _shards(folder: Path, single: str) -> Files | None:
    """Shards without an index; the others of a set are missing."""
    stem, _, ending = single.rpartition(".")
    matches = [SHARD.fullmatch(file.name) for file in folder.glob(f"{stem}-*-of-*.{ending}")]
    found = {int(match[2]): match for match in matches if match}
    if not found:
        return None
    match = found[min(found)]
    if int(match[3]) > MAX_SHARDS:
        raise DataError(f"{folder / match[0]}: a model has at most {MAX_SHARDS:,} files; {AGAIN}")
    names = [f"{match[1]}-{number:0{len(match[2])}}-of-{match[3]}.{ending}" for number in range(1, int(match[3]) + 1)]
    there = tuple(name for name in names if (folder / name).exists())
    return Files(there, tuple(name for name in names if name not in there))


def read_file(file: Path) -> dict[str, Stored]:
    """Name → place of every tensor of one file of weights; DataError for a file that is damaged."""
    return pytorch_bin.read_header(file) if file.suffix == ".bin" else read_header(file)


def read_folder(folder: Path, notes: list[str] | None = None) -> dict[str, Stored]:
    """Name → place of every tensor of a model folder; DataError if the index and the files disagree.

    Args:
        notes: gets what a person should know of how it was read.
    """
    files = weight_files(folder)
    if files is None:
        raise DataError(f"{folder} has neither {INDEX} nor {SINGLE}{_other_form(folder)}")
    if files.missing:
        whose = f"{folder / files.index} names" if files.index else f"{folder}: the names of the other shards tell of"
        raise DataError(f"{whose} {files.missing[0]}, which is missing; download this file")
    stored, found = places_in(folder, files)
    _check_index(folder / files.index, files.where or {}, stored)
    if notes is not None:
        notes += found
    if any(name.endswith(".bin") for name in files.names):
        # Said before the work and not only in the summary: such files are programs, and people are right to ask.
        tell(f"{folder / files.names[0]}: only its tensors are read; no code in it is run")
    return stored


def places_in(folder: Path, files: Files) -> tuple[dict[str, Stored], list[str]]:
    """(name → place of every tensor of the files that are there, what a person should know of the choice)."""
    stored: dict[str, Stored] = {}
    twice: dict[str, str] = {}
    for file in files.names:
        for name, place in read_file(folder / file).items():
            if name in stored:
                twice[name] = file
            stored[name] = place  # of two copies transformers takes the last file's, whatever the index says
    return stored, [note for note in (files.note, _of_copies(twice)) if note]


def _check_index(index: Path, where: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    """DataError for a tensor that the index promises. A tied model's index may list the head that is not stored."""
    for name, file in where.items():
        if name not in stored and name != HEAD:
            raise DataError(f"{index}: tensor {name} is not in {file}; {AGAIN}")


def _of_copies(twice: Mapping[str, str]) -> str:
    if not twice:
        return ""
    name, file = next(iter(twice.items()))
    more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
    return f"{name}{more} is in several files: the last one's ({file}) is taken, as transformers does"


def _other_form(folder: Path) -> str:
    """What else is there: in which form the weights are."""
    found = Counter(file.suffix for file in folder.iterdir() if file.suffix in (*OTHERS, ".safetensors"))
    if not found:
        return "; give the folder of a Hugging Face model"
    ending = found.most_common(1)[0][0]
    form = OTHERS.get(ending, "safetensors of other names")
    return f": its weights are in {form}, which is not supported; get the model in Hugging Face's form"


def read_index(index: Path) -> dict[str, str]:
    """Tensor → file beside the index; DataError for an index without such a map."""
    whole = read_json(index)
    try:
        where = whole["weight_map"]
        # Only names of files in the folder: a foreign index must not lead to other files of this machine.
        if not all(isinstance(file, str) and file and Path(file).name == file for file in where.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{index} is damaged, it does not map tensors to files; {AGAIN}") from None
    return where


# ---------------------------------------------------------------------------- reading


class Reader:
    """The tensors of a Hugging Face folder in their BF16 form, whatever form they are stored in.

    `tensors` maps each name to its decoded shape and dtype; `read` returns any part of one. Threads may share it.
    `notes` says what is left out.

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
        self._devices = devices
        self.declared = formats.declared(config, folder)
        self._descriptors = Descriptors()
        kinds = {name: kind for name in stored if (kind := left_out(name))}
        infos = {name: place.info for name, place in stored.items() if name not in kinds}
        formats.refuse_unread(infos, self.declared, folder)
        self._codecs = self._codecs_of(infos)
        self.tensors = {name: codec.info for name, codec in self._codecs.items()}
        self.notes = [_left_out_words(kind, count) for kind, count in sorted(Counter(kinds.values()).items())]

    def _codecs_of(self, infos: Mapping[str, TensorInfo]) -> dict[str, Codec]:
        """Decoded name → codec of every tensor."""
        quantized = {name: codec_of(name, infos, self.declared.blocks, self.folder, self) for name in infos}
        used = {part for codec in quantized.values() if codec for part in codec.parts}
        used |= {zero for codec in quantized.values() if codec for zero in self._zero_point(codec)}
        codecs: dict[str, Codec] = {}
        for name, info in infos.items():
            if codec := quantized[name]:
                codecs[codec.name] = codec
            elif name not in used:
                codecs[name] = Plain(name, info)
        return codecs

    def _zero_point(self, codec: Codec) -> list[str]:
        """The name of a quantised tensor's zero point, if it is stored; DataError if it is not zero everywhere."""
        name = f"{codec.name}_zero_point"
        if name not in self.stored:
            return []
        bits = self.read_stored(name, Ref(name))
        if (bits & 0x7F if self.stored[name].info.dtype in FP8 else bits).any():  # float8 has a negative zero
            raise DataError(f"{self.folder}: {name} is not zero; only symmetric quantisation is supported")
        return [name]

    @property
    def quantized(self) -> list[str]:
        """The names of the tensors that `read` decodes."""
        return [name for name, codec in self._codecs.items() if codec.form]

    @property
    def forms(self) -> list[str]:
        """The forms that they are stored in: fp8, mxfp8, mxfp4, nvfp4."""
        return sorted({codec.form for codec in self._codecs.values() if codec.form})

    def split(self, name: str, views: Mapping[str, Ref]) -> None:
        """Replace a stack of matrices by some of their rows, under names of their own."""
        if (form := self._codecs[name].form) or len(self._codecs[name].info.shape) != 3:
            raise DataError(f"{self.folder}: {name} holds all experts in one tensor in {form}, which is not supported")
        stack = self.tensors.pop(name)
        del self._codecs[name]
        for view, of in views.items():
            codec = Rows(view, of, stack)
            self._codecs[view], self.tensors[view] = codec, codec.info

    def rename(self, name: str, other: str) -> None:
        """Give a tensor the name that other programs know it by."""
        self._codecs[other], self.tensors[other] = self._codecs.pop(name), self.tensors.pop(name)

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

    @functools.cached_property
    def _turns(self) -> Iterator[str]:
        return itertools.cycle(self._devices)

    def source_bytes(self, ref: Ref) -> int:
        """How many bytes `read` reads for a part, for the progress and the memory."""
        codec = self._codecs[ref.name]
        part = TensorInfo(ref.shape(codec.info.shape), codec.info.dtype).bytes
        return part * codec.stored_bytes // max(1, codec.info.bytes)

    def files(self) -> list[Path]:
        """Every file of the folder with weights."""
        return sorted({place.file for place in self.stored.values()})

    def read_stored(self, name: str, ref: Ref) -> Bits:
        """A part of a tensor, as it is stored."""
        place = self.stored[name]
        if place.strides is not None:
            return self._read_strided(name, place, ref)
        part = empty(ref.shape(place.info.shape), bits_type(place.info.dtype))
        offset = place.offset + ref.start(place.info.shape) * DTYPE_BYTES[place.info.dtype]
        self._fill(part.reshape(-1).view(np.uint8).data, place.file, offset, name)
        return part

    def _read_strided(self, name: str, place: Stored, ref: Ref) -> Bits:
        """A part of a view, such as a transposed matrix: all from its first to its last element is read."""
        assert place.strides is not None
        shape, strides = ref.shape(place.info.shape), place.strides[len(ref.index) :]
        first = sum(number * stride for number, stride in zip(ref.index, place.strides, strict=False))
        first += ref.rows[0] * strides[0] if ref.rows else 0
        reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        kind = bits_type(place.info.dtype)
        elements = empty((reach if math.prod(shape) else 0,), kind)
        self._fill(elements.view(np.uint8).data, place.file, place.offset + first * kind.itemsize, name)
        steps = [stride * kind.itemsize for stride in strides]
        return contiguous(np.lib.stride_tricks.as_strided(elements, shape, steps))

    def _fill(self, view: memoryview, file: Path, offset: int, name: str) -> None:
        descriptor = self._descriptors.of(file)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise unreadable(f"{file}: tensor {name}", error, AGAIN) from None
            if count == 0:
                raise DataError(f"{file}: the file ends inside tensor {name}; {AGAIN}")
            done += count


def left_out(name: str) -> str:
    """What a tensor of this name is, if it is one that weights do not need; "" for all others."""
    module, _, last = name.rpartition(".")
    if last in BUFFERS and module.endswith("rotary_emb"):
        return "rotary_emb"
    kind = LEFT_OUT.get(last, "")
    return CACHE if kind and module.endswith(OF_CACHE) and last.startswith("output_") else kind


def _left_out_words(kind: str, count: int) -> str:
    if kind == "rotary_emb":
        return f"left out {count} buffers of rotary_emb, which are computed from config.json"
    return f"left out {count} scales of {kind}, which weights do not need"


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
