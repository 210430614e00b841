"""torch.distributed.checkpoint's metadata without torch: classes of our own, pickled under the names of torch's.

`dumps` gives the pickle that torch would make of the same objects. `loads` reads torch's pickles into our classes. It
creates objects of no other class, so a foreign file runs no code. Everything else in a pickle, such as Megatron's
planning notes, becomes an object that does nothing.

A pickle is a program: a few bytes of it can ask for gigabytes, or for a key whose hash takes years. SafeUnpickler knows
only the instructions that torch writes, and refuses what none of torch's files has.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from slipway.garbage import uncollected
from slipway.tensors.refs import TORCH_NAMES

METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
PLANNER = "torch.distributed.checkpoint.planner"
DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


class Fields:
    """An object with any fields."""

    def __init__(self, *_: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class Metadata(Fields):
    """state_dict_metadata: key → TensorStorageMetadata or BytesStorageMetadata; storage_data: MetadataIndex →
    StorageInfo."""


class TensorStorageMetadata(Fields):
    """properties, size, chunks."""


class BytesStorageMetadata(Fields):
    """An object that is not a tensor."""


class ChunkStorageMetadata(Fields):
    """offsets, sizes."""


class MetadataIndex(Fields):
    """fqn (the key), offset, index; torch leaves out what is None."""

    offset = index = None


class StorageInfo(Fields):
    """relative_path, offset, length."""


_StorageInfo = StorageInfo
StorageInfo.__qualname__ = StorageInfo.__name__ = "_StorageInfo"  # the name in torch


class TensorProperties(Fields):
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


MOST_DIMENSIONS = 32  # of a tensor


def Size(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if len(numbers) > MOST_DIMENSIONS:  # else many calls with one long list would copy it each time
        raise ValueError("too many dimensions")
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


def loads(pickled: bytes, *, known_only: bool = False) -> Any:
    """The object in a pickle, with our classes in place of torch's. Nobody may change it: who asks next gets it again.

    A run looks at a checkpoint before it starts and when it loads it, and a large one takes a second each time.

    Args:
        known_only: refuse what torch and Megatron do not write there: this pickle will be loaded by torch itself, which
            calls what it names.
    """
    for before, had_known_only, found in _last:
        if before == pickled and (had_known_only or not known_only):
            return found
    with uncollected():
        found = AnyUnpickler(pickled, known_only).load()
    _last[:] = [(pickled, known_only, found)]
    return found


_last: list[tuple[bytes, bool, Any]] = []  # at most one: what was read before


class Unexpected(pickle.UnpicklingError):
    """The pickle names what torch does not write there."""


# The instructions in pickles of torch, of protocols 2 to 5. None calls anything but what find_class gave, and none
# takes more memory than its own bytes explain: BYTEARRAY8, for one, takes as much as it says.
INSTRUCTIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE,
    pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.APPEND,
    pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
)  # fmt: skip
LONGEST_KEY = (
    64  # parts of a key that is a tuple: torch's planner has such for nested states, with a part for each level
)
MOST_FIELDS = 64  # of an object; an object that takes those of a long dictionary copies it
MOST_UNKNOWN = 1000  # classes of which only the name is known; each of them takes a kilobyte

_ALL: dict[int, Callable[..., Any]] = dict(pickle._Unpickler.dispatch)


class SafeUnpickler(pickle._Unpickler):
    """Unpickling that needs no more memory and time than the size of the pickle explains.

    This is Python's implementation. The one in C allocates a table as long as the largest memo number in the pickle: a
    damaged file of some bytes would take many GB.
    """

    stack: list[Any]  # of Python's own implementation
    most_fields = MOST_FIELDS

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))

    def is_key(self, value: Any) -> bool:
        """A dictionary of torch's can have this key. Hashing tuples of tuples of one another could take for ever."""
        if isinstance(value, tuple):
            return len(value) <= LONGEST_KEY and all(isinstance(part, (str, int)) for part in value)
        return isinstance(value, (str, int, float, bytes, type(None), Fields))

    def check_keys(self, keys: Iterable[Any]) -> None:
        if not all(map(self.is_key, keys)):
            raise pickle.UnpicklingError("a key that torch does not write")

    def build(self) -> None:
        """BUILD sets attributes: only objects that are made to hold fields have any."""
        state, filled = self.stack[-1], self.stack[-2]
        if not isinstance(filled, Fields) or (isinstance(state, dict) and len(state) > self.most_fields):
            raise pickle.UnpicklingError("attributes of what has none")
        _ALL[pickle.BUILD[0]](self)

    def set_item(self) -> None:
        self.check_keys(self.stack[-2:-1])
        self._check_filled(self.stack[-3], dict)
        _ALL[pickle.SETITEM[0]](self)

    def set_items(self) -> None:
        self.check_keys(self.stack[::2])  # all since the mark; below it stands what is filled
        self._check_filled(self.metastack[-1][-1], dict)
        _ALL[pickle.SETITEMS[0]](self)

    def add_items(self) -> None:
        self.check_keys(self.stack)
        self._check_filled(self.metastack[-1][-1], set)
        _ALL[pickle.ADDITEMS[0]](self)

    def _check_filled(self, filled: Any, kind: type) -> None:
        if not isinstance(filled, kind):
            raise pickle.UnpicklingError("items of what has none")

    metastack: list[list[Any]]  # what stands below each mark
    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {code[0]: _ALL[code[0]] for code in INSTRUCTIONS}
    dispatch |= {pickle.BUILD[0]: build, pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items}
    dispatch |= {pickle.ADDITEMS[0]: add_items}


