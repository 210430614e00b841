"""Low-rank adapters in Megatron's classic layout, as MindSpeed-LLM trains them, under megatron-core's keys.

A rank's layer X has X.lora_A.default.weight [r, in] and X.lora_B.default.weight [out, r] (also spelt lora_a, lora_b),
beside X.base_layer.weight or in a checkpoint of their own. The experts that a rank has in one tensor, weight1 and
weight2, have weight1_lora_a [in, r · E] and weight1_lora_b [r, E · out], whose memory is [E, in, r] and [E, r, out].

Where a rank has a part of the columns, it has the same part of A and all of B; where it has a part of the rows, all of
A and that part of B. So the layout of the base says how A and B are put together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import classic
from slipway.checkpoint.classic import Layout, Matrix, Placement
from slipway.checkpoint.classic_files import AGAIN, Ranks
from slipway.checkpoint.classic_reader import load
from slipway.checkpoint.lora import ADAPTER, IN, OUT, Settings
from slipway.errors import DataError, UsageError
from slipway.tensors.bits import Bits, bits_type
from slipway.tensors.refs import Ref, TensorInfo

DTYPES = ("BF16", "F32", "F16")
NAME = re.compile(r"(.+?)(?:\.lora_([ABab])(?:\.default)?\.weight|_lora_([ab]))")


class AdapterReader:
    """The adapters of a checkpoint in the classic layout, as torch_dist.Reader gives NeMo's.

    `settings` are what lora.Adapters asks for.

    Args:
        ranks: the files.
        layout: of the base.
        rank: of the adapters, where the user gives it; it is held against what is stored.
        alpha: of the adapters; DataError if neither the user nor the files say it.
    """

    def __init__(self, ranks: Ranks, layout: Layout, rank: int | None, alpha: float | None) -> None:
        self.folder, self._ranks, self._layout = ranks.folder, ranks, layout
        self._stems = {folder: _stems(ranks.folder / folder, chunks) for folder, chunks in ranks.adapters.items()}
        self._places = {matrix: places for matrix, places in layout.places.items() if self._adapted(places[0])}
        if not self._places:
            raise DataError(f"{self.folder} has no low-rank adapters for this model and layout; check the flags")
        stored = self._stored_rank()
        said = rank or ranks.args.get("lora_r") or stored
        if said != stored:
            raise UsageError(f"--lora-r is {said}, but the adapters in {self.folder} have rank {stored}")
        alpha = alpha if alpha is not None else ranks.args.get("lora_alpha")
        if alpha is None:
            raise UsageError(f"{self.folder} does not say the adapters' alpha; give it with --lora-alpha")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise DataError(
                f"{self.folder}: args say lora_alpha {alpha!r}, which is no number; give it with --lora-alpha"
            )
        self.settings = Settings("LoRA", float(alpha), stored, ())
        self._dtype = self._stored_dtype()
        self.tensors = dict(self._infos(stored))
        self._check_all_layers()

    def files(self) -> list[Path]:
        """Every rank's file."""
        return [self.folder / name / classic.FILE for name in self._ranks.saved]

    def cuts(self, key: str, axis: int) -> int:
        """1: the parts of the ranks are put together here."""
        return 1

    def read(self, ref: Ref) -> Bits:
        """A part of A or B, put together from the ranks."""
        key, _, kind = ref.name.partition(ADAPTER)
        stack = self._layout.tensors[f"{key}.weight"].shape[:-2]
        if len(ref.index) < len(stack):
            entries = [self.read(Ref(ref.name, (*ref.index, n))) for n in range(stack[len(ref.index)])]
            return np.stack(entries)[slice(*ref.rows) if ref.rows else slice(None)]
        whole = self._matrix((f"{key}.weight", ref.index), kind)
        return whole[slice(*ref.rows) if ref.rows else slice(None)]

    # ------------------------------------------------------------------------ putting together

    def _matrix(self, matrix: Matrix, kind: str) -> Bits:
        """A [r, in] or B [out, r] of a matrix of the base."""
        shape = self._layout.tensors[matrix[0]].shape[-2:]
        rank = self.settings.rank or 0
        out = np.empty((rank, shape[1]) if kind == IN else (shape[0], rank), bits_type(self._dtype))
        filled = np.zeros(out.shape, bool)
        for place in self._places[matrix]:
            part, box = self._part(place, kind, shape)
            if filled[box].any() and not np.array_equal(out[box], part):
                raise DataError(f"{self.folder}: the adapters of {place.name} differ between ranks; {AGAIN}")
            out[box], filled[box] = part, True
        assert filled.all(), f"the adapter of {matrix} is not covered"
        return out

    def _part(self, place: Placement, kind: str, shape: tuple[int, ...]) -> tuple[Bits, tuple[Any, Any]]:
        """(what a rank has, where that is in the whole)."""
        cut = place.cut
        columns = np.arange(*cut.columns) if cut.columns else np.arange(shape[1])
        rows = np.concatenate([np.arange(*run) for run in cut.rows])
        rank = self.settings.rank or 0
        if cut.transposed:  # A and B are transposed too, one after the other for the experts of the rank
            own = len(rows) * len(columns)
            number = place.at // own
            a, b = (self._flat(place, side) for side in "ab")
            if kind == IN:
                part = a.reshape(-1, len(columns), rank)[number].T
                return part, (slice(None), slice(columns[0], columns[-1] + 1))
            return b.reshape(-1, rank, len(rows))[number].T, (rows, slice(None))
        if kind == IN:
            part = self._flat(place, "a").reshape(rank, -1)
            return part, (slice(None), slice(columns[0], columns[-1] + 1))
        begin = place.at // shape[1]  # of a matrix that is joined with others the rows begin later
        part = self._flat(place, "b").reshape(-1, rank)[begin : begin + len(rows)]
        return part, (rows, slice(None))

    def _flat(self, place: Placement, side: str) -> Bits:
        folder = classic.folder_of(place.rank, self._layout.options)
        held = self._ranks.adapters[folder][place.chunk]
        name = self._stems[folder][place.chunk][_stem(place.name)][side]
        return load(self.folder / folder / classic.FILE, name, held[name])

    # ------------------------------------------------------------------------ what there is

    def _adapted(self, place: Placement) -> bool:
        stems = self._stems.get(classic.folder_of(place.rank, self._layout.options), {}).get(place.chunk, {})
        return _stem(place.name) in stems

    def _stored_rank(self) -> int:
        """The rank of all adapters; DataError where they differ or do not fit their layers."""
        found: dict[int, str] = {}
        for matrix, places in self._places.items():
            for place in places:
                found.setdefault(self._rank_at(place, self._layout.tensors[matrix[0]].shape[-2:]), place.name)
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise DataError(f"{self.folder}: {first} has adapters of rank {one}, {second} of rank {other}; {AGAIN}")
        return next(iter(found))

    def _stored_dtype(self) -> str:
        """The dtype of all adapters; DataError where they differ."""
        held = [held for chunks in self._ranks.adapters.values() for held in chunks.values()]
        found = sorted({place.info.dtype for places in held for place in places.values()})
        if len(found) > 1 or found[0] not in DTYPES:
            raise DataError(
                f"{self.folder}: the adapters are in {' and '.join(found)}; they must all be in one of {DTYPES}"
            )
        return found[0]

    def _rank_at(self, place: Placement, shape: tuple[int, ...]) -> int:
        folder = classic.folder_of(place.rank, self._layout.options)
        stems = self._stems[folder][place.chunk]
        names = stems.get(_stem(place.name), {})
        if set(names) != {"a", "b"}:
            missing = "lora_A" if "a" not in names else "lora_B"
            raise DataError(f"{self.folder / folder}: {missing} of {_stem(place.name)} is missing; {AGAIN}")
        held = self._ranks.adapters[folder][place.chunk]
        a, b = (held[names[side]].info.shape for side in "ab")
        whole = self._layout.files[place.rank][place.chunk][place.name].info.shape
        rows, columns = place.cut.shape(shape)
        if place.cut.transposed:  # of all experts of the rank; their declared shapes are others
            count = math.prod(whole) // (rows * columns)
            rank, *others = {_quotient(a, count * columns), _quotient(b, count * rows)}
        else:
            rank = a[0] if a else 0
            others = [] if (a, b) == ((rank, columns), (whole[0], rank)) else [0]
        if rank < 1 or others:
            raise DataError(
                f"{self.folder / folder}: the adapters of {_stem(place.name)} have the shapes {list(a)} and {list(b)}, "
                f"which do not fit a layer of {rows} × {columns}; check the flags for the layout"
            )
        return rank

    def _infos(self, rank: int) -> Iterator[tuple[str, TensorInfo]]:
        for key in {key for key, _ in self._places}:
            *stack, out, inner = self._layout.tensors[key].shape
            stem = key.removesuffix(".weight")
            yield f"{stem}{ADAPTER}{IN}", TensorInfo((*stack, rank, inner), self._dtype)
            yield f"{stem}{ADAPTER}{OUT}", TensorInfo((*stack, out, rank), self._dtype)

    def _check_all_layers(self) -> None:
        """DataError for a layer, expert or rank without adapters where others of its kind have them."""
        kinds = {_kind(matrix) for matrix in self._places}
        for matrix, places in self._layout.places.items():
            if _kind(matrix) not in kinds:
                continue
            for place in places:
                if not self._adapted(place):
                    folder = classic.folder_of(place.rank, self._layout.options)
                    where = f"{self.folder / folder}: the adapters of {_stem(place.name)}"
                    raise DataError(f"{where} are missing, but other layers have theirs; {AGAIN}")
        known = {
            (classic.folder_of(place.rank, self._layout.options), place.chunk, _stem(place.name))
            for places in self._places.values()
            for place in places
        }
        for folder, chunks in self._stems.items():
            for chunk, stems in chunks.items():
                if surplus := sorted(stem for stem in stems if (folder, chunk, stem) not in known):
                    raise DataError(
                        f"{self.folder / folder}: {chunk} has adapters of {surplus[0]}, which the model lacks"
                    )


