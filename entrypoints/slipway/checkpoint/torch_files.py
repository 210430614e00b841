"""Files of torch.save with many tensors, as Megatron's classic layout has them, without torch.

Writing: every tensor's place in the file is known before its bytes are, so that pieces can be written in any order; the
pickle and the headers follow at the end. torch reads the file with weights_only: protocol 2 and plain dictionaries. The
entries have no checksum (0), as torch.save itself writes them under set_crc32_options(False), because their bytes come
in pieces; torch does not look at it.

Reading: only the directory and the pickle are read; nothing that the pickle names is called.
"""

from __future__ import annotations

import argparse
import collections
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from slipway.checkpoint import archive, dcp
from slipway.checkpoint.archive import STORAGE_DTYPES, STORAGES, elements_at
from slipway.checkpoint.pytorch_bin import OLD_MAGIC
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.errors import DataError
from slipway.tensors.refs import TensorInfo
from slipway.untrusted import open_file, unreadable

FOLDER = "archive/"
ALIGNMENT = 64
LARGE = 0xFFFFFFFF  # of a field of 32 bits; what does not fit goes into an extra field
# The records of a zip file (APPNOTE.TXT 4.3).
LOCAL, CENTRAL = "<4s5H3I2H", "<4s6H3I5H2I"
END, END64, LOCATOR = "<4s4H2IH", "<4sQ2H2I4Q", "<4sIQI"
LARGEST_PICKLE = 64 << 20  # some 300 bytes for a tensor
Names = Mapping[str, Mapping[str, TensorInfo]]  # chunk → name → tensor

# ---------------------------------------------------------------------------- writing


class Storage:
    """Pickled as the class of the elements."""

    def __init__(self, dtype: str) -> None:
        self.name = f"{STORAGES[dtype]}Storage"

    def __reduce__(self) -> str:
        return self.name


_STORAGES = {dtype: Storage(dtype) for dtype in STORAGES}
# pickle looks each of them up in this module; `_pickle` then writes torch for the module.
globals().update({storage.name: storage for storage in _STORAGES.values()})


def _rebuild_tensor_v2() -> None: ...


@dataclass(frozen=True)
class _Tensor:
    """Pickled as a call of torch's that rebuilds a tensor."""

    key: str
    info: TensorInfo

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.info.shape
        strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        return _rebuild_tensor_v2, (_Saved(self.key, self.info), 0, shape, strides, False, collections.OrderedDict())


@dataclass(frozen=True)
class _Saved:
    """Pickled as a reference to a storage."""

    key: str
    info: TensorInfo


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Saved):
            return "storage", _STORAGES[value.info.dtype], value.key, "cpu", math.prod(value.info.shape)
        return None


