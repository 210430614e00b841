"""torch_dist, the distributed checkpoint of NeMo 2 and megatron-core: read what any ranks saved, lay out new ones.

`.metadata` is a pickled torch.distributed.checkpoint Metadata (dcp.py). It has the shape, dtype and chunks of every
key. For every chunk it has the file, offset and length of a `torch.save` archive (archive.py), which holds that chunk
alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slipway.checkpoint import archive, dcp
from slipway.checkpoint.descriptors import Descriptors
from slipway.errors import DataError, UsageError
from slipway.tensors.bits import Bits, bits_type, empty
from slipway.tensors.refs import DTYPE_BYTES, Ref, TensorInfo
from slipway.untrusted import read_bytes, read_text, unreadable

PREFIX = "module."  # NeMo's module around Megatron's model
# What training saves beside the weights. Megatron-LM chains several optimizers of one model.
STATE = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler|iteration$")
# Keys of tensors that are stacked: of all layers, of all experts. A number between the two groups names one of them.
STACKS = (r"(.*?\blayers\.)(?!\d+\.)(.+)", r"(.*\bexperts\.experts\.)(?!\d+\.)(.+)")
FORMAT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
FORMAT += '"common_backend": "torch", "common_backend_version": 1}'
AGAIN = "copy the checkpoint again"
MAX_METADATA_BYTES = 1 << 29  # Megatron's own of DeepSeek-V3 has some ten million
LARGEST = 1 << 60  # of a number: shapes are multiplied
FILE_BYTES = 16_000_000_000  # of one file; the next archive begins another


TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM and Megatron-Bridge write it into the root folder


def newest(checkpoint: Path) -> Path:
    """The newest iteration's folder in a root folder of Megatron-LM or Megatron-Bridge; any other folder itself.

    Errors: DataError for an iteration that is not there.
    """
    try:
        iteration = read_text(checkpoint / TRACKER, 100).strip()[:20]
    except DataError:
        return checkpoint
    inner = checkpoint / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else "release")
    if not inner.is_dir():
        raise DataError(f"{checkpoint / TRACKER} names iteration {iteration}, but there is no {inner.name}")
    return inner


def weights_folder(checkpoint: Path) -> Path:
    """The folder with `.metadata`: `checkpoint`, the one inside it, or that of the newest iteration in it."""
    checkpoint = newest(checkpoint)
    for folder in (checkpoint / "weights", checkpoint):
        if (folder / ".metadata").is_file():
            return folder
    if not checkpoint.exists():
        raise UsageError(f"{checkpoint} does not exist; give the folder of a NeMo checkpoint")
    raise DataError(
        f"{checkpoint} is not a NeMo checkpoint, or not all of it: weights/.metadata is missing; "
        "check the path, or copy the checkpoint again"
    )


# Unpickling and using damaged metadata can raise these. Anything else is a defect of ours, and shows as one.
UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    StopIteration,  # of an archive without the entry that is looked for
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)

# ---------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and the archive that holds it: `length` bytes of `file` from `start` on.

    Args:
        added: axes of the tensor that the archive does not have: it is of one layer, the tensor of all.
        fixed: entries of the first axes of the archive, which the tensor does not have.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    added: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()  # the archive's shape

    def in_stack(self, axis: int, place: int) -> _Chunk:
        """The same in a tensor that has this one as entry `place` of a new axis."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets.insert(axis, place)
        sizes.insert(axis, 1)
        return replace(self, offsets=tuple(offsets), sizes=tuple(sizes), added=tuple(sorted((*self.added, axis))))

    def box_in_archive(self, box: _Box) -> _Box:
        """The archive's part of a box of this chunk."""
        kept = [extent for axis, extent in enumerate(box) if axis not in self.added]
        return [(place, place + 1) for place in self.fixed] + kept


