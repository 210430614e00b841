"""Where every tensor of a pytorch_model.bin is, without torch and without running what the file says.

Such a file is a zip archive of torch.save: `data.pkl`, a pickle that rebuilds the state dict, and an entry `data/KEY`
for each storage, not compressed. A pickle is a program. This one may only name tensors: every instruction and every
function beyond those that torch writes for a state dict is refused. The elements are then read by offset, as those of
safetensors are.

Source: torch 2 (torch/serialization.py, torch/_utils.py).
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slipway.checkpoint.archive import STORAGE_DTYPES, content_of
from slipway.checkpoint.dcp import DTYPES, SafeUnpickler, Size
from slipway.checkpoint.shards import AGAIN, MAX_HEADER_BYTES, Stored
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.errors import DataError
from slipway.tensors.refs import DTYPE_BYTES, TensorInfo
from slipway.untrusted import open_file, unreadable

# What a file of torch before 1.6 begins with: a pickle of its magic number 0x1950A86A20F9469CFC6C.
OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")


class _Refused(Exception):
    """The pickle asks for something that a state dict does not need."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    """`offset` and `strides` are counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Dict(dict):
    """A state dict; torch keeps the versions of its modules as an attribute, which is not needed."""


def _dict() -> _Dict:
    """For collections.OrderedDict, whose items follow one by one: given all at once their keys would not be checked."""
    return _Dict()


def read_header(file: Path) -> dict[str, Stored]:
    """Name → place of every tensor; DataError for a file that is damaged, or asks for anything else than tensors."""
    try:
        opened = open_file(file)
    except OSError as error:
        raise unreadable(file, error, AGAIN) from None
    try:
        _refuse_old(file, os.pread(opened.fileno(), len(OLD_MAGIC), 0))
        with zipfile.ZipFile(opened) as zipped:
            return _places(file, zipped, opened.fileno())
    except _Refused as error:
        raise DataError(
            f"{file}: loading it would call {error}; only tensors are read and nothing in the file is run: "
            "get the model in safetensors, from people whom you trust"
        ) from None
    except (*UNREADABLE, OSError) as error:  # OSError: a directory that leads outside of the file
        raise DataError(f"{file}: not a state dict of torch, or damaged ({type(error).__name__}); {AGAIN}") from None
    finally:
        opened.close()


def _refuse_old(file: Path, first: bytes) -> None:
    if first == OLD_MAGIC:
        convert = f"import torch; torch.save(torch.load('{file}', weights_only=True), '{file}')"
        raise DataError(f'{file}: written by torch before 1.6; convert it with: python -c "{convert}"')


def _places(file: Path, zipped: zipfile.ZipFile, descriptor: int) -> dict[str, Stored]:
    entries = {entry.filename: entry for entry in zipped.infolist()}
    pickled = next(name for name in entries if name.rpartition("/")[2] == "data.pkl")
    folder = pickled.removesuffix("data.pkl")
    # Not compressed, as torch writes it: some bytes could else become as many instructions as the limit allows.
    if entries[pickled].file_size > MAX_HEADER_BYTES or entries[pickled].compress_type != zipfile.ZIP_STORED:
        raise ValueError("too large")
    order = entries.get(f"{folder}byteorder")
    if order and zipped.open(order).read(4) == b"big":
        raise _Refused("a reader of big-endian numbers")
    saved = _Unpickler(zipped.read(pickled)).load()
    if not isinstance(saved, dict):
        raise ValueError("not a state dict")
    places: dict[str, Stored] = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, _Tensor):
            raise DataError(f"{file}: {name!r} in it is not a tensor; a state dict of a model alone is supported")
        places[name] = _place(file, tensor, entries[f"{folder}data/{tensor.storage.key}"], descriptor)
    return places


def _place(file: Path, tensor: _Tensor, entry: zipfile.ZipInfo, descriptor: int) -> Stored:
    """The tensor's place in the file, checked: it lies inside its storage, which lies inside the file."""
    info, size = TensorInfo(tensor.shape, tensor.dtype), DTYPE_BYTES[tensor.dtype]
    begin = content_of(entry, descriptor, 0)
    inside = begin + entry.file_size <= os.fstat(descriptor).st_size and entry.compress_type == zipfile.ZIP_STORED
    reach = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.strides, strict=True))
    # The second: a stride of 0 repeats elements without end.
    fits = (tensor.offset + reach) * size <= entry.file_size and info.bytes <= entry.file_size
    if not inside or (info.bytes and not fits):
        raise ValueError("outside the archive")
    plain = tensor.strides == _row_major(tensor.shape) or not info.bytes
    return Stored(file, begin + tensor.offset * size, info, None if plain else tensor.strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


# ---------------------------------------------------------------------------- the pickle


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """For torch._utils._rebuild_tensor_v2 and v3; v3 has the dtype after the hooks."""
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else storage.dtype
    numbers = [offset, *Size(shape), *Size(strides)]
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers) or dtype not in DTYPE_BYTES:
        raise ValueError("not a tensor")
    return _Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "UntypedStorage"): "U8",
    ("torch", "Size"): Size,
    ("collections", "OrderedDict"): _dict,
    **{("torch", name): dtype for name, dtype in (STORAGE_DTYPES | DTYPES).items()},
}


class _Unpickler(SafeUnpickler):
    """Gives a state dict of _Tensor, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise _Refused(f"{module}.{name}"[:200])
        return KNOWN[module, name]

    def persistent_load(self, saved: Any) -> _Storage:
        kind, dtype, key, *_ = saved
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise ValueError("not a storage")
        return _Storage(dtype, key)

    def build(self) -> None:
        """BUILD sets attributes: those of a state dict are not needed, and nothing else may have any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise _Refused("the setting of attributes")

    def is_key(self, value: Any) -> bool:
        """A state dict has names of tensors and nothing else."""
        return isinstance(value, str)

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {**SafeUnpickler.dispatch, pickle.BUILD[0]: build}
    del dispatch[pickle.NEWOBJ[0]]  # a state dict has no objects but tensors
