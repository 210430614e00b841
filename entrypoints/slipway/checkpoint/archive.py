"""The archives that torch.save writes, without torch: one tensor's, or one of plain objects.

An archive is a zip file whose entries are stored, not compressed: `data.pkl`, which rebuilds the tensor, and `data/0`,
its elements. Everything but those and their checksum is known from shape and dtype, so it is written around the data
where that lies, without a copy.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from slipway.checkpoint.dcp import SafeUnpickler
from slipway.tensors.bits import Bits, bits_type, data, empty
from slipway.tensors.refs import DTYPE_BYTES

# torch's class of the elements of a dtype, in safetensors' spelling.
STORAGES = {
    "BF16": "BFloat16", "F16": "Half", "F32": "Float", "F64": "Double", "I64": "Long", "I32": "Int", "I16": "Short",
    "I8": "Char", "U8": "Byte", "BOOL": "Bool",
}  # fmt: skip
STORAGE_DTYPES = {f"{name}Storage": dtype for dtype, name in STORAGES.items()}
FOLDER = "archive/"
MAX_PICKLE_BYTES = 1 << 20  # of one tensor; torch's are a few hundred
ALIGNMENT = 64  # of the data, as torch aligns it
LOCAL, CENTRAL, END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"

# ---------------------------------------------------------------------------- writing


def write(part: Bits, dtype: str) -> tuple[bytes, memoryview, bytes]:
    """The archive of a tensor: what stands before its data, the data, what stands after it."""
    content = data(part)
    before, after = _around(part.shape, dtype, len(content), zlib.crc32(content))
    return before, content, after


def length(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of the archive of any tensor of this shape and dtype."""
    count = math.prod(shape) * DTYPE_BYTES[dtype]
    return count + sum(map(len, _around(shape, dtype, count, 0)))


def of_plain(content: Any) -> bytes:
    """The archive of an object without tensors."""
    zipped = _Zip()
    for name, entry in (("data.pkl", pickle.dumps(content, protocol=2)), ("byteorder", b"little"), ("version", b"3\n")):
        zipped.add(name, entry)
    return zipped.finish()


def _around(shape: tuple[int, ...], dtype: str, count: int, checksum: int) -> tuple[bytes, bytes]:
    """What stands before and after `count` bytes of data."""
    zipped = _Zip()
    zipped.add("data.pkl", _rebuild(shape, dtype))
    zipped.add("byteorder", b"little")
    zipped.head("data/0", count, checksum)
    before, zipped.text = zipped.text, b""
    zipped.start = len(before) + count
    zipped.add("version", b"3\n")
    return before, zipped.finish()


class _Zip:
    """A zip file of stored entries.

    Args:
        start: where in the file `text` begins.
    """

    def __init__(self) -> None:
        self.start, self.text, self._directory, self._entries = 0, b"", b"", 0

    def add(self, name: str, content: bytes) -> None:
        self.head(name, len(content), zlib.crc32(content))
        self.text += content

    def head(self, name: str, count: int, checksum: int) -> None:
        """An entry's header, padded so that its content is aligned; the content is to follow."""
        assert count < 1 << 32, "larger entries need another form of header"
        path, at = (FOLDER + name).encode(), self.start + len(self.text)
        padding = -(at + struct.calcsize(LOCAL) + len(path) + 4) % ALIGNMENT
        about = (0, 0, 0, 0, checksum, count, count, len(path))
        self.text += struct.pack(LOCAL, b"PK\3\4", 0, *about, 4 + padding) + path
        self.text += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._directory += struct.pack(CENTRAL, b"PK\1\2", 0, 0, *about, 0, 0, 0, 0, 0, at) + path
        self._entries += 1

    def finish(self) -> bytes:
        """The text with the directory of all entries behind it."""
        numbers = (0, 0, self._entries, self._entries, len(self._directory), self.start + len(self.text), 0)
        return self.text + self._directory + struct.pack(END, b"PK\5\6", *numbers)


def _rebuild(shape: tuple[int, ...], dtype: str) -> bytes:
    """The pickle that torch.save writes: a call of torch's with the storage by reference, offset, shape and strides."""
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    numbers = b"".join(map(_pickled, (0, tuple(shape), strides)))
    words = _pickled("0") + _pickled("cpu") + _pickled(math.prod(shape))
    storage = b"(" + _pickled("storage") + f"ctorch\n{STORAGES[dtype]}Storage\n".encode() + words + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + hooks + b"tR."


def _pickled(value: Any) -> bytes:
    """A number, word or tuple amid a pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]


EMPTY_STATE = of_plain([None])  # Megatron's, for a module without extra state; TE takes it for "nothing to restore"

# ---------------------------------------------------------------------------- reading


def read(descriptor: int, start: int, count: int, wanted: Sequence[int]) -> tuple[Bits, str]:
    """(tensor, dtype) of the archive in `count` bytes of a file from `start` on; no other is read than of that size.

    Errors: zipfile.BadZipFile, pickle.UnpicklingError and what else garbled bytes may lead to.
    """
    with zipfile.ZipFile(io.BufferedReader(_Extent(descriptor, start, count), 4096)) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith("data.pkl"))
        if zipped.getinfo(name).file_size > MAX_PICKLE_BYTES:
            raise ValueError("more than a tensor")
        (dtype, key), offset, shape, strides = _Unpickler(io.BytesIO(zipped.read(name))).load()
        stored = zipped.getinfo(f"{name.removesuffix('data.pkl')}data/{key}")
    if stored.compress_type != zipfile.ZIP_STORED or tuple(shape) != tuple(wanted):
        raise ValueError("another tensor")
    begin = _content_of(stored, descriptor, start)
    size = bits_type(dtype).itemsize
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if min(offset, *strides, 0) < 0 or (offset + reach) * size > stored.file_size or begin + stored.file_size > count:
        raise ValueError("outside the archive")
    elements = empty((max(0, reach),), bits_type(dtype))
    _fill(descriptor, elements.view(np.uint8).data, start + begin + offset * size)
    return np.lib.stride_tricks.as_strided(elements, shape, [stride * size for stride in strides]), dtype


def _content_of(entry: zipfile.ZipInfo, descriptor: int, start: int) -> int:
    """Where in the archive an entry's content begins: behind its header, name and padding."""
    head = os.pread(descriptor, struct.calcsize(LOCAL), start + entry.header_offset)
    name_length, extra_length = struct.unpack(LOCAL, head)[-2:]
    return entry.header_offset + len(head) + name_length + extra_length


def _fill(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


class _Extent(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, descriptor: int, start: int, count: int) -> None:
        self._descriptor, self._start, self._count, self._at = descriptor, start, count, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._count)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._count - self._at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:room]], self._start + self._at) if room else 0
        self._at += count
        return count


class _Unpickler(SafeUnpickler):
    """Gives (storage, offset, shape, strides) of a tensor, storage as (dtype, name); knows nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor's archive")

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        _, dtype, key, *_ = saved
        return dtype, key
