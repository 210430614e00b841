"""The archives that torch.save writes, without torch: of one tensor, or of plain objects.

An archive is a zip file whose entries are stored, not compressed: `data.pkl`, which rebuilds the tensor, and `data/0`,
its elements. Shape and dtype decide all bytes except the elements and their checksum. So an archive is made as the
bytes before the data, the data itself, which is not copied, and the bytes after it. Its length is known in advance.
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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slipway.checkpoint import dcp
from slipway.checkpoint.dcp import Fields, SafeUnpickler, Unexpected, ordered
from slipway.tensors.bits import Bits, bits_type, data, empty
from slipway.tensors.refs import DTYPE_BYTES, TORCH_NAMES

# dtype, in safetensors' spelling → torch's class for the elements.
STORAGES = {
    "BF16": "BFloat16", "F16": "Half", "F32": "Float", "F64": "Double", "I64": "Long", "I32": "Int", "I16": "Short",
    "I8": "Char", "U8": "Byte", "BOOL": "Bool",
}  # fmt: skip
STORAGE_DTYPES = {f"{name}Storage": dtype for dtype, name in STORAGES.items()}
FOLDER = "archive/"
MAX_PICKLE_BYTES = 1 << 20  # of one tensor; torch writes a few hundred
MOST_ARGUMENTS = 5000  # of Megatron-LM's command line; there are some 800
MOST_HEAD = 1 << 14  # bytes before the elements; torch writes a thousand
ALIGNMENT = 64  # of the data, as torch aligns it
# The records of a zip file (APPNOTE.TXT 4.3): before each entry, in the directory for each entry, and at the end.
LOCAL, CENTRAL, END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"
CHECKSUM = 14  # its offset in LOCAL

# ---------------------------------------------------------------------------- writing


def write(part: Bits, dtype: str) -> tuple[bytes, memoryview, bytes]:
    """The archive of a tensor: the bytes before its data, the data, the bytes after it."""
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
    """The bytes before and after `count` bytes of data."""
    zipped = _Zip()
    zipped.add("data.pkl", _rebuild(shape, dtype))
    zipped.add("byteorder", b"little")
    zipped.head("data/0", count, checksum)
    # The data goes here, but it is not needed: what follows only has to know how long it is.
    before, zipped.text = zipped.text, b""
    zipped.start = len(before) + count
    zipped.add("version", b"3\n")
    return before, zipped.finish()


class _Zip:
    """A zip file of stored entries.

    Args:
        start: offset in the file of the first byte of `text`.
    """

    def __init__(self) -> None:
        self.start, self.text, self._directory, self._entries = 0, b"", b"", 0

    def add(self, name: str, content: bytes) -> None:
        self.head(name, len(content), zlib.crc32(content))
        self.text += content

    def head(self, name: str, count: int, checksum: int) -> None:
        """An entry's header, padded so that the content, which must follow, is aligned."""
        assert count < 1 << 32, "larger entries need the zip64 form"  # a chunk is a cell, far below this
        path, at = (FOLDER + name).encode(), self.start + len(self.text)
        padding = -(at + struct.calcsize(LOCAL) + len(path) + 4) % ALIGNMENT
        about = (0, 0, 0, 0, checksum, count, count, len(path))
        self.text += struct.pack(LOCAL, b"PK\3\4", 0, *about, 4 + padding) + path
        # An extra field, with the id and the filler that torch has for its padding.
        self.text += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._directory += struct.pack(CENTRAL, b"PK\1\2", 0, 0, *about, 0, 0, 0, 0, 0, at) + path
        self._entries += 1

    def finish(self) -> bytes:
        """The text, followed by the directory of all entries."""
        numbers = (0, 0, self._entries, self._entries, len(self._directory), self.start + len(self.text), 0)
        return self.text + self._directory + struct.pack(END, b"PK\5\6", *numbers)


def _rebuild(shape: tuple[int, ...], dtype: str) -> bytes:
    """The pickle that torch.save writes: `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`.

    It is put together by hand, because pickling torch's own functions would need torch. The storage is a persistent id,
    a reference to `data/0`.
    """
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    numbers = b"".join(map(_pickled, (0, tuple(shape), strides)))
    words = _pickled("0") + _pickled("cpu") + _pickled(math.prod(shape))
    storage = b"(" + _pickled("storage") + f"ctorch\n{STORAGES[dtype]}Storage\n".encode() + words + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + hooks + b"tR."


def _pickled(value: Any) -> bytes:
    """A number, word or tuple as a part of a pickle: without the two bytes of the protocol and the final stop."""
    return pickle.dumps(value, protocol=2)[2:-1]