# Beside KNOWN, what torch and Megatron write into this file: name → module. Nothing is done with it. Where NVIDIA's
# client for object stores is installed, as beside NeMo, Megatron writes the plan by which its ranks have saved as well.
ALSO_WRITTEN = {
    "StorageMeta": METADATA,
    **dict.fromkeys(("MCoreMetadata", "MCoreSavePlan"), "megatron.core.dist_checkpointing.strategies.torch"),
    **dict.fromkeys(("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"), PLANNER),
    "PosixPath": "pathlib",
    "_TypedStorageInfo": FILESYSTEM,
}


class AnyUnpickler(SafeUnpickler):
    """Reads classes that are not known as Fields.

    Args:
        known_only: refuse them.
    """

    def __init__(self, pickled: bytes, known_only: bool = False) -> None:
        super().__init__(pickled)
        self._known_only, self._left = known_only, len(pickled)
        self._unknown: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 spells it
        if KNOWN.get(name) == module:
            return globals()[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return ordered
        if (module, name) == ("builtins", "set"):
            return self._set
        if (module, name) == ("builtins", "getattr"):
            return self._member
        if self._known_only and ALSO_WRITTEN.get(name) != module:
            raise Unexpected(f"it names {module}.{name}, which torch does not write there")
        if len(self._unknown) >= MOST_UNKNOWN:
            raise pickle.UnpicklingError("too many classes")
        # Of a class that only has this name: it holds fields and runs nothing.
        return self._unknown.setdefault(name, type(name, (Fields,), {}))

    def _set(self, items: Iterable[Any] = ()) -> set[Any]:
        items = list(items)
        self._left -= len(items)
        if self._left < 0:  # the same list again and again
            raise pickle.UnpicklingError("more items than the pickle holds")
        self.check_keys(items)
        return set(items)

    def _member(self, kind: Any, name: Any) -> Any:
        """In place of getattr, which some releases of Python 3.11 put into the pickle of a member of an enumeration."""
        if self._known_only and not (kind is _MEM_FORMAT_ENCODING and isinstance(name, str) and name.isupper()):
            raise Unexpected("it reads an attribute that torch does not read")
        return Fields()


def ordered() -> collections.OrderedDict[Any, Any]:
    """Its items follow one by one: given all at once their keys would not be checked."""
    return collections.OrderedDict()
