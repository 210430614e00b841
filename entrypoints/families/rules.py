"""The rules that relate Hugging Face tensors to Megatron's, each in both directions.

A family lists cells. A cell joins some parts of Hugging Face tensors to some parts of Megatron tensors by an
operation that can be undone; import runs it forward, export backward, so there is one table for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrypoints.checkpoint.refs import Ref, TensorInfo
from entrypoints.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

MAX_CELL_BYTES = 64 << 20


class _Same:
    """One tensor, unchanged."""

    def to_megatron(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts

    def to_hf(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts


SAME = _Same()


@dataclass(frozen=True)
class Transposed:
    """Another operation behind a matrix that Hugging Face stores the other way round."""

    inner: _Same | AlternatingRows = SAME

    def to_megatron(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.inner.to_megatron(tuple(part.transpose(-1, -2) for part in parts))

    def to_hf(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.transpose(-1, -2) for part in self.inner.to_hf(parts))


class AlternatingRows:
    """gate_up with the rows of gate and up in turn ↔ gate, up."""

    def to_megatron(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (both,) = parts
        return both[::2], both[1::2]

    def to_hf(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        return (torch.stack(parts, dim=1).flatten(0, 1),)


@dataclass(frozen=True)
class GroupedQKV:
    """q, k, v ↔ the rows of each KV group in turn: its queries, its key, its value.

    Args:
        groups: KV groups.
        queries: query rows of one group (query heads per group × head size).
        head_dim: rows of one key or value head.
    """

    groups: int
    queries: int
    head_dim: int

    def to_megatron(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return (torch.cat(grouped, dim=1).flatten(0, 1),)

    def to_hf(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (both,) = parts
        sizes = [self.queries, self.head_dim, self.head_dim]
        return tuple(part.flatten(0, 1) for part in both.unflatten(0, (self.groups, -1)).split(sizes, dim=1))


@dataclass(frozen=True)
class Cell:
    """Parts of Hugging Face tensors, the operation, parts of Megatron tensors."""

    hf: tuple[Ref, ...]
    megatron: tuple[Ref, ...]
    op: _Same | Transposed | AlternatingRows | GroupedQKV = SAME


def same(hf: Ref, megatron: Ref, info: TensorInfo) -> Iterator[Cell]:
    """Cells that carry one tensor over unchanged, in row blocks of bounded size.

    Args:
        info: of the Hugging Face tensor.
    """
    shape = hf.shape(info.shape)
    size = TensorInfo(shape, info.dtype).bytes
    if size <= MAX_CELL_BYTES or hf.rows or megatron.rows:
        yield Cell((hf,), (megatron,))
        return
    step = max(1, MAX_CELL_BYTES * shape[0] // size)
    for start in range(0, shape[0], step):
        rows = (start, min(start + step, shape[0]))
        yield Cell((Ref(hf.name, hf.index, rows),), (Ref(megatron.name, megatron.index, rows),))


def check_tensors(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], where: str) -> None:
    """DataError that names the first tensor of `where` that is missing, surplus or of another shape."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise DataError(
            f"{where}: tensor {missing[0]} is missing{_more(missing)}; "
            "is the download complete and config.json its own?"
        )
    if surplus := sorted(found.keys() - wanted.keys()):
        raise DataError(
            f"{where}: tensor {surplus[0]} has no place in the model{_more(surplus)}; is config.json its own?"
        )
    for name, info in wanted.items():
        if found[name].shape != info.shape:
            raise DataError(
                f"{where}: tensor {name} has shape {list(found[name].shape)}, config.json asks for {list(info.shape)}"
            )


def check_coverage(cells: Iterable[Cell], hf: Mapping[str, TensorInfo], megatron: Mapping[str, TensorInfo]) -> None:
    """AssertionError unless the cells cover every element of every tensor of both sides, counted by bytes."""
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