class File:
    """Where everything of a new file will be.

    `size` is the file's. `offset(chunk, name)` is where the elements of a tensor begin.

    Args:
        tensors: chunk → name → TensorInfo; those of chunk "" are saved without a chunk.
        beside: what is saved beside them; plain objects and a Namespace.
    """

    def __init__(self, tensors: Names, beside: Mapping[str, Any]) -> None:
        self._tensors, self._beside = tensors, dict(beside)
        self._places: dict[tuple[str, str], int] = {}
        self._keys = {
            place: str(number)
            for number, place in enumerate((chunk, name) for chunk, held in tensors.items() for name in held)
        }
        self._entries: list[tuple[str, int, int]] = []  # (name, offset of the header, bytes)
        self._at = 0
        self._pickle_length = len(self._pickle({}))
        self._content = {name: self._take(name, length) for name, length in self._texts()}
        for (chunk, name), key in self._keys.items():
            self._places[chunk, name] = self._take(f"data/{key}", tensors[chunk][name].bytes)
        self._content["version"] = self._take("version", 2)
        self.size = self._at + len(self._directory({}))

    def offset(self, chunk: str, name: str) -> int:
        """Offset in the file of the first element of a tensor."""
        return self._places[chunk, name]

    def finish(self, path: Path, lengths: Mapping[tuple[str, str], int]) -> None:
        """Write everything but the tensors into the file.

        Args:
            lengths: (chunk, name) → elements of tensors, of one byte each, that are shorter than planned.
        """
        with path.open("r+b") as file:
            self.fill(file, lengths)

    def fill(self, file: BinaryIO, lengths: Mapping[tuple[str, str], int]) -> None:
        """The same into an open file."""
        texts = {"data.pkl": self._pickle(lengths), "byteorder": b"little", "version": b"3\n"}
        shorter = {f"data/{self._keys[place]}": length for place, length in lengths.items()}
        for name, at, count in self._entries:
            count = shorter.get(name, count)
            file.seek(at)
            file.write(self._header(name, at, count, _crc(texts.get(name, b""))))
            file.write(texts.get(name, b""))
        file.seek(self._at)
        file.write(self._directory(shorter, texts))

    def _texts(self) -> list[tuple[str, int]]:
        return [("data.pkl", self._pickle_length), ("byteorder", len(b"little"))]

    def _pickle(self, lengths: Mapping[tuple[str, str], int]) -> bytes:
        """The pickle that torch.save would write of the same object."""

        def tensor(chunk: str, name: str, info: TensorInfo) -> _Tensor:
            if (length := lengths.get((chunk, name))) is not None:
                info = TensorInfo((length,), info.dtype)
            return _Tensor(self._keys[chunk, name], info)

        whole = {
            chunk: {name: tensor(chunk, name, info) for name, info in held.items()}
            for chunk, held in self._tensors.items()
        }
        at_the_top = whole.pop("", {})
        out = io.BytesIO()
        _Pickler(out, protocol=2).dump({**whole, **at_the_top, **self._beside})
        pickled = out.getvalue()
        for name in STORAGES.values():
            pickled = pickled.replace(f"c{__name__}\n{name}Storage\n".encode(), f"ctorch\n{name}Storage\n".encode())
        return pickled.replace(f"c{__name__}\n_rebuild_tensor_v2\n".encode(), b"ctorch._utils\n_rebuild_tensor_v2\n")

    def _take(self, name: str, count: int) -> int:
        """Room for an entry; where its content begins."""
        self._entries.append((name, self._at, count))
        begin = self._at + len(self._header(name, self._at, count, 0))
        self._at = begin + count
        return begin

    def _header(self, name: str, at: int, count: int, checksum: int) -> bytes:
        """An entry's header, padded so that the content, which must follow, is aligned."""
        path = (FOLDER + name).encode()
        long = _long(count, count) if count >= LARGE else b""
        padding = -(at + struct.calcsize(LOCAL) + len(path) + len(long) + 4) % ALIGNMENT
        extra = long + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        size = min(count, LARGE)
        return struct.pack(LOCAL, b"PK\3\4", 0, 0, 0, 0, 0, checksum, size, size, len(path), len(extra)) + path + extra

    def _directory(self, shorter: Mapping[str, int], texts: Mapping[str, bytes] | None = None) -> bytes:
        """The directory of all entries and the records after it."""
        parts = []
        for name, at, planned in self._entries:
            path, count = (FOLDER + name).encode(), shorter.get(name, planned)
            sizes = [count, count] if planned >= LARGE else []
            long = _long(*sizes, *([at] if at >= LARGE else [])) if sizes or at >= LARGE else b""
            size, checksum = min(count, LARGE), _crc((texts or {}).get(name, b""))
            numbers = (0, 0, 0, 0, 0, 0, checksum, size, size, len(path), len(long), 0, 0, 0, 0, min(at, LARGE))
            parts.append(struct.pack(CENTRAL, b"PK\1\2", *numbers) + path + long)
        directory = b"".join(parts)
        count, length = len(self._entries), len(directory)
        end = self._at + length
        whole = struct.pack(END64, b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, self._at)
        locator = struct.pack(LOCATOR, b"PK\6\7", 0, end, 1)
        short = (min(count, 0xFFFF), min(count, 0xFFFF), min(length, LARGE), min(self._at, LARGE))
        return directory + whole + locator + struct.pack(END, b"PK\5\6", 0, 0, *short, 0)


