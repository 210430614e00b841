"""Read Megatron's classic layout, whoever wrote it: megatron-core's tensors, put together from the files of all ranks.

The options come from the user's flags, from the note that `import` leaves, from `args` in the files, or from what the
files show. They are held against the names and shapes of every file: nothing is left out or made up in silence.
Tensors that several ranks have a copy of are compared.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import classic, described, nf4, torch_files
from slipway.checkpoint.archive import Stored
from slipway.checkpoint.classic import Cut, Layout, Options, Placement, Rank
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.errors import DataError, UsageError
from slipway.families import described_model, read_config, understood
from slipway.families.checks import Config, check_stored
from slipway.families.decoder import without_mtp
from slipway.families.described import GIVE, Described
from slipway.families.rules import Rules
from slipway.options import check_group
from slipway.tensors.bits import Bits, bits_type, empty, piece_number, scratch
from slipway.tensors.refs import Ref, TensorInfo
from slipway.untrusted import read_object, read_text

NOTE = "slipway"  # folder beside the iterations, with what `import` knew: the options, config.json, the tokenizer
LAYOUT_NOTE = "layout.json"
HF_NOTE = "slipway/hf"  # what goes along with the model, as Hugging Face has it
CONFIG_NOTE = "config.json"
AGAIN = "copy the checkpoint again"
# Megatron's layers without Transformer Engine have norms of their own, which that fuses into linear layers.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
LATENT_NORMS = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
MOST_PACKED = 4096  # bytes of a layer for one of its adapter's, at most; NF4 has four
LORA = "lora_"  # in the names of low-rank adapters
EXTRA = re.compile(r".*\._extra_state(/.*)?")
# Megatron-LM's arguments → options.
ARGUMENTS = {
    "tensor_model_parallel_size": "tensor_parallel_size",
    "pipeline_model_parallel_size": "pipeline_parallel_size",
    "expert_model_parallel_size": "expert_parallel_size",
    "expert_tensor_parallel_size": "expert_tensor_parallel_size",
    **{
        name: name
        for name in (
            "num_layers", "num_layers_per_virtual_pipeline_stage", "num_layer_list", "noop_layers", "schedules_method",
            "moe_tp_extend_ep", "mla_mm_split",
        )
    },
}  # fmt: skip


def is_classic(checkpoint: Path) -> bool:
    """There are files of ranks in this folder, or in that of its newest iteration."""
    return iteration_of(checkpoint) is not None


def iteration_of(checkpoint: Path) -> Path | None:
    """The folder with the ranks' folders: the checkpoint itself, or that of the iteration in it; None if neither."""
    for folder in (checkpoint, *_newest(checkpoint)):
        if any((rank / classic.FILE).is_file() for rank in folder.glob("mp_rank_*")):
            return folder
    return None


def _newest(checkpoint: Path) -> Iterable[Path]:
    try:
        said = read_text(checkpoint / classic.TRACKER, 100).strip()[:20]
    except DataError:
        return sorted(checkpoint.glob("iter_*"))[-1:]
    return [checkpoint / (f"iter_{int(said):07d}" if said.isdecimal() else "release")]