# Megatron writes this for a module without extra state; Transformer Engine reads it as "nothing to restore".
EMPTY_STATE = of_plain([None])

# ---------------------------------------------------------------------------- reading


Box = Sequence[tuple[int, int]]  # [start, stop) in each dimension


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor inside an archive, and where its elements are.

    Args:
        begin: offset in the file of its first element.
        strides: in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int

    def read(self, descriptor: int, box: Box) -> Bits:
        """The elements in a box. Only the bytes from its first to its last element are read."""
        size = bits_type(self.dtype).itemsize
        shape = [stop - start for start, stop in box]
        first = sum(start * stride for (start, _), stride in zip(box, self.strides, strict=True))
        reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, self.strides, strict=True))
        elements = empty((max(0, reach) if math.prod(shape) else 0,), bits_type(self.dtype))
        fill(descriptor, elements.view(np.uint8).data, self.begin + first * size)
        return np.lib.stride_tricks.as_strided(elements, shape, [stride * size for stride in self.strides])


def locate(descriptor: int, start: int, count: int, wanted: Sequence[int]) -> Stored:
    """The tensor of the archive in the `count` bytes from `start` on of a file; its elements are not read.

    Args:
        wanted: the shape that it must have; an archive of another is refused before memory is taken for it.

    Errors: zipfile.BadZipFile, pickle.UnpicklingError and others (torch_dist.UNREADABLE) for damaged bytes.
    """
    return _located(descriptor, start, count, wanted)[0]


def _located(
    descriptor: int, start: int, count: int, wanted: Sequence[int]
) -> tuple[Stored, zipfile.ZipInfo, zipfile.ZipInfo]:
    """(the tensor, the entry with its pickle, the entry with its elements); see locate."""
    with zipfile.ZipFile(io.BufferedReader(Extent(descriptor, start, count), 4096)) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith("data.pkl"))
        about = zipped.getinfo(name)
        if about.file_size > MAX_PICKLE_BYTES:
            raise ValueError("not the pickle of a tensor")
        (dtype, key), offset, shape, strides = _Unpickler(zipped.read(name)).load()
        entry = zipped.getinfo(f"{name.removesuffix('data.pkl')}data/{key}")
    if tuple(shape) != tuple(wanted):
        raise ValueError("not the tensor that was expected")
    begin = elements_at(entry, descriptor, start, count, (dtype, offset, shape, strides))
    return Stored(dtype, tuple(shape), tuple(strides), begin), about, entry


class Layouts:
    """Locates tensors as `locate` does, and quickly where an archive begins as one that it has read before.

    torch.save writes the same bytes for all tensors of one shape and dtype, up to the checksum and the elements. A
    checkpoint of experts has ten thousands of them. Threads may share it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[int, ...]], tuple[bytes, int, Stored]] = {}

    def locate(self, descriptor: int, start: int, count: int, wanted: Sequence[int]) -> Stored:
        """As the function of this name."""
        key = (count, tuple(wanted))
        if key in self._known:
            head, checksum, found = self._known[key]
            if _without(os.pread(descriptor, len(head), start), checksum) == head:
                return replace(found, begin=start + found.begin)
        found, about, entry = _located(descriptor, start, count, wanted)
        length = content_of(entry, descriptor, start)
        # Only then the pickle is a part of what is compared.
        if about.header_offset < entry.header_offset and length < MOST_HEAD:
            head, checksum = os.pread(descriptor, length, start), entry.header_offset + CHECKSUM
            self._known[key] = _without(head, checksum), checksum, replace(found, begin=found.begin - start)
        return found


def _without(head: bytes, checksum: int) -> bytes:
    """The same with zeros for the checksum at this offset, 4 bytes."""
    return head[:checksum] + bytes(4) + head[checksum + 4 :]


def elements_at(
    entry: zipfile.ZipInfo, descriptor: int, start: int, count: int, view: tuple[str, int, Sequence[int], Sequence[int]]
) -> int:
    """Offset in the file of the first element of a tensor, (dtype, offset, shape, strides), in a storage's entry.

    Errors: ValueError for a tensor that is not inside its storage, or for a storage that is not inside the archive.
    """
    dtype, offset, shape, strides = view
    begin, size = content_of(entry, descriptor, start), bits_type(dtype).itemsize
    # A tensor may be a view into a larger storage.
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    reach = reach if math.prod(shape) else 0
    # as_strided checks nothing: strides or an offset that lead outside would show this process's own memory.
    if entry.compress_type != zipfile.ZIP_STORED or min(shape, default=0) < 0:
        raise ValueError("not the storage of a tensor")
    if min(offset, *strides, 0) < 0 or (offset + reach) * size > entry.file_size or begin + entry.file_size > count:
        raise ValueError("outside the archive")
    return start + begin + offset * size


def read(descriptor: int, start: int, count: int, wanted: Sequence[int], box: Box | None = None) -> tuple[Bits, str]:
    """(elements in a box, None = all; dtype) of the tensor of an archive; see locate."""
    found = locate(descriptor, start, count, wanted)
    return found.read(descriptor, box if box is not None else [(0, extent) for extent in found.shape]), found.dtype


def content_of(entry: zipfile.ZipInfo, descriptor: int, start: int) -> int:
    """Offset in the archive of an entry's content, which follows its header, name and padding.

    The padding is read from the entry itself: the directory does not tell it, and zipfile hides it.
    """
    head = os.pread(descriptor, struct.calcsize(LOCAL), start + entry.header_offset)
    name_length, extra_length = struct.unpack(LOCAL, head)[-2:]
    return entry.header_offset + len(head) + name_length + extra_length


def fill(descriptor: int, view: memoryview, offset: int) -> None:
    """Read the bytes from `offset` on of a file into memory; EOFError where it has not as many."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


