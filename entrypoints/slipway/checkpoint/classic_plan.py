"""The plan of a checkpoint in Megatron's classic layout: which bytes go into the file of which rank.

Each part of the source is read and decoded once, although up to TP · EP ranks get a copy of it. A unit of work is what
must be in memory together: usually one cell of the family's rules; a whole matrix where a rank has it transposed or in
another order of rows; all of a rank's tensor where NF4 packs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import classic, nf4, torch_files
from slipway.checkpoint.classic import Cut, Layout, Matrix, Placement, Rank
from slipway.checkpoint.stream import Piece, Write
from slipway.families import Family
from slipway.families.checks import Config
from slipway.families.rules import Cell
from slipway.tensors.bits import Bits, contiguous, data, empty, transpose
from slipway.tensors.refs import DTYPE_BYTES, Ref, TensorInfo

Parts = Callable[[Cell], tuple[Bits, ...]]  # Megatron's parts of a cell, in the dtypes of the family's rules
# Bytes for the text of bitsandbytes' state, which has a float in it, known only once the tensor is packed. Every length
# below 256 is one byte in a pickle.
STATE_ROOM = 255


class Output:
    """The files of all ranks, and where each tensor is in them.

    Args:
        layout: where each part goes.
        args: Megatron-LM's arguments, saved in every file.
    """

    def __init__(self, layout: Layout, args: Mapping[str, Any]) -> None:
        self.layout, self.form = layout, layout.options.qlora_nf4 or ""
        beside = {"checkpoint_version": 3.0, "iteration": 1, "args": torch_files.namespace(args)}
        self.files = {
            rank: torch_files.File({chunk: self._stored(held) for chunk, held in chunks.items()}, beside)
            for rank, chunks in layout.files.items()
        }

    def _stored(self, held: Mapping[str, classic.Held]) -> dict[str, TensorInfo]:
        """A rank's tensors as they are stored: NF4 has several for one."""
        found: dict[str, TensorInfo] = {}
        for name, tensor in held.items():
            if not tensor.packed:
                found[name] = tensor.info
                continue
            parts = nf4.infos(tensor.info.shape, self.form)
            parts.setdefault(nf4.STATE, TensorInfo((STATE_ROOM,), "U8"))
            found |= {name + suffix: info for suffix, info in parts.items()}
        return found

    def path(self, rank: Rank) -> str:
        """The name of a rank's file below the output folder."""
        return f"{classic.ITERATION}/{classic.folder_of(rank, self.layout.options)}/{classic.FILE}"

    def sizes(self) -> dict[str, int]:
        """File → bytes."""
        return {self.path(rank): file.size for rank, file in self.files.items()}

    def write(self, rank: Rank, chunk: str, name: str, element: int, size: int, part: Bits) -> Write:
        """Elements of a tensor from number `element` on, of `size` bytes each."""
        return self.path(rank), self.files[rank].offset(chunk, name) + element * size, data(part)

    def finish(self, folder: Path) -> None:
        """Write what is not tensors: the headers, and the pickles that name the tensors."""
        for rank, file in self.files.items():
            path = folder / self.path(rank)
            file.finish(path, self._text_lengths(rank, path))

    def _text_lengths(self, rank: Rank, path: Path) -> dict[tuple[str, str], int]:
        if self.form != "bitsandbytes":
            return {}
        found = {}
        with path.open("rb") as file:
            for chunk, held in self.layout.files[rank].items():
                for name in (name + nf4.STATE for name, tensor in held.items() if tensor.packed):
                    file.seek(self.files[rank].offset(chunk, name))
                    found[chunk, name] = len(file.read(STATE_ROOM).rstrip(b"\0"))
        return found


# ---------------------------------------------------------------------------- units of work


def pieces(output: Output, cells: Iterable[Cell], parts: Parts, source_bytes: Callable[[Cell], int]) -> list[Piece]:
    """All work, in units."""

    def piece(unit: list[Cell]) -> Piece:
        return Piece(sum(map(source_bytes, unit)), lambda: _work(output, unit, parts))

    return [*map(piece, _units(output.layout, cells))]