class Ranks:
    """The files of all ranks, as they are: what each holds, and what all say of the layout.

    Args:
        folder: of the iteration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[str, torch_files.Saved] = {}
        for path in sorted(folder.glob("mp_rank_*")):
            if not re.fullmatch(r"mp_rank_\d{2,3}(_\d{3}){0,2}", path.name):
                raise DataError(f"{path} has no name of a rank's folder, such as mp_rank_00_000; move it away")
            self.saved[path.name] = _renamed(torch_files.read_header(path / classic.FILE))
        self.adapters = {
            rank: {chunk: {n: p for n, p in held.items() if LORA in n} for chunk, held in saved.chunks.items()}
            for rank, saved in self.saved.items()
        }
        self.saved = {name: _without_adapters(saved) for name, saved in self.saved.items()}
        self.left_out = sum(EXTRA.fullmatch(name) is not None for name in self.names)
        first = next(iter(self.saved.values()))
        self.args = described.arguments_of(first.beside)

    @property
    def names(self) -> set[str]:
        """The names of the tensors of all ranks."""
        return {name for saved in self.saved.values() for held in saved.chunks.values() for name in held}

    @property
    def bytes(self) -> int:
        """Of all tensors of all ranks, unpacked: NF4 has two elements in a byte, adapters stand for their layers."""
        stored = sum(file.stat().st_size for file in self.folder.glob(f"mp_rank_*/{classic.FILE}"))
        return stored * (
            MOST_PACKED if self.has_adapters or any(name.endswith(".absmax") for name in self.names) else 1
        )

    @property
    def has_adapters(self) -> bool:
        """There are low-rank adapters."""
        return any(held for chunks in self.adapters.values() for held in chunks.values())

    @property
    def only_adapters(self) -> bool:
        """There is nothing but adapters, so that the base is elsewhere."""
        return self.has_adapters and not self.names

    def path(self, rank: Rank, options: Options) -> Path:
        return self.folder / classic.folder_of(rank, options) / classic.FILE


def _renamed(saved: torch_files.Saved) -> torch_files.Saved:
    """With today's names, and without the states of Transformer Engine's modules."""
    latent = any("linear_kvb" in name or "linear_kv_" in name for held in saved.chunks.values() for name in held)
    chunks = {
        chunk: {_today(name, latent): place for name, place in held.items() if not EXTRA.fullmatch(name)}
        for chunk, held in saved.chunks.items()
    }
    if set(chunks) == {"model0"}:  # MindSpeed's name for a stage's only chunk
        chunks = {"model": chunks["model0"]}
    return replace(saved, chunks=chunks)


def _without_adapters(saved: torch_files.Saved) -> torch_files.Saved:
    """The base, with the names that its layers have where there are no adapters."""
    chunks = {
        chunk: {name.replace(".base_layer.", "."): place for name, place in held.items() if LORA not in name}
        for chunk, held in saved.chunks.items()
    }
    return replace(saved, chunks=chunks)


def _today(name: str, latent: bool) -> str:
    """Today's name of a tensor; the old ones are of models with latent attention alone."""
    name = name.removeprefix("module.")
    for pattern, new in classic.OLD_NAMES if latent else ():
        name = pattern.sub(new, name)
    return name


# ---------------------------------------------------------------------------- the options


def options_of(ranks: Ranks, given: Mapping[str, Any]) -> Options:
    """The options of files: the user's flags, the note, `args`, and what is there to be seen, in this order."""
    told = _of_args(ranks.args) | _of_note(ranks.folder.parent / NOTE / LAYOUT_NOTE)
    told |= {name: value for name, value in given.items() if value is not None}
    seen = _seen(ranks)
    if any(told.get(name) for name in ("schedules_method", "num_layer_list", "noop_layers")):
        seen.pop("num_layers_per_virtual_pipeline_stage", None)
        seen.pop("num_layer_list", None)
    options = Options(**seen | told)
    check_group(options)
    # As many files as ranks, or fewer: no list of ranks is made that the files do not explain.
    tensor, experts = options.tensor_parallel_size, options.expert_parallel_size
    if tensor * options.pipeline_parallel_size * experts > len(ranks.saved) * min(tensor, experts):
        raise DataError(f"{ranks.folder} has {len(ranks.saved)} files of ranks, fewer than its layout needs; {AGAIN}")
    return options


def _of_args(args: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: args[field] for field, name in ARGUMENTS.items() if args.get(field) is not None}
    for name in ("num_layer_list", "noop_layers"):
        if isinstance(value := found.get(name), list):
            found[name] = ",".join(map(str, value))
    if found.get("expert_tensor_parallel_size") == found.get("tensor_parallel_size"):
        found.pop("expert_tensor_parallel_size", None)
    return found