def _quotient(shape: tuple[int, ...], each: int) -> int:
    """How often there are `each` elements; 0 where that is no whole number."""
    size = math.prod(shape)
    return 0 if size % each else size // each


def _why_not(name: str) -> str:
    """Why a tensor of adapters is not read."""
    if "magnitude" in name:
        return (
            f"{name} is of DoRA, of which each tensor parallel rank has taken the lengths of its own part of the rows; "
            "such adapters are not read in the classic layout: merge them with the program that trained them"
        )
    if ".adapter." in name:
        return (
            f"{name} is named as NeMo and Megatron-Bridge name adapters, which are read in their own form alone "
            "(torch_dist), not in the classic layout"
        )
    return f"unknown tensor {name} of adapters; known are X.lora_A.default.weight and X_lora_a"


def _kind(matrix: Matrix) -> str:
    """A kind of layer: the key without the numbers of layers and experts."""
    return re.sub(r"\.\d+\.", ".", matrix[0])


def _stem(name: str) -> str:
    """The layer of a base's tensor, as the adapters' names begin: weight1 and weight2 are their own."""
    return name.removesuffix(".weight")


def _stems(where: Path, chunks: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, dict[str, str]]]:
    """chunk → layer → side (a or b) → the name of the tensor."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for chunk, held in chunks.items():
        found[chunk] = {}
        for name in held:
            match = NAME.fullmatch(name)
            if match is None:
                raise DataError(f"{where}: {_why_not(name)}")
            found[chunk].setdefault(match[1], {})[(match[2] or match[3]).lower()] = name
    return found