def _units(layout: Layout, cells: Iterable[Cell]) -> Iterator[list[Cell]]:
    """Cells that must be worked on together."""
    groups: dict[Any, list[Cell]] = {}
    tied = _tied(layout)
    for number, cell in enumerate(cells):
        matrix = classic.matrix_of(cell.megatron[0])
        group: Any = tied.get(matrix)
        if group is None:
            group = matrix if _needs_all(layout.places[matrix]) else number
        groups.setdefault(group, []).append(cell)
    yield from groups.values()


def _needs_all(places: Iterable[Placement]) -> bool:
    """A rank's part is no few runs of rows."""
    return any(place.cut.transposed or len(place.cut.rows) > 2 for place in places)


def _tied(layout: Layout) -> dict[Matrix, int]:
    """Matrix → number of the group of those that share a packed tensor of some rank."""
    groups: dict[Matrix, int] = {}
    first: dict[tuple[Rank, str, str], Matrix] = {}
    members: dict[int, list[Matrix]] = {}
    for matrix, places in layout.places.items():
        if not any(_held(layout, place).packed for place in places):
            continue
        group = len(members)
        groups[matrix], members[group] = group, [matrix]
        for place in places:
            other = first.setdefault((place.rank, place.chunk, place.name), matrix)
            if groups[other] != groups[matrix]:
                kept, gone = groups[other], groups[matrix]
                for one in members.pop(gone):
                    groups[one] = kept
                    members[kept].append(one)
                members[gone] = []
    return {matrix: -1 - group for matrix, group in groups.items()}


def _held(layout: Layout, place: Placement) -> classic.Held:
    return layout.files[place.rank][place.chunk][place.name]


@dataclass(frozen=True)
class _Rows:
    """Rows of a matrix from `start` on."""

    start: int
    content: Bits

    @property
    def stop(self) -> int:
        return self.start + len(self.content)


def _work(output: Output, unit: list[Cell], parts: Parts) -> Iterator[Write]:
    found: dict[Matrix, list[_Rows]] = {}
    for cell in unit:
        for ref, part in zip(cell.megatron, parts(cell), strict=True):
            content = part if part.ndim else part.reshape(1)
            found.setdefault(classic.matrix_of(ref), []).append(_Rows(_start(ref), content))
    packed: dict[tuple[Rank, str, str], list[tuple[Matrix, Placement]]] = {}
    for matrix, rows in found.items():
        for place in output.layout.places[matrix]:
            if _held(output.layout, place).packed:
                packed.setdefault((place.rank, place.chunk, place.name), []).append((matrix, place))
        plain = [place for place in output.layout.places[matrix] if not _held(output.layout, place).packed]
        yield from _copies(output, matrix, rows, plain)
    yield from _packed(output, packed, found)


def _start(ref: Ref) -> int:
    return ref.rows[0] if ref.rows else 0


def _copies(output: Output, matrix: Matrix, rows: list[_Rows], places: list[Placement]) -> Iterator[Write]:
    """What each rank gets of some rows of a matrix. Ranks with the same cut get the same bytes, made once."""
    size = DTYPE_BYTES[output.layout.tensors[matrix[0]].dtype]
    made: dict[Cut, list[tuple[int, Bits]]] = {}
    for place in places:
        if place.cut not in made:
            made[place.cut] = _part(place.cut, rows)
        for at, run in made[place.cut]:
            yield output.write(place.rank, place.chunk, place.name, place.at + at, size, run)


def _part(cut: Cut, rows: list[_Rows]) -> list[tuple[int, Bits]]:
    """(element in the rank's part, its content in row-major order) of the rows that a cut has of these."""
    found = list(_runs(cut, rows))
    if not cut.transposed and len(cut.rows) <= 2:
        return [(at * math.prod(run.shape[1:]), contiguous(run)) for at, run in found]
    # Together they are all of the part: it is put together once, in the order in which the rank has it.
    count = sum(len(run) for _, run in found)
    width = found[0][1].shape[1:]
    whole = empty((*width, count) if cut.transposed else (count, *width), found[0][1].dtype)
    for at, run in found:
        if cut.transposed:
            transpose(run.T, whole[:, at : at + len(run)])
        else:
            whole[at : at + len(run)] = run
    return [(0, whole)]