def _of_note(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_object(path, 1 << 16, AGAIN)
    known = {field.name for field in fields(Options)}
    if surplus := set(found) - known:
        raise DataError(f"{path}: unknown option {min(surplus)}; {AGAIN}")
    return found


def _seen(ranks: Ranks) -> dict[str, Any]:
    """What the folders' names and the tensors' names show."""
    numbers = [[int(part) for part in name.removeprefix("mp_rank_").split("_")] for name in ranks.saved]
    sizes = [max(column) + 1 for column in zip(*numbers, strict=False)]
    names = ranks.names | {n for chunks in ranks.adapters.values() for held in chunks.values() for n in held}
    found: dict[str, Any] = {
        "tensor_parallel_size": sizes[0],
        "moe_grouped_gemm": any(re.search(r"experts\.(weight[12]|linear_fc[12]\.weight\d+)", name) for name in names),
        "mla_mm_split": any("linear_qk_nope" in name for name in names),
        "mtp_num_layers": len({match[1] for name in names if (match := re.match(r"mtp\.layers\.(\d+)\.", name))}),
    }
    if len(sizes) == 3:
        found |= {"pipeline_parallel_size": sizes[1], "expert_parallel_size": sizes[2]}
    elif len(sizes) == 2:
        # The same form of name for stages and for expert ranks: only the first stage has the embedding.
        with_embedding = sum(_has_embedding(saved) for saved in ranks.saved.values())
        which = "pipeline" if with_embedding < len(ranks.saved) else "expert"
        found[f"{which}_parallel_size"] = sizes[1]
    if any(name.endswith(nf4.STATE) or name.endswith(".absmax") for name in names):
        found["qlora_nf4"] = "bitsandbytes" if any(name.endswith(".nested_absmax") for name in names) else "npu"
    return found | _stages_seen(ranks, found)


def _has_embedding(saved: torch_files.Saved) -> bool:
    held = {name for names in saved.chunks.values() for name in names}
    return "embedding.word_embeddings.weight" in held and not any(name.startswith("mtp.") for name in held)


def _stages_seen(ranks: Ranks, found: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of each stage, and of a virtual stage, where every stage has them from 0 on without a gap."""
    stages = found.get("pipeline_parallel_size", 1)
    counts: dict[int, dict[str, int]] = {}
    for name, saved in ranks.saved.items():
        parts = name.removeprefix("mp_rank_").split("_")
        stage = int(parts[1]) if stages > 1 else 0
        for chunk, held in saved.chunks.items():
            held = {**held, **ranks.adapters[name][chunk]}
            layers = {int(match[1]) for one in held if (match := re.match(r"decoder\.layers\.(\d+)\.", one))}
            if layers != set(range(len(layers))):
                return {}
            counts.setdefault(stage, {})[chunk] = len(layers)
    every = [count for chunks in counts.values() for count in chunks.values()]
    if any(len(chunks) > 1 for chunks in counts.values()):
        return {"num_layers_per_virtual_pipeline_stage": every[0]} if len(set(every)) == 1 else {}
    if len(set(every)) > 1:
        return {"num_layer_list": ",".join(str(*counts[stage].values()) for stage in sorted(counts))}
    return {}


# ---------------------------------------------------------------------------- which model


def model_of(ranks: Ranks, options: Options, config: Path | None) -> described.Model:
    """Which model the files are of; DataError where nothing says it."""
    source = config or ranks.folder.parent / HF_NOTE / CONFIG_NOTE
    where = ranks.folder / next(iter(ranks.saved)) / classic.FILE
    if source.is_file():
        family, known = understood(read_config(source), source)
        if config is not None:
            family, known = understood(_cut_to(known, options), source)
        return described.Model(family, known, source)
    if not ranks.args:
        raise DataError(f"{ranks.folder} does not say which model it is: there are no args in its files; {GIVE}")
    names = ranks.names
    latent = any("self_attention.linear_kv_" in name or "self_attention.linear_qk_" in name for name in names)
    kinds = {f"decoder.layers.0.{_core(name, latent)}": TensorInfo(()) for name in names}
    idle = len([part for part in (options.noop_layers or "").split(",") if part])
    said = Described({**ranks.args, "num_layers": ranks.args.get("num_layers", 0) - idle}, where, _rows(ranks))
    family, known = described_model(said, kinds)
    return described.Model(family, known, where, said)


def _cut_to(config: Config, options: Options) -> Config:
    """config.json of a model that was cut to fewer layers when it was converted."""
    idle = len([part for part in (options.noop_layers or "").split(",") if part])
    layers = (options.num_layers - idle) if options.num_layers else config["num_hidden_layers"]
    dense = options.first_k_dense_replace
    return {
        **config,
        "num_hidden_layers": min(layers, config["num_hidden_layers"]),
        **({} if dense is None else {"first_k_dense_replace": dense}),
    }


def _core(name: str, latent: bool) -> str:
    """The name of a tensor of a layer as megatron-core has it with Transformer Engine."""
    rest = re.sub(r"^.*?layers\.\d+\.", "", name)
    return (LATENT_NORMS if latent else NORMS).get(rest, rest)


def _rows(ranks: Ranks) -> int | None:
    """Rows of the embedding, of all tensor ranks together."""
    name = "embedding.word_embeddings.weight"
    tensor_ranks = {}
    for folder, saved in ranks.saved.items():
        for held in saved.chunks.values():
            if name in held:
                tensor_ranks[folder.split("_")[2]] = held[name].info.shape[0]
    return sum(tensor_ranks.values()) or None


# ---------------------------------------------------------------------------- reading


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
        self._descriptors: dict[Path, int] = {}
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
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors.setdefault(path, os.open(path, os.O_RDONLY))
        return _elements(descriptor, path, name, held, begin, count)

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
    except UNREADABLE as error:
        raise DataError(f"{path}: tensor {name} is damaged ({type(error).__name__}); {AGAIN}") from None


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


@dataclass(frozen=True)
class Found:
    """A checkpoint in the classic layout.

    Args:
        ranks: the files.
        layout: of the model.
        said: which model it is.
        rules: the family's, for it.
        notes: what a person should know.
    """

    ranks: Ranks
    layout: Layout
    said: described.Model
    rules: Rules
    notes: tuple[str, ...]


def find(checkpoint: Path, given: Mapping[str, Any], config: Path | None) -> Found:
    """What a checkpoint in the classic layout is.

    Args:
        given: the user's options, None where there is none.
        config: the user's config.json.
    """
    folder = iteration_of(checkpoint)
    if folder is None:
        raise UsageError(f"{checkpoint} is not in Megatron's classic layout: it has no mp_rank_*/{classic.FILE}")
    ranks = Ranks(folder)
    options = options_of(ranks, given)
    said = model_of(ranks, options, config)
    known = {**said.config} if options.mtp_num_layers else {**without_mtp(said.config)}
    check_stored(known, said.where, ranks.bytes)  # before the rules are made, which take memory for each tensor
    rules = said.family.rules(known)
    notes = [f"left out: {ranks.left_out} states of Transformer Engine's modules"] if ranks.left_out else []
    if surplus := sorted({key for saved in ranks.saved.values() for key in saved.beside} & TRAINING):
        notes.append(f"left out: {', '.join(surplus)}, which training saved")
    return Found(ranks, _layout(ranks, options, known, rules), replace(said, config=known), rules, tuple(notes))


TRAINING = {"optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine"}


def _layout(ranks: Ranks, options: Options, config: Config, rules: Rules) -> Layout:
    names = ranks.names
    names |= {name for chunks in ranks.adapters.values() for held in chunks.values() for name in held}
    joined = any("self_attention.linear_qkv." in name for name in names)
    mindspeed = classic.in_mindspeed(config) and joined
    in_one = any(re.search(r"experts\.weight[12]", name) for name in names)
    _to_core(ranks, mindspeed)
    return Layout(config, _with_rows(rules.megatron, ranks), options, mindspeed, in_one)


def _with_rows(tensors: Mapping[str, TensorInfo], ranks: Ranks) -> dict[str, TensorInfo]:
    """The tensors with the rows that the embedding has in the files, which Megatron pads."""
    rows = _rows(ranks)
    found = dict(tensors)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if rows and key in found and rows > found[key].shape[0]:
            found[key] = TensorInfo((rows, *found[key].shape[1:]), found[key].dtype)
    return found


def _to_core(ranks: Ranks, mindspeed: bool) -> None:
    """Give the norms of Megatron's local layers the names that Transformer Engine's layers have for them."""
    if mindspeed:
        return
    for folder, saved in ranks.saved.items():
        chunks = {}
        for chunk, held in saved.chunks.items():
            chunks[chunk] = {_to_core_name(name, held): place for name, place in held.items()}
        ranks.saved[folder] = replace(saved, chunks=chunks)


def _to_core_name(name: str, held: Iterable[str]) -> str:
    """The name of a norm that Transformer Engine fuses into the linear layer after it, where that layer is there."""
    match = re.fullmatch(r"(.*layers\.\d+\.(?:transformer_layer\.)?)(.+)", name)
    if match is None:
        return name
    layer, rest = match.groups()
    for norms in (NORMS, LATENT_NORMS):
        fused = norms.get(rest, "")
        linear = fused.replace(".layer_norm_weight", ".weight")
        if fused and f"{layer}{linear}" in held:
            return layer + fused
    return name


def note_of(options: Options) -> bytes:
    """The note of the options that `import` leaves."""
    return (json.dumps(options.described(), indent=2) + "\n").encode()
