"""torch.distributed.checkpoint's metadata without torch: classes of our own, pickled under the names of torch's.

`dumps` gives the pickle that torch would make of the same objects. `loads` reads torch's pickles into our classes. It
creates objects of no other class, so a foreign file runs no code. Everything else in a pickle, such as Megatron's
planning notes, becomes an object that does nothing.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from slipway.tensors.refs import TORCH_NAMES

METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


class _Fields:
    """An object with any fields."""

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
    """An object that is not a tensor."""


class ChunkStorageMetadata(_Fields):
    """offsets, sizes."""


class MetadataIndex(_Fields):
    """fqn (the key), offset, index; torch leaves out what is None."""

    offset = index = None


class StorageInfo(_Fields):
    """relative_path, offset, length."""


_StorageInfo = StorageInfo
StorageInfo.__qualname__ = StorageInfo.__name__ = "_StorageInfo"  # the name in torch


class TensorProperties(_Fields):
    """dtype, in safetensors' spelling."""

    # torch pickles these five as a plain tuple: dtype, layout, requires_grad, memory_format, pin_memory.
    def __getstate__(self) -> tuple[Any, ...]:
        layout, memory_format = _Call(_get_layout, "torch.strided"), _Call(_MEM_FORMAT_ENCODING, 0)
        return globals()[TORCH_NAMES[self.dtype]], layout, False, memory_format, False

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def size(numbers: tuple[int, ...]) -> _Call:
    """The numbers, pickled as a torch.Size."""
    return _Call(Size, numbers)


def Size(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(numbers)


def _get_layout(_: str) -> None: ...


def _MEM_FORMAT_ENCODING(_: int) -> None: ...


class _Dtype:
    """Pickled as the global variable of its name, as torch.bfloat16 is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> str:
        return self.name


# pickle looks each of them up in this module; `dumps` then writes torch for the module.
globals().update({name: _Dtype(name) for name in DTYPES})

# Name → module in torch, for everything that is written and for all classes that are read.
KNOWN = {
    **{kind.__name__: METADATA for kind in (Metadata, TensorStorageMetadata, BytesStorageMetadata)},
    **{kind.__name__: METADATA for kind in (ChunkStorageMetadata, MetadataIndex, TensorProperties)},
    "_MEM_FORMAT_ENCODING": METADATA,
    "_StorageInfo": FILESYSTEM,
    "_get_layout": "torch.serialization",
    "Size": "torch",
}


def dumps(metadata: Metadata) -> bytes:
    """The pickle that torch would write of the same object.

    Protocol 2 names a global in two lines of text, the module and the name, so that the module can be replaced.
    """
    pickled = pickle.dumps(metadata, protocol=2)
    for name, module in {**KNOWN, **dict.fromkeys(DTYPES, "torch")}.items():
        pickled = pickled.replace(f"c{__name__}\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    return pickled


def loads(pickled: bytes) -> Any:
    """The object in a pickle, with our classes in place of torch's."""
    return _Unpickler(io.BytesIO(pickled)).load()


class SafeUnpickler(pickle._Unpickler):
    """Unpickling that needs no more memory than the size of the pickle explains.

    This is Python's implementation. The one in C allocates a table as long as the largest memo number in the pickle: a
    damaged file of some bytes would take many GB.
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
        return type(name, (_Fields,), {})  # of a class that only has this name: it holds fields and runs nothing


def _member(*_: Any) -> Any:
    """In place of getattr, which some releases of Python 3.11 put into the pickle of a member of an enumeration."""
    return _Fields()
