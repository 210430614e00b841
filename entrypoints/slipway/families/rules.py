"""The rules between Hugging Face's tensors and Megatron's, in both directions.

A family lists cells. A cell has some parts of Hugging Face tensors, some parts of Megatron tensors, and an operation
between them that can be undone. Import applies it and export undoes it, so one list serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from slipway.errors import DataError
from slipway.tensors.bits import Bits, contiguous, empty
from slipway.tensors.refs import Ref, TensorInfo

MAX_CELL_BYTES = 32 << 20  # large enough for fast reads and writes, small enough that every core has its own
FLOATS = ("BF16", "F16", "F32")


class Operation(Protocol):
    """What is done with the parts of a cell, in both directions; `to_hf` undoes `to_megatron` to the bit."""

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """Hugging Face's parts → Megatron's."""

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        """Megatron's parts → Hugging Face's."""


class _Same:
    """One tensor, unchanged."""

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        return parts

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        return parts


SAME = _Same()


@dataclass(frozen=True, slots=True)
class Transposed:
    """Another operation, for a matrix that Hugging Face stores transposed."""

    inner: Operation = SAME

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        return self.inner.to_megatron(tuple(part.swapaxes(-1, -2) for part in parts))

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        return tuple(part.swapaxes(-1, -2) for part in self.inner.to_hf(parts))


class AlternatingRows:
    """gate_up, in which rows of gate and up alternate ↔ gate, up."""

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        (both,) = parts
        return both[::2], both[1::2]

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        gate, up = parts
        both = empty((2 * len(gate), *gate.shape[1:]), gate.dtype)
        both[::2], both[1::2] = gate, up
        return (both,)


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """q, k, v ↔ one matrix, KV group by KV group: the rows of its queries, its key, its value.

    Args:
        groups: KV groups.
        queries: query rows of one group: query heads per group × head size.
        head_dim: rows of one key or value head.
    """

    groups: int
    queries: int
    head_dim: int

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        # Joined in place, in memory that is used again: np.concatenate alone would allocate the result anew.
        whole = empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        np.concatenate([_grouped(part, self.groups) for part in parts], axis=1, out=_grouped(whole, self.groups))
        return (whole,)

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        (both,) = parts
        cuts = [self.queries, self.queries + self.head_dim]
        split = np.split(_grouped(both, self.groups), cuts, axis=1)
        return tuple(contiguous(part).reshape(-1, *part.shape[2:]) for part in split)


def _grouped(part: Bits, groups: int) -> Bits:
    """[rows, …] → [groups, rows of a group, …]."""
    return part.reshape(groups, -1, *part.shape[1:])


@dataclass(frozen=True, slots=True)
class Copies:
    """Equal tensors in Hugging Face's form ↔ one tensor.

    Args:
        names: of the Hugging Face tensors.
    """

    names: tuple[str, ...]

    def to_megatron(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        for name, part in zip(self.names[1:], parts[1:], strict=True):
            if not (part == parts[0]).all():
                raise DataError(
                    f"tensor {name} is not a copy of {self.names[0]}, which Megatron needs; download the model again"
                )
        return parts[:1]

    def to_hf(self, parts: tuple[Bits, ...]) -> tuple[Bits, ...]:
        return parts * len(self.names)


@dataclass(frozen=True, slots=True)
class Cell:
    """Parts of Hugging Face tensors, parts of Megatron tensors, and the operation between them: one unit of work."""

    hf: tuple[Ref, ...]
    megatron: tuple[Ref, ...]
    op: Operation = SAME


def by_rows(hf: tuple[Ref, ...], megatron: Ref, info: TensorInfo, op: Operation = SAME) -> Iterator[Cell]:
    """Cells that copy a tensor (or equal tensors) unchanged, in blocks of rows of limited size.

    Args:
        hf: the whole tensor, or several that are equal.
        info: of one of them.
        megatron: where it goes; `rows`, if there are any, has as many rows as the tensor.
    """
    step = max(1, MAX_CELL_BYTES * info.shape[0] // (info.bytes * len(hf)))
    if step >= info.shape[0]:
        yield Cell(hf, (megatron,), op)
        return
    at = megatron.rows[0] if megatron.rows else 0
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        parts = tuple(replace(ref, rows=(start, stop)) for ref in hf)
        yield Cell(parts, (replace(megatron, rows=(at + start, at + stop)),), op)


def qkv_by_groups(hf: tuple[Ref, ...], megatron: Ref, op: GroupedQKV, row_bytes: int) -> Iterator[Cell]:
    """Cells that join whole tensors q, k and v to one of Megatron's, some KV groups in each cell.

    Args:
        op: for all groups.
        row_bytes: bytes of one row.
    """
    sizes = (op.queries, op.head_dim, op.head_dim)
    step = max(1, MAX_CELL_BYTES // (2 * sum(sizes) * row_bytes))  # twice in memory: the parts, and joined
    if step >= op.groups:
        yield Cell(hf, (megatron,), op)
        return
    for first in range(0, op.groups, step):
        last = min(first + step, op.groups)
        parts = tuple(replace(ref, rows=(first * size, last * size)) for ref, size in zip(hf, sizes, strict=True))
        rows = (first * sum(sizes), last * sum(sizes))
        yield Cell(parts, (replace(megatron, rows=rows),), replace(op, groups=last - first))


@dataclass
class Rules:
    """Every tensor of a model on both sides, and the cells between them.

    Args:
        hf: name → TensorInfo of the BF16 form.
        megatron: key → TensorInfo, without NeMo's prefix `module.`.
        extra_state: keys under which Transformer Engine expects an entry.
    """

    hf: dict[str, TensorInfo] = field(default_factory=dict)
    megatron: dict[str, TensorInfo] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    extra_state: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scope:
    """A module on both sides. Its methods add tensors to the rules.

    Args:
        hf, megatron: the beginning of its tensors' names.
        index, stack: its place in a stack of such modules under one key, and the sizes of that stack.
    """

    rules: Rules
    hf: str = ""
    megatron: str = ""
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    def within(self, hf: str, megatron: str) -> Scope:
        """A module inside."""
        return replace(self, hf=self.hf + hf, megatron=self.megatron + megatron)

    def stacked(self, hf: str, megatron: str, place: int, count: int) -> Scope:
        """A module inside, which Megatron stacks with others of its kind: number `place` of `count`."""
        return replace(self.within(hf, megatron), index=(*self.index, place), stack=(*self.stack, count))

    def source(self, name: str, *shape: int, dtype: str = "BF16") -> Ref:
        """A Hugging Face tensor."""
        self.rules.hf[self.hf + name] = TensorInfo(shape, dtype)
        return Ref(self.hf + name)

    def target(self, key: str, *shape: int, dtype: str = "BF16") -> Ref:
        """This module's part of a Megatron tensor."""
        self.rules.megatron[self.megatron + key] = TensorInfo((*self.stack, *shape), dtype)
        return Ref(self.megatron + key, self.index)

    def same(self, name: str, key: str, *shape: int, dtype: str = "BF16") -> None:
        """A tensor that is the same on both sides."""
        target = self.target(key, *shape, dtype=dtype)
        self.rules.cells += by_rows((self.source(name, *shape, dtype=dtype),), target, TensorInfo(shape, dtype))

    def copied(self, names: Iterable[str], key: str, *shape: int) -> None:
        """Tensors that are equal in Hugging Face's form and one tensor in Megatron's."""
        parts = tuple(self.source(name, *shape) for name in names)
        op = Copies(tuple(ref.name for ref in parts))
        self.rules.cells += by_rows(parts, self.target(key, *shape), TensorInfo(shape), op)

    def joined(self, names: Iterable[str], key: str, rows: int, *width: int) -> None:
        """Tensors of the same shape, [rows, *width], that follow each other as rows of one Megatron tensor."""
        names = list(names)
        target = self.target(key, len(names) * rows, *width)
        for number, name in enumerate(names):
            part = replace(target, rows=(number * rows, (number + 1) * rows))
            self.rules.cells += by_rows((self.source(name, rows, *width),), part, TensorInfo((rows, *width)))

    def state(self, *modules: str) -> None:
        """Modules of Transformer Engine, which expects an entry of extra state for each."""
        place = ".".join(map(str, self.index or (0,))) + "_" + ".".join(map(str, self.stack or (1,)))
        self.rules.extra_state += [f"{self.megatron}{module}._extra_state/shard_{place}" for module in modules]