def _runs(cut: Cut, rows: list[_Rows]) -> Iterator[tuple[int, Bits]]:
    """(row in the rank's part, rows) of the rows that a cut has of these."""
    columns = slice(*cut.columns) if cut.columns else slice(None)
    for part in rows:
        at = 0
        for start, stop in cut.rows:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                run = part.content[low - part.start : high - part.start]
                yield at + low - start, run[:, columns] if run.ndim > 1 else run
            at += stop - start


def _packed(
    output: Output,
    wanted: Mapping[tuple[Rank, str, str], list[tuple[Matrix, Placement]]],
    found: Mapping[Matrix, list[_Rows]],
) -> Iterator[Write]:
    """The parts of packed tensors. Ranks with the same content get the same bytes, made once."""
    made: dict[Any, nf4.Packed] = {}
    for (rank, chunk, name), placed in wanted.items():
        content = tuple((matrix, place.cut, place.at) for matrix, place in placed)
        if content not in made:
            shape = output.layout.files[rank][chunk][name].info.shape
            whole = empty((math.prod(shape),), np.uint16)
            for matrix, place in placed:
                for at, run in _part(place.cut, found[matrix]):
                    whole[place.at + at : place.at + at + run.size] = run.reshape(-1)
            made[content] = nf4.pack(whole.reshape(shape), output.form)
        for suffix, (elements, dtype) in made[content].items():
            yield output.write(rank, chunk, name + suffix, 0, DTYPE_BYTES[dtype], elements)


# ---------------------------------------------------------------------------- args


def megatron_args(family: Family, config: Config, layout: Layout) -> dict[str, Any]:
    """Megatron-LM's arguments for a model: what its loader compares, and what --use-checkpoint-args takes."""
    options, fields = layout.options, family.nemo_model(config)[2]
    plain = {name: _plain(value) for name, value in fields.items()}
    tied = bool(config.get("tie_word_embeddings"))
    noops = len((options.noop_layers or "").split(",")) if options.noop_layers else 0
    chunks = layout.stages.chunks
    return {
        **plain,
        "num_layers": config["num_hidden_layers"] + noops,
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": plain.get("position_embedding_type") or "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_bias_linear": bool(family.MEGATRON.get("add_bias_linear", False)),
        "add_qkv_bias": bool(family.MEGATRON.get("add_qkv_bias", False)),
        "qk_layernorm": bool(family.MEGATRON.get("qk_layernorm", False)),
        "multi_latent_attention": bool(family.MEGATRON.get("multi_latent_attention", False)),
        "squared_relu": False,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not tied,
        "num_experts": plain.get("num_moe_experts"),
        "moe_grouped_gemm": options.moe_grouped_gemm,
        "moe_tp_extend_ep": options.moe_tp_extend_ep,
        "mla_mm_split": options.mla_mm_split,
        "padded_vocab_size": config["vocab_size"],
        "tensor_model_parallel_size": options.tensor_parallel_size,
        "pipeline_model_parallel_size": options.pipeline_parallel_size,
        "expert_model_parallel_size": options.expert_parallel_size,
        "expert_tensor_parallel_size": options.expert_tensor_parallel_size or options.tensor_parallel_size,
        "num_layers_per_virtual_pipeline_stage": options.num_layers_per_virtual_pipeline_stage,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_layer_list": options.num_layer_list,
        "noop_layers": options.noop_layers,
        "schedules_method": options.schedules_method,
        "mtp_num_layers": options.mtp_num_layers or None,
        "bf16": True,
        "fp16": False,
        "ckpt_format": "torch",
        "iteration": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _plain(value: Any) -> Any:
    """A value of a configuration without Python's objects, which torch would not load with weights_only."""
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "target", value)
