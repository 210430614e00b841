"""Reading a checkpoint into the model: by several threads, and each tensor from its file to where the model has it.

torch makes memory for each tensor, reads it, and copies it to its place, one after the other. To make the memory takes
longer than to read. Here a tensor on the CPU is read where it lies, and one on a GPU by way of memory that is used
again and again.

The threads do nothing but read, and neighbours in a file at once. If each found and copied what it has read, they would
wait for Python's lock and not for the file, where there are 20,000 matrices of experts. So one thread finds and copies.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from slipway.checkpoint.archive import Layouts, Stored, fill
from slipway.checkpoint.descriptors import Descriptors
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.tensors.refs import TORCH_NAMES
from slipway.training.patches import TORCH, wrap

PIECE = 1 << 24  # bytes that a thread reads at a time into memory that is used again, at most
ON_THE_WAY = 2  # such pieces for each thread
GAP = 1 << 14  # bytes between two tensors that are read at once, at most; an archive has a thousand around its elements
MOST_PARTS = 500  # that are read at once: the system takes 1,024 places in memory
AT_ONCE = 1000  # tensors that are found before the next look at what has been read
SMALL = 1 << 12  # bytes of an object that may be there often
MOST = 8  # threads of a rank
Read = Callable[[Any, LoadPlan, LoadPlanner], Any]


def read_in_threads() -> None:
    """Let torch read checkpoints so from now on."""
    wrap(FileSystemReader, "read_data", reading_in_threads, TORCH)


def reading_in_threads(read_data: Read) -> Read:
    """The same as `FileSystemReader.read_data`, which does what is left, as tensors of another class."""

    @functools.wraps(read_data)
    def read(self: Any, plan: LoadPlan, planner: Any) -> Any:
        if not isinstance(
            planner, DefaultLoadPlanner
        ):  # Megatron's is one: it tells where a tensor goes without a trace
            return read_data(self, plan, planner)
        left = _Loading(_Source(self, planner)).load(plan.items)
        return read_data(self, dataclasses.replace(plan, items=left), planner)

    return read


def width() -> int:
    """How many threads a rank has: its share of the processors."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST, share))


