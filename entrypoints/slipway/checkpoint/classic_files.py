"""What the files of Megatron's classic layout say, whoever wrote them: their tensors, their layout, and which model.

The options come from the user's flags, from the note that `import` leaves, from `args` in the files, or from what the
files show. classic_reader.py holds them against the names and shapes of every file, and reads the tensors.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from slipway.checkpoint import classic, described, nf4, torch_files
from slipway.checkpoint.classic import Layout, Options, Rank
from slipway.errors import DataError, UsageError
from slipway.families import described_model, read_config, understood
from slipway.families.checks import Config, check_stored
from slipway.families.described import GIVE, Described
from slipway.families.mtp import without_mtp
from slipway.families.rules import Rules
from slipway.options import check_group
from slipway.tensors.refs import TensorInfo
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
ADAPTER = re.compile(r".*(lora_|\.adapter\.).*")  # the name of a tensor of low-rank adapters
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
            rank: {
                chunk: {n: p for n, p in held.items() if ADAPTER.fullmatch(n)} for chunk, held in saved.chunks.items()
            }
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
        chunk: {name.replace(".base_layer.", "."): place for name, place in held.items() if not ADAPTER.fullmatch(name)}
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
        said = f"{ranks.folder} has {len(ranks.saved)} files of ranks, fewer than its layout needs"
        raise DataError(f"{said}{_first_missing(ranks, options)}; {AGAIN}")
    return options


def _first_missing(ranks: Ranks, options: Options) -> str:
    """The first rank without a file, in words; nothing where some combinations have none."""
    sizes = options.tensor_parallel_size, options.pipeline_parallel_size, options.expert_parallel_size
    if min(sizes[0], sizes[2]) > 1:
        return ""
    folders = (classic.folder_of(Rank(*place), options) for place in itertools.product(*map(range, sizes)))
    return f": {next(folder for folder in folders if folder not in ranks.saved)} is missing"


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
    return {name: value for name, value in found.items() if value is not None}


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
            layers = {int(match[1]) for one in held if (match := re.match(r"decoder\.layers\.(\d{1,9})\.", one))}
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
    layers = ranks.args.get("num_layers")  # of any kind: the family looks at it
    real = {"num_layers": layers - idle} if isinstance(layers, int) else {}
    said = Described({**ranks.args, **real}, where, _rows(ranks))
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
            if name in held and held[name].info.shape:
                tensor_ranks[folder.split("_")[2]] = held[name].info.shape[0]
    return sum(tensor_ranks.values()) or None


# ---------------------------------------------------------------------------- all of it


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