def check_tensors(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], where: str) -> None:
    """DataError with the first tensor that is missing, unexpected or of a wrong shape; `where`: its checkpoint."""
    for name in wanted.keys() & found.keys():
        if found[name].dtype not in FLOATS:
            raise DataError(
                f"{where}: tensor {name} is stored as {found[name].dtype}, which is not supported; "
                f"supported are {', '.join(FLOATS)}, and FP8, MXFP8, MXFP4 or NVFP4 with scales"
            )
    if missing := sorted(wanted.keys() - found.keys()):
        raise DataError(
            f"{where}: tensor {missing[0]} is missing{_more(missing)}; is the download complete, "
            "and does config.json belong to this model?"
        )
    if surplus := sorted(found.keys() - wanted.keys()):
        raise DataError(
            f"{where}: unexpected tensor {surplus[0]}{_more(surplus)}; does config.json belong to this model?"
        )
    for name, info in wanted.items():
        if found[name].shape != info.shape:
            raise DataError(
                f"{where}: tensor {name} has shape {list(found[name].shape)}, but config.json needs "
                f"{list(info.shape)}; does config.json belong to this model?"
            )


def check_coverage(cells: Iterable[Cell], hf: Mapping[str, TensorInfo], megatron: Mapping[str, TensorInfo]) -> None:
    """AssertionError unless the cells hold every element of every tensor of both sides once, counted in bytes."""
    covered = {("hf", name): 0 for name in hf} | {("megatron", name): 0 for name in megatron}
    for cell in cells:
        for side, refs, infos in (("hf", cell.hf, hf), ("megatron", cell.megatron, megatron)):
            for ref in refs:
                info = infos[ref.name]
                covered[side, ref.name] += TensorInfo(ref.shape(info.shape), info.dtype).bytes
    for (side, name), size in covered.items():
        assert size == (hf if side == "hf" else megatron)[name].bytes, f"{side} tensor {name} is not covered once"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