class _Loading:
    """One load: `width` threads that read, and the caller's, which finds what they read and copies it into the model.

    Lists of parts, each list to be read at once, go to the threads by `_wanted`, and come back by `_done`.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._on_gpu = torch.cuda.is_available()
        self._wanted: SimpleQueue[list[_Part] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[list[_Part], Tensor | None, BaseException | None]] = SimpleQueue()
        # Memory for a piece, and what tells that all of it has been copied to the GPU.
        self._free: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | None] = SimpleQueue()
        for piece in torch.empty(width() * ON_THE_WAY, PIECE, dtype=torch.uint8, pin_memory=self._on_gpu):
            self._free.put((piece, None))
        self._left: dict[int, ReadItem] = {}  # an item of several parts is left once

    def load(self, items: Sequence[ReadItem]) -> list[ReadItem]:
        """Read into the model what can be read, and return the rest."""
        with ThreadPoolExecutor(width()) as pool:
            for _ in range(width()):
                pool.submit(self._read)
            try:
                reads = 0
                for first in range(0, len(items), AT_ONCE):
                    for parts in _together(self._find(items[first : first + AT_ONCE])):
                        self._wanted.put(parts)
                        reads += 1
                    while not self._done.empty():
                        self._finish()
                        reads -= 1
                for _ in range(reads):
                    self._finish()
            finally:
                self._end()
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return [*self._left.values()]

    def _find(self, items: Sequence[ReadItem]) -> list[_Part]:
        """What to read for them, in the order of the files."""
        found: list[_Part] = []
        for item in items:
            if (parts := self._source.find(item)) is not None:
                found += parts
            elif not self._source.load_object(item):
                self._left[id(item)] = item
        return sorted(found, key=lambda part: (part.descriptor, part.begin))

    def _end(self) -> None:
        """Let the threads end, wherever they wait. What nobody will use is not read."""
        with contextlib.suppress(Empty):
            while True:
                self._wanted.get_nowait()
        for _ in range(width()):
            self._wanted.put(None)
            self._free.put(None)

    def _read(self) -> None:
        """What a thread does."""
        while (parts := self._wanted.get()) is not None:
            piece, error = None, None
            try:
                if parts[0].is_in_memory:
                    memory = [parts[0].rows.target.view(torch.uint8)]
                elif (free := self._free.get()) is None:
                    return
                else:
                    piece, copied = free
                    memory = _divided(piece, parts)
                    if copied is not None:
                        copied.synchronize()
                _fill(parts, memory)
            except BaseException as found:
                error = found
            self._done.put((parts, piece, error))

    def _finish(self) -> None:
        """Wait for a thread's next read, and copy what it has brought."""
        parts, piece, error = self._done.get()
        copied = None
        if isinstance(error, EOFError):
            self._left |= {id(part.item): part.item for part in parts}
        elif error is not None:
            raise error
        elif piece is not None:
            for some, memory in _in_line(parts, piece):
                _copy(some, memory)
            copied = torch.cuda.current_stream().record_event() if self._on_gpu else None
        if piece is not None:
            self._free.put((piece, copied))


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of the model, and where their bytes are.

    Args:
        begin: offset in the file, as the rows' own.
        size: bytes.
    """

    item: ReadItem
    rows: Rows
    descriptor: int
    begin: int
    size: int

    @classmethod
    def of(cls, item: ReadItem, rows: Rows, descriptor: int) -> _Part:
        return cls(item, rows, descriptor, rows.begin, len(rows.target) * rows.bytes)

    @property
    def end(self) -> int:
        return self.begin + self.size

    @property
    def is_in_memory(self) -> bool:
        """It can be read where it lies."""
        return self.rows.target.device.type == "cpu" and self.rows.is_one_piece

    def address(self) -> int:
        return self.rows.target.data_ptr()

    @property
    def room(self) -> int:
        """Bytes for it in a piece of memory, where the next one begins as each dtype needs it."""
        return -(-self.size // 64) * 64


def _together(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Those that are read at once: neighbours in a file, as many as have room in a piece of memory.

    They come in the order in which they are in the model. In a file gate, up and down of an expert follow each other,
    in the model gate and up of all experts of a layer.
    """
    found: list[_Part] = []
    for part in parts:
        if found and not _has_room(found, part):
            yield sorted(found, key=_Part.address)
            found = []
        found.append(part)
    if found:
        yield sorted(found, key=_Part.address)


def _has_room(found: Sequence[_Part], part: _Part) -> bool:
    """Whether to read the part together with those."""
    near = part.descriptor == found[-1].descriptor and 0 <= part.begin - found[-1].end <= GAP
    fits = sum(one.room for one in found) + part.room <= PIECE and len(found) < MOST_PARTS
    return near and fits and not part.is_in_memory and not found[0].is_in_memory


def _divided(piece: Tensor, parts: Iterable[_Part]) -> list[Tensor]:
    """Memory for each of the parts."""
    ends = itertools.accumulate(part.room for part in parts)
    return [piece[end - part.room :][: part.size] for part, end in zip(parts, ends, strict=True)]


def _in_line(parts: Sequence[_Part], piece: Tensor) -> Iterator[tuple[list[_Part], Tensor]]:
    """Those that follow each other in the model as in the piece of memory, with their bytes: experts of one layer."""
    begun = 0
    some: list[_Part] = []
    for part in parts:
        if some and not _follows(part, some[-1]):
            yield some, piece[begun:][: sum(one.size for one in some)]
            begun, some = begun + sum(one.room for one in some), []
        some.append(part)
    yield some, piece[begun:][: sum(one.size for one in some)]


