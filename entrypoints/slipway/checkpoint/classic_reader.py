"""Read Megatron's classic layout: megatron-core's tensors, put together from the files of all ranks.

The layout is held against the names and shapes of every file: nothing is left out or made up in silence. Tensors that
several ranks have a copy of are compared.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import classic, nf4, torch_files
from slipway.checkpoint.archive import Stored
from slipway.checkpoint.classic import Cut, Layout, Options, Placement, Rank
from slipway.checkpoint.classic_files import AGAIN, Ranks
from slipway.checkpoint.descriptors import Descriptors
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.errors import DataError
from slipway.tensors.bits import Bits, bits_type, empty, piece_number, scratch
from slipway.tensors.refs import Ref, TensorInfo
from slipway.untrusted import unreadable


class Reader:
    """The tensors of a checkpoint in the classic layout, under megatron-core's keys. Threads may share it.

    Args:
        ranks: the files.
        layout: where everything must be; it is compared with the files.

    Errors: DataError for a tensor that is missing, unexpected or of another shape.
    """

    def __init__(self, ranks: Ranks, layout: Layout) -> None:
        self.folder, self._ranks, self._layout = ranks.folder, ranks, layout
        self._held = _compared(ranks, layout)
        self.tensors: dict[str, TensorInfo] = {}
        for (key, _), places in layout.places.items():
            if key not in self.tensors:
                self.tensors[key] = TensorInfo(layout.tensors[key].shape, self._dtype(places[0]))
        self._descriptors = Descriptors()
        self._kept = threading.local()
        self._sources: dict[tuple[Rank, str, str], nf4.Source] = {}

    def files(self) -> list[Path]:
        """Every rank's file."""
        return [self._ranks.path(rank, self._layout.options) for rank in self._layout.ranks]

    def adopt(self, wanted: Mapping[str, TensorInfo]) -> None:
        """Nothing: the layout has given the tensors their names."""

    def cut_rows(self, key: str, rows: int) -> int:
        """Take only the first rows of a tensor; the number of rows left out."""
        info = self.tensors[key]
        self.tensors[key] = TensorInfo((min(rows, info.shape[0]), *info.shape[1:]), info.dtype)
        return max(0, info.shape[0] - rows)

    def reads_whole(self, ref: Ref) -> bool:
        """To read a part of this matrix, all of it is read."""
        return any(place.cut.transposed for place in self._layout.places[ref.name, ref.index])

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor. All ranks that have it are read and compared; DataError with the two that differ."""
        whole = self._layout.tensors[ref.name].shape[len(ref.index) :]
        start, stop = ref.rows or (0, self.tensors[ref.name].shape[len(ref.index)] if whole else 1)
        out = empty((stop - start, *whole[1:]), bits_type(self.tensors[ref.name].dtype))
        filled: dict[Cut, Placement] = {}
        covered = 0
        for place in self._layout.places[ref.name, ref.index]:
            if place.cut not in filled:
                filled[place.cut] = place
                for box, part in self._boxes(place, whole, start, stop):
                    out[box] = part
                    covered += part.size
                continue
            with scratch():  # a copy is only looked at
                same = all(np.array_equal(out[box], part) for box, part in self._boxes(place, whole, start, stop))
            if not same:
                pair = " and ".join(classic.folder_of(one.rank, self._options) for one in (filled[place.cut], place))
                raise DataError(
                    f"{self.folder}: {place.name} differs between {pair}, which must have the same; {AGAIN}"
                )
        assert covered == out.size, f"{ref} is not covered by its placements"
        return out.reshape(ref.shape(self.tensors[ref.name].shape))

    @property
    def _options(self) -> Options:
        return self._layout.options

    def _boxes(self, place: Placement, whole: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Any, Bits]]:
        """(where it is in the part that is asked for, what a rank has of it)."""
        columns = (slice(*place.cut.columns) if place.cut.columns else slice(None),) if len(whole) > 1 else ()
        for at, part in self._parts(place, whole, start, stop):
            yield (slice(at, at + len(part)), *columns), part

    def _parts(self, place: Placement, whole: tuple[int, ...], start: int, stop: int) -> Iterable[tuple[int, Bits]]:
        """(row of the part that is asked for, rows of a rank) for the rows from `start` to `stop`."""
        width = place.cut.shape(whole)[1:]
        block = None
        at = 0
        for first, last in place.cut.rows:
            low, high = max(first, start), min(last, stop)
            if low < high:
                if place.cut.transposed:
                    block = self._block(place, whole) if block is None else block
                    yield low - start, block[at + low - first : at + high - first]
                else:
                    count = int(np.prod(width, dtype=np.int64))
                    begin = place.at + (at + low - first) * count
                    yield low - start, self._load(place, begin, (high - low) * count).reshape(high - low, *width)
            at += last - first

    def _block(self, place: Placement, whole: tuple[int, ...]) -> Bits:
        """All rows of a placement that is transposed in the file; the last one of a piece of work is kept."""
        kept, at_work = getattr(self._kept, "block", None), (piece_number(), place)
        if kept is not None and kept[0] == at_work:
            return kept[1]
        rows, *width = place.cut.shape(whole)
        count = int(np.prod([rows, *width], dtype=np.int64))
        flat = self._load(place, place.at, count)
        block = flat.reshape(*width, rows).swapaxes(0, 1) if place.cut.transposed else flat.reshape(rows, *width)
        self._kept.block = at_work, block
        return block

    # ------------------------------------------------------------------------ a rank's tensor

    def _is_packed(self, place: Placement) -> bool:
        return self._layout.files[place.rank][place.chunk][place.name].packed

    def _dtype(self, place: Placement) -> str:
        return "BF16" if self._is_packed(place) else self._held[place.rank][place.chunk][place.name].info.dtype

    def _load(self, place: Placement, begin: int, count: int) -> Bits:
        """Elements of a rank's tensor, counted in row-major order."""
        if self._is_packed(place):
            return self._packed(place).read(begin, begin + count)
        return self._elements(place, place.name, begin, count)

    def _elements(self, place: Placement, name: str, begin: int = 0, count: int | None = None) -> Bits:
        held = self._held[place.rank][place.chunk][name]
        path = self._ranks.path(place.rank, self._options)
        return _elements(self._descriptors.of(path), path, name, held, begin, count)

    def _packed(self, place: Placement) -> nf4.Source:
        """A rank's packed tensor; what is known of it is read once."""
        key = (place.rank, place.chunk, place.name)
        if (found := self._sources.get(key)) is None:
            held = self._held[place.rank][place.chunk]
            parts = {
                suffix: held[place.name + suffix].info for suffix in ("", *nf4.PARTS) if place.name + suffix in held
            }

            def part(suffix: str, begin: int, end: int) -> Bits:
                return self._elements(place, place.name + suffix, begin, end - begin)

            shape = self._layout.files[place.rank][place.chunk][place.name].info.shape
            where = f"{self._ranks.path(place.rank, self._options)}: {place.name}"
            found = self._sources[key] = nf4.source_of(parts, part, where, shape)
        return found


