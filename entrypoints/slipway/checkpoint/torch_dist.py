"""torch_dist, the distributed checkpoint of NeMo 2 and megatron-core: reading what any number of ranks saved, and
laying out new ones.

`.metadata` is a pickled torch.distributed.checkpoint Metadata (dcp.py): for every key its shape, dtype and chunks,
and for every chunk the file, offset and length of an independent `torch.save` archive (archive.py).
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import archive, dcp
from slipway.errors import DataError, UsageError
from slipway.tensors.bits import Bits, bits_type, empty
from slipway.tensors.refs import Ref, TensorInfo

PREFIX = "module."  # NeMo's module around Megatron's model
FORMAT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
FORMAT += '"common_backend": "torch", "common_backend_version": 1}'
FILE_BYTES = 16_000_000_000


def weights_folder(checkpoint: Path) -> Path:
    """The folder with `.metadata`, for a checkpoint given as itself or as its weights folder."""
    for folder in (checkpoint / "weights", checkpoint):
        if (folder / ".metadata").is_file():
            return folder
    if not checkpoint.exists():
        raise UsageError(f"{checkpoint} does not exist")
    raise DataError(f"{checkpoint} is no NeMo checkpoint: it has no weights/.metadata; is it complete?")


# What unpickling and using garbled metadata can raise.
UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)

# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Reader:
    """The tensors of a torch_dist checkpoint, keys without NeMo's prefix. Threads may share it.

    `tensors` maps each key to its shape and dtype, `extents` each file to the bytes that it must have.

    Args:
        checkpoint: the checkpoint or its weights folder.
        whole: refuse a checkpoint that lacks one of its files.
    """

    def __init__(self, checkpoint: Path, *, whole: bool = True) -> None:
        self.folder = weights_folder(checkpoint)
        path = self.folder / ".metadata"
        self.tensors: dict[str, TensorInfo] = {}
        self.extents: dict[str, int] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._descriptors: dict[str, int] = {}
        try:
            metadata = dcp.loads(path.read_bytes())
            places = {(at.fqn, tuple(at.offset or ())): where for at, where in metadata.storage_data.items()}
            for where in metadata.storage_data.values():
                end = max(self.extents.get(where.relative_path, 0), where.offset + where.length)
                self.extents[_plain_name(where.relative_path)] = end
            for key, entry in metadata.state_dict_metadata.items():
                if hasattr(entry, "chunks"):
                    short = key.removeprefix(PREFIX)
                    self.tensors[short] = TensorInfo(tuple(entry.size), _known(entry.properties.dtype))
                    self._chunks[short] = [_chunk(key, tuple(entry.size), chunk, places) for chunk in entry.chunks]
        except UNREADABLE as error:
            raise DataError(f"{path}: garbled ({type(error).__name__}); copy the checkpoint again") from None
        for path in self.files() if whole else ():
            if not path.is_file():
                raise DataError(f"{self.folder}: {path.name} is missing; copy the checkpoint again")

    def files(self) -> list[Path]:
        """Every file that holds tensors."""
        return sorted({self.folder / chunk.file for chunks in self._chunks.values() for chunk in chunks})

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor, put together from the chunks that it lies in."""
        info = self.tensors[ref.name]
        shape = ref.shape(info.shape)
        low = chunk_offsets(ref, info.shape)
        high = [at + size for at, size in zip(low, chunk_sizes(ref, info.shape), strict=True)]
        out = None
        filled = 0
        for chunk in self._chunks[ref.name]:
            box = [(max(a, o), min(b, o + s)) for a, b, o, s in zip(low, high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in box):
                continue
            part = self._load(ref.name, chunk)
            source = part[tuple(slice(a - o, b - o) for (a, b), o in zip(box, chunk.offsets, strict=True))]
            filled += source.size
            if source.size == math.prod(shape):
                return source.reshape(shape)
            if out is None:
                out = empty([b - a for a, b in zip(low, high, strict=True)], bits_type(info.dtype))
            out[tuple(slice(a - o, b - o) for (a, b), o in zip(box, low, strict=True))] = source
        if out is None or filled != out.size:
            raise DataError(f"{self.folder}: tensor {ref.name} has holes; copy the checkpoint again")
        return out.reshape(shape)

    def _load(self, name: str, chunk: _Chunk) -> Bits:
        where = self.folder / chunk.file
        descriptor = self._descriptors.get(chunk.file)
        if descriptor is None:
            descriptor = self._descriptors.setdefault(chunk.file, os.open(where, os.O_RDONLY))
        try:
            part, dtype = archive.read(descriptor, chunk.start, chunk.length, chunk.sizes)
        except UNREADABLE as error:
            raise DataError(f"{where}: tensor {name} is garbled ({type(error).__name__}); copy it again") from None
        if part.shape != chunk.sizes or dtype != self.tensors[name].dtype:
            raise DataError(f"{where}: tensor {name} is another one than .metadata says; copy the checkpoint again")
        return part


def _known(dtype: Any) -> str:
    if not isinstance(dtype, str):
        raise ValueError(f"{dtype} is no known dtype")
    return dtype


def _chunk(key: str, shape: tuple[int, ...], chunk: Any, places: Mapping[Any, Any]) -> _Chunk:
    offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
    if not all(0 <= o <= o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"chunk of {key} outside the tensor")
    where = places[key, offsets]
    file, start, length = where.relative_path, where.offset, where.length
    if not 0 <= start <= start + length:
        raise ValueError(f"chunk of {key} outside its file")
    return _Chunk(offsets, sizes, _plain_name(file), start, length)


def _plain_name(file: str) -> str:
    if Path(file).name != file:
        raise ValueError(f"{file} lies outside the folder")
    return file


# ---------------------------------------------------------------------------- writing


class Layout:
    """Where every chunk of a new checkpoint will lie.

    Args:
        tensors: key → TensorInfo, without NeMo's prefix.
        chunks: the parts that will be written, in order; together they are all of every tensor.
        extra_state: keys for which Transformer Engine expects an entry.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], chunks: list[Ref], extra_state: list[str]) -> None:
        self.tensors = dict(tensors)
        self.sizes: dict[str, int] = {}
        self.places: dict[Ref, tuple[str, int, int]] = {}
        self.extra: dict[str, tuple[str, int, int]] = {}
        self.empty_state = archive.EMPTY_STATE
        overhead: dict[tuple[str, tuple[int, ...]], int] = {}
        for ref in chunks:
            info = self.tensors[ref.name]
            shape = chunk_sizes(ref, info.shape)
            kind = (info.dtype, shape)
            if kind not in overhead:
                overhead[kind] = archive.length(shape, info.dtype)
            self.places[ref] = self._take(overhead[kind])
        for key in extra_state:
            self.extra[key] = self._take(len(self.empty_state))

    def _take(self, length: int) -> tuple[str, int, int]:
        file = f"__0_{max(0, len(self.sizes) - 1)}.distcp"
        if file in self.sizes and self.sizes[file] + length > FILE_BYTES:
            file = f"__0_{len(self.sizes)}.distcp"
        offset = self.sizes.get(file, 0)
        self.sizes[file] = offset + length
        return file, offset, length

    def metadata(self) -> bytes:
        """The content of `.metadata`."""
        chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {name: [] for name in self.tensors}
        storage = {}
        for ref, (file, offset, length) in self.places.items():
            shape = self.tensors[ref.name].shape
            offsets, sizes = dcp.size(chunk_offsets(ref, shape)), dcp.size(chunk_sizes(ref, shape))
            chunks[ref.name].append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            index = dcp.MetadataIndex(fqn=PREFIX + ref.name, offset=offsets, index=None)
            storage[index] = dcp.StorageInfo(relative_path=file, offset=offset, length=length)
        state: dict[str, Any] = {
            PREFIX + name: dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=info.dtype), size=dcp.size(info.shape), chunks=chunks[name]
            )
            for name, info in self.tensors.items()
        }
        for key, (file, offset, length) in self.extra.items():
            state[PREFIX + key] = dcp.BytesStorageMetadata()
            index = dcp.MetadataIndex(fqn=PREFIX + key, offset=None, index=None)
            storage[index] = dcp.StorageInfo(relative_path=file, offset=offset, length=length)
        return dcp.dumps(
            dcp.Metadata(
                state_dict_metadata=state, planner_data=None, storage_data=storage, storage_meta=None, version=None
            )
        )


def chunk_offsets(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where the part begins, one number per dimension of its tensor."""
    start = [*ref.index, ref.rows[0] if ref.rows else 0]
    return tuple((start + [0] * len(shape))[: len(shape)])


def chunk_sizes(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part's extent, one number per dimension of its tensor."""
    return (1,) * len(ref.index) + ref.shape(shape)


def common_state() -> bytes:
    """common.pt: what is not sharded. A weights-only checkpoint has nothing but the marks of its own form."""
    marks = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "dp_reshardable",
    }
    state = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {}}
    return archive.of_plain({**state, "optimizer_states": [], "lr_schedulers": [], "content_metadata": marks})