def _follows(part: _Part, last: _Part) -> bool:
    """Whether the part begins where the last one ends, in the model and in the piece of memory."""
    one, other = part.rows, last.rows
    if last.room != last.size or not (one.is_one_piece and other.is_one_piece):
        return False
    is_next = part.address() == last.address() + last.size
    return is_next and one.target.untyped_storage().data_ptr() == other.target.untyped_storage().data_ptr()


def _copy(parts: Sequence[_Part], memory: Tensor) -> None:
    """Bring bytes to where the model has these parts, which follow each other.

    The host needs 0.1 ms for each copy to a GPU.
    """
    rows = parts[0].rows
    target = rows.target
    if len(parts) > 1:
        first = target.storage_offset() * target.itemsize
        whole = torch.empty(0, dtype=torch.uint8, device=target.device)
        whole.set_(target.untyped_storage(), first, memory.shape).copy_(memory, non_blocking=True)
    else:
        # A part of each row, or another dtype, is taken where the model is: one thread here would take longer.
        found = memory if rows.is_one_piece else memory.to(target.device, non_blocking=True)
        target.copy_(rows.wanted(found), non_blocking=True)


def _fill(parts: Sequence[_Part], memory: Sequence[Tensor]) -> None:
    """Read the parts of one file, each into its memory; EOFError where the file ends before.

    Several are read by one call of the system, with what lies between them, which is forgotten.
    """
    both = sorted(zip(parts, memory, strict=True), key=lambda one: one[0].begin)
    parts, views = [part for part, _ in both], [one.numpy().data for _, one in both]
    if len(parts) == 1:
        fill(parts[0].descriptor, views[0], parts[0].begin)
        return
    between = memoryview(bytearray(GAP))
    gaps = [between[: part.begin - last.end] for last, part in itertools.pairwise(parts)]
    whole = [views[0], *itertools.chain(*zip(gaps, views[1:], strict=True))]
    if os.preadv(parts[0].descriptor, whole, parts[0].begin) < parts[-1].end - parts[0].begin:
        for part, view in zip(parts, views, strict=True):
            fill(part.descriptor, view, part.begin)


