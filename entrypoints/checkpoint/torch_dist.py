"""torch_dist, the distributed checkpoint of NeMo 2 and megatron-core: reading what any number of ranks saved, and
laying out new ones.

`.metadata` is a pickled torch.distributed.checkpoint Metadata: for every key its shape, dtype and chunks, and for
every chunk the file, offset and length of an independent `torch.save` archive. The pickle is read with a list of
allowed classes, so that a foreign file runs no code and Megatron need not be imported.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from enum import EnumType
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoints.checkpoint.refs import TORCH_NAMES, Ref, TensorInfo
from entrypoints.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

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
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

# ---------------------------------------------------------------------------- reading


class _Unknown:
    """Stands for what is pickled along but not needed (Megatron's own planning notes)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _enum_member(owner: Any, name: str) -> Any:
    """Some releases of Python 3.11 pickle a member of an enumeration as `getattr(enumeration, name)`."""
    return owner[name] if isinstance(owner, EnumType) else _Unknown()


class _MetadataUnpickler(pickle.Unpickler):
    """Allows the data classes of torch's checkpoint metadata; everything else becomes an inert stand-in."""

    ALLOWED = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module in self.ALLOWED and "." not in name:
            return super().find_class(module, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "set")):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        return type(name, (_Unknown,), {})


@dataclass(frozen=True)
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
        import torch

        self.folder = weights_folder(checkpoint)
        path = self.folder / ".metadata"
        names = {getattr(torch, name): spelling for spelling, name in TORCH_NAMES.items()}
        self.tensors: dict[str, TensorInfo] = {}
        self.extents: dict[str, int] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            places = {(at.fqn, tuple(at.offset or ())): where for at, where in metadata.storage_data.items()}
            for where in metadata.storage_data.values():
                end = max(self.extents.get(where.relative_path, 0), where.offset + where.length)
                self.extents[_plain_name(where.relative_path)] = end
            for key, entry in metadata.state_dict_metadata.items():
                if hasattr(entry, "chunks"):
                    short = key.removeprefix(PREFIX)
                    self.tensors[short] = TensorInfo(tuple(entry.size), names[entry.properties.dtype])
                    self._chunks[short] = [_chunk(key, tuple(entry.size), chunk, places) for chunk in entry.chunks]
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:
            raise DataError(f"{path}: garbled ({type(error).__name__}); copy the checkpoint again") from None
        for path in self.files() if whole else ():
            if not path.is_file():
                raise DataError(f"{self.folder}: {path.name} is missing; copy the checkpoint again")

    def files(self) -> list[Path]:
        """Every file that holds tensors."""
        return sorted({self.folder / chunk.file for chunks in self._chunks.values() for chunk in chunks})

    def read(self, ref: Ref) -> Tensor:
        """A part of a tensor, put together from the chunks that it lies in."""
        import torch

        info = self.tensors[ref.name]
        shape = ref.shape(info.shape)
        low = [*ref.index, ref.rows[0] if ref.rows else 0]
        low = (low + [0] * len(info.shape))[: len(info.shape)]
        high = [place + 1 for place in ref.index] + [a + n for a, n in zip(low[len(ref.index) :], shape, strict=True)]
        out = torch.empty(
            [b - a for a, b in zip(low, high, strict=True)], dtype=getattr(torch, TORCH_NAMES[info.dtype])
        )
        filled = 0
        for chunk in self._chunks[ref.name]:
            box = [(max(a, o), min(b, o + s)) for a, b, o, s in zip(low, high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in box):
                continue
            part = self._load(ref.name, chunk)
            source = part[tuple(slice(a - o, b - o) for (a, b), o in zip(box, chunk.offsets, strict=True))]
            out[tuple(slice(a - o, b - o) for (a, b), o in zip(box, low, strict=True))] = source
            filled += source.numel()
        if filled != out.numel():
            raise DataError(f"{self.folder}: tensor {ref.name} has holes; copy the checkpoint again")
        return out.view(shape)

    def _load(self, name: str, chunk: _Chunk) -> Tensor:
        import torch

        with (self.folder / chunk.file).open("rb") as file:
            file.seek(chunk.start)
            blob = file.read(chunk.length)
        where = self.folder / chunk.file
        try:
            part = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
            found = (tuple(part.shape), part.dtype)
        except UNREADABLE as error:
            raise DataError(f"{where}: tensor {name} is garbled ({type(error).__name__}); copy it again") from None
        if found != (chunk.sizes, getattr(torch, TORCH_NAMES[self.tensors[name].dtype])):
            raise DataError(f"{where}: tensor {name} is another one than .metadata says; copy the checkpoint again")
        return part


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
        self.empty_state = empty_state()
        overhead: dict[tuple[str, int], int] = {}
        for ref in chunks:
            info = self.tensors[ref.name]
            shape = chunk_sizes(ref, info.shape)
            kind = (info.dtype, *shape)
            if kind not in overhead:
                overhead[kind] = archive_bytes(TensorInfo(shape, info.dtype))
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
        import torch
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {name: [] for name in self.tensors}
        storage = {}
        for ref, (file, offset, length) in self.places.items():
            shape = self.tensors[ref.name].shape
            offsets = torch.Size(chunk_offsets(ref, shape))
            chunks[ref.name].append(dcp.ChunkStorageMetadata(offsets, torch.Size(chunk_sizes(ref, shape))))
            storage[dcp.MetadataIndex(PREFIX + ref.name, offsets)] = _StorageInfo(file, offset, length)
        state: dict[str, Any] = {
            PREFIX + name: dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=getattr(torch, TORCH_NAMES[info.dtype])),
                torch.Size(info.shape),
                chunks[name],
            )
            for name, info in self.tensors.items()
        }
        for key, (file, offset, length) in self.extra.items():
            state[PREFIX + key] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(PREFIX + key)] = _StorageInfo(file, offset, length)
        return pickle.dumps(dcp.Metadata(state_dict_metadata=state, storage_data=storage))


def chunk_offsets(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where the part begins, one number per dimension of its tensor."""
    start = [*ref.index, ref.rows[0] if ref.rows else 0]
    return tuple((start + [0] * len(shape))[: len(shape)])


def chunk_sizes(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part's extent, one number per dimension of its tensor."""
    return (1,) * len(ref.index) + ref.shape(shape)


def serialize(tensor: Tensor) -> memoryview:
    """The `torch.save` archive of a tensor, which holds no more than the tensor's own elements."""
    import torch

    buffer = io.BytesIO()
    torch.save(tensor if tensor.is_contiguous() and _owns_storage(tensor) else tensor.contiguous().clone(), buffer)
    return buffer.getbuffer()


def _owns_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def archive_bytes(info: TensorInfo) -> int:
    """The length of `serialize` for any tensor of this shape and dtype: the values do not change it."""
    import torch

    return len(serialize(torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))))


def empty_state() -> bytes:
    """What Megatron writes for a module without extra state; Transformer Engine takes it for "nothing to restore"."""
    import torch

    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def common_state() -> bytes:
    """common.pt: what is not sharded. A weights-only checkpoint has nothing but the marks of its own form."""
    import torch

    buffer = io.BytesIO()
    marks = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "dp_reshardable",
    }
    state = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {}}
    torch.save({**state, "optimizer_states": [], "lr_schedulers": [], "content_metadata": marks}, buffer)
    return buffer.getvalue()
