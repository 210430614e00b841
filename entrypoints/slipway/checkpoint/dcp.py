"""torch.distributed.checkpoint's metadata without torch: stand-ins that are pickled under the names of torch's classes.

`dumps` gives the pickle that torch would make of the same objects; `loads` makes the stand-ins from torch's pickles.
It allows no class but these, so that a foreign file runs no code; whatever else is pickled along (Megatron's own
planning notes) becomes an inert object.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from slipway.tensors.refs import TORCH_NAMES

METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


class _Fields:
    """An object that is its fields."""

    def __init__(self, *_: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class Metadata(_Fields):
    """state_dict_metadata: key → TensorStorageMetadata or BytesStorageMetadata; storage_data: MetadataIndex →
    StorageInfo."""


class TensorStorageMetadata(_Fields):
    """properties, size, chunks."""


class BytesStorageMetadata(_Fields):
    """Stands for an object that is no tensor."""


class ChunkStorageMetadata(_Fields):
    """offsets, sizes."""


class MetadataIndex(_Fields):
    """fqn (the key), offset, index; torch leaves out what is None."""

    offset = index = None


class StorageInfo(_Fields):
    """relative_path, offset, length."""


_StorageInfo = StorageInfo
StorageInfo.__qualname__ = StorageInfo.__name__ = "_StorageInfo"  # torch's name for it


class TensorProperties(_Fields):
    """dtype, in safetensors' spelling."""

    def __getstate__(self) -> tuple[Any, ...]:
        layout, memory_format = _Call(_get_layout, "torch.strided"), _Call(_MEM_FORMAT_ENCODING, 0)
        return globals()[TORCH_NAMES[self.dtype]], layout, False, memory_format, False

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _Call:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def size(numbers: tuple[int, ...]) -> _Call:
    """Is pickled as torch.Size."""
    return _Call(Size, numbers)


def Size(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(numbers)


def _get_layout(_: str) -> None: ...


def _MEM_FORMAT_ENCODING(_: int) -> None: ...


class _Dtype:
    """Is pickled as the global of its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


globals().update({name: _Dtype(name) for name in DTYPES})

# Name → module of everything that pickles may hold.
KNOWN = {
    **{kind.__name__: METADATA for kind in (Metadata, TensorStorageMetadata, BytesStorageMetadata)},
    **{kind.__name__: METADATA for kind in (ChunkStorageMetadata, MetadataIndex, TensorProperties)},
    "_MEM_FORMAT_ENCODING": METADATA,
    "_StorageInfo": FILESYSTEM,
    "_get_layout": "torch.serialization",
    "Size": "torch",
}


def dumps(metadata: Metadata) -> bytes:
    """The pickle of torch's own object, in the protocol that names a global in two lines of text."""
    pickled = pickle.dumps(metadata, protocol=2)
    for name, module in {**KNOWN, **dict.fromkeys(DTYPES, "torch")}.items():
        pickled = pickled.replace(f"c{__name__}\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    return pickled


def loads(pickled: bytes) -> Any:
    """The object in a pickle, of stand-ins."""
    return _Unpickler(io.BytesIO(pickled)).load()


class SafeUnpickler(pickle._Unpickler):
    """Unpickling that takes no more memory than the pickle has room for.

    It is the one in Python: the one in C makes a table as long as the largest number in the pickle, up to many GB.
    """


class _Unpickler(SafeUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if KNOWN.get(name) == module:
            return globals()[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "set")):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        return type(name, (_Fields,), {})


def _member(*_: Any) -> Any:
    """Some releases of Python 3.11 pickle a member of an enumeration as `getattr(enumeration, name)`."""
    return _Fields()