class _Source:
    """The checkpoint of a torch reader, and the model that a planner fills."""

    def __init__(self, reader: Any, planner: Any) -> None:
        self._reader, self._planner = reader, planner
        self._descriptors, self._layouts = Descriptors(), Layouts()
        self._path = functools.cache(functools.partial(Path, reader.path))
        self._objects: dict[bytes, Any] = {}
        self._shapes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in planner.metadata.state_dict_metadata.items()
            for chunk in getattr(entry, "chunks", ())
        }

    def find(self, item: ReadItem) -> list[_Part] | None:
        """Where a tensor is; None where torch has to read it, and to say what is wrong with it."""
        if (
            item.type != LoadItemType.TENSOR
            or type(self._planner.lookup_tensor(item.dest_index).detach()) is not Tensor
        ):
            return None
        target = self._planner.resolve_tensor(item).detach()
        place = self._reader.storage_data[item.storage_index]
        shape = self._shapes.get((item.storage_index.fqn, tuple(item.storage_index.offset or ())))
        if shape is None or place.transform_descriptors or target.size() != item.lengths:
            return None
        descriptor = self._descriptors.of(self._path(place.relative_path))
        try:
            stored = self._layouts.locate(descriptor, place.offset, place.length, shape)
        except UNREADABLE:
            return None
        if not _is_in(item, stored):
            return None
        self._planner.commit_tensor(item, target)
        rows = Rows.of(target, stored, item.storage_offsets)
        whole = _Part.of(item, rows, descriptor)
        if whole.room <= PIECE or whole.is_in_memory:
            return [whole]
        step = PIECE // 64 * 64 // rows.bytes
        firsts = range(0, len(rows.target), step) if step else ()
        return [_Part.of(item, rows.some(first, step), descriptor) for first in firsts] or None

    def load_object(self, item: ReadItem) -> bool:
        """Load an object; False where torch has to. Experts have ten thousand times the same: then it is copied."""
        place = self._reader.storage_data[item.storage_index]
        is_torchs = type(self._planner).load_bytes is DefaultLoadPlanner.load_bytes
        if item.type != LoadItemType.BYTE_IO or place.transform_descriptors or not is_torchs or place.length > SMALL:
            return False
        content = os.pread(self._descriptors.of(self._path(place.relative_path)), place.length, place.offset)
        if len(content) < place.length:
            return False
        if content not in self._objects:
            self._objects[content] = torch.load(io.BytesIO(content), weights_only=False)
        found, name = copy.deepcopy(self._objects[content]), item.dest_index.fqn
        if self._planner.flatten_state_dict:
            set_element(self._planner.original_state_dict, self._planner.mappings[name], found)
        else:
            self._planner.state_dict[name] = found
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A part of a stored tensor as rows, which follow each other in the file, and the part of the model that they fill.

    Args:
        target: rows of the model, [rows, ...].
        dtype: of what is stored.
        begin: offset in the file of the first row.
        inner: the shape of a stored row.
        offsets: where in a stored row the wanted part begins.
    """

    target: Tensor
    dtype: torch.dtype
    begin: int
    inner: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, target: Tensor, stored: Stored, offsets: Sequence[int]) -> Rows:
        """The fewest dimensions in which both can be told: the first one of `target` is in one piece in the file."""
        sizes, strides, shape, offsets, at = [*target.shape], [*target.stride()], [*stored.shape], [*offsets], 0
        while sizes and sizes[0] == 1:
            at += offsets.pop(0) * math.prod(shape[1:])
            del sizes[0], strides[0], shape[0]
        if not sizes:
            sizes, strides, shape, offsets = [1], [1], [1], [0]
        while len(sizes) > 1 and sizes[1] == shape[1] and strides[0] == strides[1] * shape[1]:
            sizes[:2], strides[:2] = [sizes[0] * sizes[1]], [strides[1]]
            offsets[:2], shape[:2] = [offsets[0] * shape[1]], [shape[0] * shape[1]]
        at += offsets[0] * math.prod(shape[1:])
        dtype = getattr(torch, TORCH_NAMES[stored.dtype])
        rows = target.as_strided(sizes, strides)  # one call of torch's: there are ten thousand experts
        return cls(rows, dtype, stored.begin + at * dtype.itemsize, tuple(shape[1:]), tuple(offsets[1:]))

    def some(self, first: int, count: int) -> Rows:
        """These of them."""
        return dataclasses.replace(
            self, target=self.target[first : first + count], begin=self.begin + first * self.bytes
        )

    @property
    def bytes(self) -> int:
        """Of a stored row."""
        return math.prod(self.inner) * self.dtype.itemsize

    @property
    def is_one_piece(self) -> bool:
        """The bytes of the file are those of the target."""
        return not self.inner and self.target.is_contiguous() and self.target.dtype == self.dtype

    def wanted(self, part: Tensor) -> Tensor:
        """The wanted part of the bytes of some rows, [rows, ...]."""
        found = part.view(self.dtype).view(-1, *self.inner)
        for axis, (first, size) in enumerate(zip(self.offsets, self.target.shape[1:], strict=True), 1):
            found = found.narrow(axis, first, size)
        return found


def _is_in(item: ReadItem, stored: Stored) -> bool:
    """The part that is asked for is in the stored tensor, whose elements are in row-major order."""
    places = zip(item.storage_offsets, item.lengths, stored.shape, strict=True)
    inside = all(0 <= first <= first + size <= extent for first, size, extent in places)
    order = [math.prod(stored.shape[axis + 1 :]) for axis in range(len(stored.shape))]
    in_order = all(
        size < 2 or one == other for size, one, other in zip(stored.shape, stored.strides, order, strict=True)
    )
    return inside and in_order and 0 not in stored.shape
