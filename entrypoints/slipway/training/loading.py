"""Reading a checkpoint into the model: by several threads, and each tensor from its file to where the model has it.

torch makes memory for each tensor, reads it, and copies it to its place, one after the other. To make the memory takes
longer than to read. Here a tensor on the CPU is read where it lies, and one on a GPU by way of a buffer that is used
again and again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from slipway.checkpoint.archive import Layouts, Stored, fill
from slipway.checkpoint.descriptors import Descriptors
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.tensors.refs import TORCH_NAMES
from slipway.training.patches import TORCH, wrap

PIECE = 1 << 23  # bytes that a thread reads at a time, at most
ON_THE_WAY = 4  # pieces that a thread has read and the GPU has not got yet, at most
MOST = 8  # threads of a rank
Read = Callable[[Any, LoadPlan, LoadPlanner], Any]


def read_in_threads() -> None:
    """Let torch read checkpoints so from now on."""
    wrap(FileSystemReader, "read_data", reading_in_threads, TORCH)


def reading_in_threads(read_data: Read) -> Read:
    """The same as `FileSystemReader.read_data`, which does what is left: objects, and tensors of another class."""

    @functools.wraps(read_data)
    def read(self: Any, plan: LoadPlan, planner: Any) -> Any:
        if not isinstance(
            planner, DefaultLoadPlanner
        ):  # Megatron's is one: it tells where a tensor goes without a trace
            return read_data(self, plan, planner)
        source = _Source(self, planner)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # each thread has a stream of its own
        left = source.read_all(plan.items)
        return read_data(self, dataclasses.replace(plan, items=left), planner)

    return read


def width() -> int:
    """How many threads a rank has: its share of the processors."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST, share))


class _Source:
    """The checkpoint of a torch reader, and the model that a planner fills; shared by the threads."""

    def __init__(self, reader: Any, planner: Any) -> None:
        self._reader, self._planner = reader, planner
        self._descriptors, self._layouts = Descriptors(), Layouts()
        self._path = functools.cache(functools.partial(Path, reader.path))
        self._own = threading.local()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._shapes = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in planner.metadata.state_dict_metadata.items()
            for chunk in getattr(entry, "chunks", ())
        }

    def read_all(self, items: Sequence[ReadItem]) -> list[ReadItem]:
        """Read into the model what can be read, and return the rest."""
        waiting = enumerate(items)  # each thread takes the next one

        def read_some() -> list[int]:
            try:
                return [index for index, item in waiting if not self.read(item)]
            except BaseException:
                for _ in waiting:  # the other threads need not read what nobody will use
                    pass
                raise
            finally:
                self._arrive()

        with ThreadPoolExecutor(width(), initializer=self.prepare_thread) as pool:
            # A task for each of 20,000 items would take as long as to read them.
            tasks = [pool.submit(read_some) for _ in range(width())]
        return [items[index] for index in sorted(index for task in tasks for index in task.result())]

    def prepare_thread(self) -> None:
        """Give this thread a buffer and, on a GPU, a stream."""
        on_gpu = self._device is not None
        if on_gpu:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream())
        self._own.buffer, self._own.used = torch.empty(ON_THE_WAY * PIECE, dtype=torch.uint8, pin_memory=on_gpu), 0

    def _arrive(self) -> None:
        """Wait for what is on its way to the GPU, so that the buffer can be used again."""
        if self._device is not None:
            torch.cuda.current_stream().synchronize()
        self._own.used = 0

    def _space(self, size: int) -> Tensor:
        """So many bytes of the buffer; the next ones begin at a multiple of 64, as each dtype needs it."""
        if self._own.used + size > len(self._own.buffer):
            self._arrive()
        part: Tensor = self._own.buffer[self._own.used : self._own.used + size]
        self._own.used += -(-size // 64) * 64
        return part

    def read(self, item: ReadItem) -> bool:
        """Read a tensor into the model; False where torch has to, which then says what is wrong with it."""
        if (
            item.type != LoadItemType.TENSOR
            or type(self._planner.lookup_tensor(item.dest_index).detach()) is not Tensor
        ):
            return False
        target = self._planner.resolve_tensor(item).detach()
        place = self._reader.storage_data[item.storage_index]
        shape = self._shapes.get((item.storage_index.fqn, tuple(item.storage_index.offset or ())))
        if shape is None or place.transform_descriptors or target.size() != item.lengths:
            return False
        descriptor = self._descriptors.of(self._path(place.relative_path))
        try:
            stored = self._layouts.locate(descriptor, place.offset, place.length, shape)
        except UNREADABLE:
            return False
        if not _is_in(item, stored) or not self._fill(Rows.of(target, stored, item.storage_offsets), descriptor):
            return False
        self._planner.commit_tensor(item, target)
        return True

    def _fill(self, rows: Rows, descriptor: int) -> bool:
        """Read the rows; False where one is more than a piece, or the file ends before."""
        target, count = rows.target, len(rows.target)
        try:
            if target.device.type == "cpu" and rows.is_one_piece:
                fill(descriptor, target.view(torch.uint8).numpy().data, rows.begin)
                return True
            step = PIECE // max(1, rows.bytes)
            for first in range(0, count, step) if step else ():
                part = self._space(min(step, count - first) * rows.bytes)
                fill(descriptor, part.numpy().data, rows.begin + first * rows.bytes)
                target[first : first + step].copy_(rows.wanted(part), non_blocking=True)
        except EOFError:
            return False
        return step > 0


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
        shape, offsets, at = [*stored.shape], [*offsets], 0
        while target.ndim and len(target) == 1:
            at += offsets.pop(0) * math.prod(shape[1:])
            target, shape = target[0], shape[1:]
        if not target.ndim:
            target, shape, offsets = target.view(1), [1], [0]
        while target.ndim > 1 and target.shape[1] == shape[1] and target.stride(0) == target.stride(1) * shape[1]:
            target, shape, offsets = (
                target.flatten(0, 1),
                [shape[0] * shape[1], *shape[2:]],
                [offsets[0] * shape[1], *offsets[2:]],
            )
        at += offsets[0] * math.prod(shape[1:])
        dtype = getattr(torch, TORCH_NAMES[stored.dtype])
        return cls(target, dtype, stored.begin + at * dtype.itemsize, tuple(shape[1:]), tuple(offsets[1:]))

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