class Extent(io.RawIOBase):
    """Some bytes of an open file as a file.

    It reads with an offset (preadv), so that many threads can share the descriptor, which has one position only.
    """

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
    """Gives (storage, offset, shape, strides) of a tensor, storage = (dtype, name), and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return ordered
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in the archive of a tensor")

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        _, dtype, key, *_ = saved
        return dtype, key


# ---------------------------------------------------------------------------- objects that are no tensors


def load_plain(descriptor: int, count: int) -> Any:
    """What torch.save has saved, as data: numbers, words and containers; in place of tensors and of objects, Fields.

    Errors: those of torch_dist.UNREADABLE.
    """
    with zipfile.ZipFile(io.BufferedReader(Extent(descriptor, 0, count), 4096)) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith("data.pkl"))
        if zipped.getinfo(name).compress_type != zipfile.ZIP_STORED or zipped.getinfo(name).file_size > count:
            raise ValueError("not the pickle of an object")
        return ObjectUnpickler(zipped.read(name)).load()


class ObjectUnpickler(dcp.AnyUnpickler):
    """Reads what Megatron saves beside weights. Of everything that is no plain value only its fields are kept."""

    most_fields = MOST_ARGUMENTS

    def persistent_load(self, saved: Any) -> Any:
        return Fields()


def check_object(descriptor: int, start: int, count: int, *, state: bool = False) -> None:
    """Check the archive of an object which torch or NeMo will load: it names only what torch writes for plain objects.

    Args:
        state: it is the extra state of a module. Transformer Engine loads the bytes in it as a pickle once more, so
            there must be none: it keeps some only for training in FP8.

    Errors: those of torch_dist.UNREADABLE; dcp.Unexpected for a name that is not known.
    """
    with zipfile.ZipFile(io.BufferedReader(Extent(descriptor, start, count), 4096)) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith("data.pkl"))
        if zipped.getinfo(name).compress_type != zipfile.ZIP_STORED or zipped.getinfo(name).file_size > count:
            raise ValueError("not the pickle of an object")
        held = [entry.file_size for entry in zipped.infolist() if "/data/" in f"/{entry.filename}"]
        _PlainUnpickler(zipped.read(name)).load()
    if state and any(held):
        raise Unexpected("it holds bytes, which Transformer Engine would load as a pickle")


class _Plain(Fields):
    """In place of everything that an object of torch's may hold beside numbers, words and containers of them."""


def _plain(*_: Any) -> _Plain:
    return _Plain()


PLAIN = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"), ("torch", "Size"), ("torch", "device"), ("torch.storage", "UntypedStorage"),
    ("torch.serialization", "_get_layout"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"), ("_codecs", "encode"),
    *(("torch", name) for name in (*STORAGE_DTYPES, *TORCH_NAMES.values())),
}  # fmt: skip


class _PlainUnpickler(SafeUnpickler):
    """Reads an object to know that it can be read; what it names is on the list above, and none of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return ordered
        if (module, name) not in PLAIN:
            raise Unexpected(f"it names {module}.{name}, which torch does not write there")
        return _plain

    def is_key(self, value: Any) -> bool:
        """Megatron's optimizer has keys that are dtypes, and pairs of them."""
        if isinstance(value, tuple):
            return super().is_key(tuple("" if part is _plain else part for part in value))
        return value is _plain or super().is_key(value)

    def persistent_load(self, saved: Any) -> _Plain:
        return _Plain()