class Reader:
    """The tensors of a torch_dist checkpoint, under their keys without NeMo's prefix. Threads may share it.

    `tensors` maps each key to its shape and dtype. `prefixed`: the keys have NeMo's prefix. `extents` maps each file to
    the bytes that it must have at least.

    Args:
        checkpoint: the checkpoint or its weights folder.
        whole: DataError if one of its files is missing.
    """

    def __init__(self, checkpoint: Path, *, whole: bool = True) -> None:
        self.folder = weights_folder(checkpoint)
        path = self.folder / ".metadata"
        self.tensors: dict[str, TensorInfo] = {}
        self.extents: dict[str, int] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._descriptors = Descriptors()
        self._layouts = archive.Layouts()
        self._found: dict[_Chunk, archive.Stored] = {}
        try:
            metadata = dcp.loads(read_bytes(path, MAX_METADATA_BYTES, AGAIN))
            places = places_of(metadata)
            for where in metadata.storage_data.values():
                end = max(self.extents.get(where.relative_path, 0), where.offset + where.length)
                self.extents[where.relative_path] = end
            # Every chunk has a place of its own. Many tensors with one long list of chunks would have more.
            left = len(places)
            self.prefixed = any(key.startswith(PREFIX) for key in metadata.state_dict_metadata)
            for key, entry in metadata.state_dict_metadata.items():
                if hasattr(entry, "chunks"):  # else it is an object that is not a tensor, such as extra state
                    short, shape = key.removeprefix(PREFIX), _numbers(entry.size)
                    self.tensors[short] = TensorInfo(shape, _known(entry.properties.dtype))
                    if (left := left - len(entry.chunks)) < 0:
                        raise ValueError("more chunks than places for them")
                    self._chunks[short] = [_chunk(key, shape, chunk, places) for chunk in entry.chunks]
        except UNREADABLE as error:
            raise unreadable(path, error, "copy the checkpoint again") from None
        for path in self.files() if whole else ():
            if not path.is_file():
                raise DataError(f"{self.folder}: file {path.name} is missing; copy the checkpoint again")

    def files(self) -> list[Path]:
        """Every file with tensors."""
        return sorted(self.folder / name for name in {part.file for parts in self._chunks.values() for part in parts})

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor, put together from the chunks that hold it; DataError if they do not hold all of it."""
        info = self.tensors[ref.name]
        shape = ref.shape(info.shape)
        low = chunk_offsets(ref, info.shape)
        high = [at + size for at, size in zip(low, chunk_sizes(ref, info.shape), strict=True)]
        out = None
        boxes: list[_Box] = []
        for chunk in self._chunks[ref.name]:
            box = [(max(a, o), min(b, o + s)) for a, b, o, s in zip(low, high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in box):
                continue
            source = self._load(ref.name, chunk, [(a - o, b - o) for (a, b), o in zip(box, chunk.offsets, strict=True)])
            if source.size == math.prod(shape):  # one chunk holds all, as in our own checkpoints: no copy
                return source.reshape(shape)
            if out is None:
                out = empty([b - a for a, b in zip(low, high, strict=True)], bits_type(info.dtype))
            out[tuple(slice(a - o, b - o) for (a, b), o in zip(box, low, strict=True))] = source
            boxes.append(box)
        # `out` is memory that was used before: a place that no chunk fills would hold another tensor's elements.
        if out is None or not _fill_exactly(boxes, out.size):
            raise DataError(
                f"{self.folder}: the chunks of tensor {ref.name} leave gaps or overlap; copy the checkpoint again"
            )
        return out.reshape(shape)

    def adopt(self, wanted: Mapping[str, TensorInfo]) -> None:
        """Give tensors the names that are wanted, where Megatron has other ones for the same.

        A key may be of all layers or of one layer, of all experts or of one expert: releases of megatron-core differ.
        """
        used: set[str] = set()
        for key, info in wanted.items():
            if key not in self.tensors and (found := self._assembled(key, info)):
                self.tensors[key], self._chunks[key], names = found
                used |= names
        for key in used - wanted.keys():
            self.tensors.pop(key, None)
            self._chunks.pop(key, None)

    def _assembled(self, key: str, info: TensorInfo) -> tuple[TensorInfo, list[_Chunk], set[str]] | None:
        """(info, chunks, names used) of a tensor that other keys hold; None if they do not."""
        for pattern in STACKS:
            if match := re.fullmatch(pattern, key):
                before, after = match.groups()
                axis = 1 if "experts" in pattern and "layers." in key and not re.search(r"layers\.\d", key) else 0
                if len(info.shape) > axis and (found := self._stack(before, after, info.shape[axis], axis)):
                    return found
        if (match := re.fullmatch(r"(.*?layers\.)(\d+)\.(.*)", key)) and (stack := match[1] + match[3]) in self.tensors:
            return self._entry(stack, int(match[2]))
        return None

    def _stack(
        self, before: str, after: str, count: int, axis: int
    ) -> tuple[TensorInfo, list[_Chunk], set[str]] | None:
        names = [f"{before}{place}.{after}" for place in range(count)]
        chunks: list[_Chunk] = []
        used: set[str] = set()
        for place, name in enumerate(names):
            found = (self.tensors[name], self._chunks[name], {name}) if name in self.tensors else None
            found = found or self._assembled(name, TensorInfo(()))
            if found is None:
                return None
            info, parts, inner = found
            chunks += [part.in_stack(axis, place) for part in parts]
            used |= inner
        shape = list(info.shape)
        shape.insert(axis, count)
        return TensorInfo(tuple(shape), info.dtype), chunks, used

    def _entry(self, stack: str, place: int) -> tuple[TensorInfo, list[_Chunk], set[str]] | None:
        info = self.tensors[stack]
        chunks = [
            replace(one, offsets=one.offsets[1:], sizes=one.sizes[1:], fixed=(*one.fixed, place - one.offsets[0]))
            for one in self._chunks[stack]
            if one.offsets[0] <= place < one.offsets[0] + one.sizes[0] and 0 not in one.added
        ]
        return (TensorInfo(info.shape[1:], info.dtype), chunks, {stack}) if chunks else None

    def cut_rows(self, key: str, rows: int) -> int:
        """Take only the first rows of a tensor, as of a padded vocabulary; the number of rows left out."""
        info = self.tensors[key]
        self.tensors[key] = TensorInfo((min(rows, info.shape[0]), *info.shape[1:]), info.dtype)
        return max(0, info.shape[0] - rows)

    def cuts(self, key: str, axis: int) -> int:
        """How many parts the chunks of a tensor cut one of its axes into: its shards, if ranks have saved it."""
        return len({chunk.offsets[axis] for chunk in self._chunks[key]})

    def _load(self, name: str, chunk: _Chunk, box: _Box) -> Bits:
        """The elements in a box of a chunk: a tensor that one rank has saved is one chunk, of any size."""
        where = self.folder / chunk.file
        descriptor = self._descriptors.of(where)
        try:
            found = self._found.get(chunk)
            if found is None:  # the directory and the pickle of the archive are read once
                found = self._layouts.locate(descriptor, chunk.start, chunk.length, chunk.stored)
                self._found[chunk] = found
            if found.dtype != self.tensors[name].dtype:
                raise DataError(f"{where}: tensor {name} does not match .metadata; copy the checkpoint again")
            return found.read(descriptor, chunk.box_in_archive(box)).reshape([stop - start for start, stop in box])
        except (OSError, *UNREADABLE) as error:
            raise unreadable(f"{where}: tensor {name}", error, "copy it again") from None


def is_state(key: str) -> bool:
    """The key is of what training saves beside the weights."""
    return bool(STATE.match(key))


def places_of(metadata: Any) -> dict[tuple[str, tuple[int, ...]], Any]:
    """(key, offsets) → where a chunk or an object lies, checked: in a file of the folder, from 0 on or later.

    Errors: those of UNREADABLE.
    """
    places = {}
    for at, where in metadata.storage_data.items():
        if not isinstance(at.fqn, str):  # anything else may take for ever to be hashed
            raise ValueError("a key that is no name")
        if _plain_name(where.relative_path) and not 0 <= where.offset <= where.offset + where.length < LARGEST:
            raise ValueError("a place outside its file")
        places[at.fqn, _numbers(at.offset or ())] = where
    return places


def _numbers(shape: Any) -> tuple[int, ...]:
    numbers = dcp.Size(shape)
    if not all(type(number) is int and 0 <= number < LARGEST for number in numbers):
        raise ValueError("not a shape")
    return numbers


_Box = list[tuple[int, int]]  # [start, stop) in each dimension


def _fill_exactly(boxes: list[_Box], size: int) -> bool:
    """Boxes that lie within `size` elements hold each of them once: as many elements, and no two boxes overlap."""
    apart = all(
        any(a >= d or c >= b for (a, b), (c, d) in zip(one, other, strict=True))
        for one, other in itertools.combinations(boxes, 2)
    )
    return apart and sum(math.prod(b - a for a, b in box) for box in boxes) == size


def _known(dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError("not a known dtype")
    return dtype


def _chunk(key: str, shape: tuple[int, ...], chunk: Any, places: Mapping[Any, Any]) -> _Chunk:
    offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
    if not all(0 <= o <= o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"chunk of {key} outside the tensor")
    where = places[key, offsets]
    return _Chunk(offsets, sizes, where.relative_path, where.offset, where.length, stored=sizes)


@functools.lru_cache(1000)  # experts have ten thousand parts in a file
def _plain_name(file: str) -> str:
    """The name of a file in the folder; a foreign `.metadata` must not lead to other files of this machine."""
    if Path(file).name != file:
        raise ValueError(f"{file} lies outside the folder")
    return file


# ---------------------------------------------------------------------------- writing


class Layout:
    """Where every chunk of a new checkpoint will be.

    Args:
        tensors: key → TensorInfo, without NeMo's prefix.
        chunks: the parts that will be written, in order; together they are all elements of all tensors.
        extra_state: keys under which Transformer Engine expects an entry.
        prefix: before each key.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], chunks: list[Ref], extra_state: list[str], prefix: str = PREFIX
    ) -> None:
        self.tensors, self.prefix = dict(tensors), prefix
        self.sizes: dict[str, int] = {}
        self.places: dict[Ref, tuple[str, int, int]] = {}
        self.extra: dict[str, tuple[str, int, int]] = {}
        self.empty_state = archive.EMPTY_STATE
        # The length depends on dtype and shape alone, and a model of 100,000 chunks has few of them.
        lengths: dict[tuple[str, tuple[int, ...]], int] = {}
        for ref in chunks:
            info = self.tensors[ref.name]
            shape = chunk_sizes(ref, info.shape)
            kind = (info.dtype, shape)
            if kind not in lengths:
                lengths[kind] = archive.length(shape, info.dtype)
            self.places[ref] = self._take(lengths[kind])
        for key in extra_state:
            self.extra[key] = self._take(len(self.empty_state))

    def _take(self, length: int) -> tuple[str, int, int]:
        """(file, offset, length) of the next free place."""
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
            index = dcp.MetadataIndex(fqn=self.prefix + ref.name, offset=offsets, index=None)
            storage[index] = dcp.StorageInfo(relative_path=file, offset=offset, length=length)
        state: dict[str, Any] = {
            self.prefix + name: dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=info.dtype), size=dcp.size(info.shape), chunks=chunks[name]
            )
            for name, info in self.tensors.items()
        }
        for key, (file, offset, length) in self.extra.items():
            state[self.prefix + key] = dcp.BytesStorageMetadata()
            index = dcp.MetadataIndex(fqn=self.prefix + key, offset=None, index=None)
            storage[index] = dcp.StorageInfo(relative_path=file, offset=offset, length=length)
        return dcp.dumps(
            dcp.Metadata(
                state_dict_metadata=state, planner_data=None, storage_data=storage, storage_meta=None, version=None
            )
        )


def chunk_offsets(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where the part begins: one number per dimension of its tensor, whose shape is `shape`."""
    start = [*ref.index, ref.rows[0] if ref.rows else 0]
    return tuple((start + [0] * len(shape))[: len(shape)])


def chunk_sizes(ref: Ref, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the part: one number per dimension of its tensor, whose shape is `shape`."""
    return (1,) * len(ref.index) + ref.shape(shape)


def common_state() -> bytes:
    """The content of common.pt, which holds what is not sharded; for weights alone this is only marks of the format."""
    marks = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "dp_reshardable",
    }
    state = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {}}
    return archive.of_plain({**state, "optimizer_states": [], "lr_schedulers": [], "content_metadata": marks})