def _long(*sizes: int) -> bytes:
    """The extra field with sizes of 64 bits."""
    return struct.pack(f"<2H{len(sizes)}Q", 1, 8 * len(sizes), *sizes)


def _crc(content: bytes) -> int:
    return zlib.crc32(content)


def of_zeros(tensors: Mapping[str, TensorInfo]) -> bytes:
    """A file of a dictionary of tensors that are all zero."""
    made = File({"": tensors}, {})
    content = io.BytesIO(bytes(made.size))
    made.fill(content, {})
    return content.getvalue()


def namespace(fields: Mapping[str, Any]) -> argparse.Namespace:
    """Megatron-LM's `args`."""
    return argparse.Namespace(**fields)


# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file: offset of its first element, shape, dtype, and strides in elements."""

    begin: int
    info: TensorInfo
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """What a file holds: chunk → name → place of the tensors, and everything else."""

    chunks: dict[str, dict[str, Place]]
    beside: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    storage: tuple[str, str]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_header(path: Path) -> Saved:
    """Where the tensors of a file are; DataError for a damaged file."""
    try:
        with open_file(path) as file:
            if os.pread(file.fileno(), len(OLD_MAGIC), 0) == OLD_MAGIC:
                raise DataError(f"{path} was written by torch before 1.6; load it with a newer one and save it again")
            return _read(file.fileno())
    except (OSError, *UNREADABLE) as error:
        raise unreadable(path, error, "copy the checkpoint again") from None


def _read(descriptor: int) -> Saved:
    count = os.fstat(descriptor).st_size
    with zipfile.ZipFile(io.BufferedReader(archive.Extent(descriptor, 0, count), 1 << 16)) as zipped:
        entries = {entry.filename: entry for entry in zipped.infolist()}
        name = next(name for name in entries if name.rpartition("/")[2] == "data.pkl")
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > min(count, LARGEST_PICKLE):
            raise ValueError("not the pickle of a checkpoint")
        saved = _Unpickler(zipped.read(name)).load()
    if not isinstance(saved, dict):
        raise ValueError("not a checkpoint")
    folder = name.removesuffix("data.pkl")
    chunks: dict[str, dict[str, Place]] = {}
    for key, value in saved.items():
        if not (isinstance(key, str) and key.startswith("model") and isinstance(value, dict)):
            continue
        if not all(isinstance(name, str) for name in value):
            raise ValueError("not the names of tensors")
        chunks[key] = {
            tensor: _place(found, entries[f"{folder}data/{found.storage[1]}"], descriptor, count)
            for tensor, found in value.items()
            if isinstance(found, _Found)
        }
    return Saved(chunks, {key: value for key, value in saved.items() if key not in chunks})


def _place(found: _Found, entry: zipfile.ZipInfo, descriptor: int, count: int) -> Place:
    dtype = found.storage[0]
    numbers = [found.offset, *found.shape, *found.strides]
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
        raise ValueError("not a tensor")
    begin = elements_at(entry, descriptor, 0, count, (dtype, found.offset, found.shape, found.strides))
    return Place(begin, TensorInfo(found.shape, dtype), found.strides)


class _Unpickler(archive.ObjectUnpickler):
    """Gives _Found for tensors, numbers, words and containers, and Fields for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return _found
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("collections", "defaultdict"):
            return lambda *_: {}
        return super().find_class(module, name)

    def build(self) -> None:
        """BUILD sets attributes: torch keeps the versions of modules as one of a state dict; they are not needed."""
        if isinstance(self.stack[-2], dict):
            self.stack.pop()
        else:
            super().build()

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        **archive.ObjectUnpickler.dispatch,
        pickle.BUILD[0]: build,
    }

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        _, dtype, key, *_ = saved
        if not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError("not a storage")
        return dtype, key


def _found(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _Found:
    return _Found(storage, offset, dcp.Size(shape), dcp.Size(strides))