def load(path: Path, name: str, held: torch_files.Place) -> Bits:
    """All elements of a small tensor of a file, in row-major order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _elements(descriptor, path, name, held)
    finally:
        os.close(descriptor)


def _elements(
    descriptor: int, path: Path, name: str, held: torch_files.Place, begin: int = 0, count: int | None = None
) -> Bits:
    """Some elements of a tensor of a file, counted in row-major order."""
    size = math.prod(held.info.shape)
    count = size if count is None else count
    try:
        if held.strides == _row_major(held.info.shape) or size <= 1:
            stored = Stored(held.info.dtype, (size,), (1,), held.begin)
            return stored.read(descriptor, [(begin, begin + count)])
        stored = Stored(held.info.dtype, held.info.shape, held.strides, held.begin)
        whole = stored.read(descriptor, [(0, extent) for extent in held.info.shape])
        return np.ascontiguousarray(whole).reshape(-1)[begin : begin + count]
    except (OSError, *UNREADABLE) as error:
        raise unreadable(f"{path}: tensor {name}", error, AGAIN) from None


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[place + 1 :], dtype=np.int64)) for place in range(len(shape)))


def _compared(ranks: Ranks, layout: Layout) -> dict[Rank, dict[str, dict[str, torch_files.Place]]]:
    """Rank → chunk → name → place; DataError with the first tensor that the files have otherwise than the layout."""
    wanted = {classic.folder_of(rank, layout.options): rank for rank in layout.ranks}
    hint = "check the flags for the layout (--tensor-parallel-size and so on), and whether all files are there"
    if wanted.keys() != ranks.saved.keys():
        missing, surplus = sorted(wanted.keys() - ranks.saved.keys()), sorted(ranks.saved.keys() - wanted.keys())
        what = f"{missing[0]} is missing" if missing else f"{surplus[0]} is not of this layout"
        raise DataError(f"{ranks.folder}: {what}; {hint}")
    found = {rank: ranks.saved[folder].chunks for folder, rank in wanted.items()}
    for rank, chunks in layout.files.items():
        folder = classic.folder_of(rank, layout.options)
        here = {chunk: found[rank].get(chunk, {}) for chunk in {*chunks, *found[rank]}}
        for chunk, held in here.items():
            _compare_chunk(f"{ranks.folder / folder}: {chunk}", held, chunks.get(chunk, {}), layout.options, hint)
        found[rank] = here
    return found


def _compare_chunk(
    where: str, held: Mapping[str, torch_files.Place], wanted: Mapping[str, classic.Held], options: Options, hint: str
) -> None:
    names = {name for name in held if not name.endswith(nf4.PARTS)}
    if missing := sorted(wanted.keys() - names):
        raise DataError(f"{where}: tensor {missing[0]} is missing; {hint}")
    if surplus := sorted(names - wanted.keys()):
        raise DataError(f"{where}: unexpected tensor {surplus[0]}; {hint}")
    for name, tensor in wanted.items():
        info = held[name].info
        packed = tensor.packed and f"{name}.absmax" in held
        if tensor.packed and not packed and info.dtype == "U8":
            raise DataError(f"{where}: {name} is packed, but has no {name}.absmax; {AGAIN}")
        if packed != tensor.packed:
            tensor.packed = packed
        shape = nf4.infos(tensor.info.shape, options.qlora_nf4 or "")[""].shape if packed else tensor.info.shape
        if info.shape != shape and not (packed and math.prod(info.shape) == math.prod(shape)):
            raise DataError(f"{where}: {name} has shape {list(info.shape)}, but the layout needs {list(shape)}; {hint}")
