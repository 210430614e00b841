"""The plans of dequant, import, export and merge-heads: which bytes go where."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipway import families
from slipway.checkpoint import (
    bridge,
    classic,
    classic_files,
    classic_plan,
    huggingface,
    peft,
    torch_dist,
)
from slipway.checkpoint.companions import Companions
from slipway.checkpoint.formats import IN_CONFIG as QUANTIZATION
from slipway.checkpoint.heads import check_base, merged_config
from slipway.checkpoint.heads import read as read_heads
from slipway.checkpoint.initialise import RandomWeights, changed, deviation_of
from slipway.checkpoint.opened import (
    NOTHING,
    Given,
    Opened,
    adapters_in,
    cut_to,
    open_any,
    open_megatron,
    open_model,
)
from slipway.checkpoint.outputs import Details, as_json, bf16_config, context_of, said_of, torch_dist_weights
from slipway.checkpoint.source import NAME
from slipway.checkpoint.stream import Piece, Plan, Write, identity_of_files
from slipway.errors import DataError, UsageError
from slipway.families import read_config, rules, understood
from slipway.families.mtp import mtp_layers, without_mtp
from slipway.tensors.bits import Bits, data
from slipway.tensors.refs import TORCH_NAMES, Ref, TensorInfo

PLAIN_LAYOUT = classic.Options()


def dequant_plan(folder: Path, shard_bytes: int, devices: Sequence[str] = ("cpu",)) -> tuple[Plan, Details]:
    """Plan of the BF16 copy of a quantised model.

    Args:
        shard_bytes: most bytes of data in a file.
        devices: what decodes.
    """
    source = open_model(folder, devices)
    reader, model = source.reader, source.model
    if not reader.quantized:
        raise DataError(f"{folder} is not quantised, so there is nothing to do; use it as it is")
    layout = huggingface.Layout({name: reader.tensors[name] for name in model.hf}, shard_bytes)
    refs = [ref for cell in model.cells for ref in cell.hf]
    pieces = [_copy_piece(reader, layout, ref, ref) for ref in refs]
    identity = ["dequant", identity_of_files(reader.files())]
    plan = _hf_plan(layout, pieces, bf16_config(source.config), source.companions, identity, [folder])
    details = {"files": len(plan.sizes), "decoded_tensors": len(reader.quantized)}
    return plan, details | said_of(source.notes, source.companions)


FORMATS = ("nemo", "bridge", "classic")  # what `import` writes


def import_plan(
    folder: Path,
    mtp: bool = False,
    devices: Sequence[str] = ("cpu",),
    name: str = "",
    given: Given = NOTHING,
    form: str = "nemo",
    options: classic.Options = PLAIN_LAYOUT,
) -> tuple[Plan, Details]:
    """Plan of a Megatron checkpoint of a model in any form.

    Args:
        mtp: keep the layers for multi-token prediction.
        devices: what decodes quantised tensors.
        name: what other programs load the model by, to be noted beside the weights.
        given: what the user says of a source in one of Megatron's layouts.
        form: one of FORMATS.
        options: of the classic layout.
    """
    opened = open_any(folder, mtp or options.mtp_num_layers > 0, devices, given)
    sources = [*opened.reader.files(), *filter(Path.is_file, [folder / "config.json"])]
    identity = ["import", form, mtp, options.described(), given.identity, identity_of_files(sources)]
    if form == "classic":
        plan, details = classic_layout_plan(opened, options, name, identity)
    elif form == "bridge":
        plan, details = bridge.plan(opened, identity)
    else:
        plan, details = nemo_plan(opened, name, identity)
    return replace(plan, reads=given.reads(folder)), details


def init_plan(folder: Path, settings: Iterable[str], seed: int) -> tuple[Plan, Details]:
    """Plan of a NeMo checkpoint with random weights.

    Args:
        folder: a Hugging Face model's config.json, and the tokenizer that goes along; its weights are not read.
        settings: FIELD=VALUE for fields of config.json.
        seed: of the weights.
    """
    where = folder / "config.json"
    given, notes = changed(read_config(where), settings)
    family, config = understood(without_mtp({k: v for k, v in given.items() if k not in QUANTIZATION}), where)
    model = family.rules(config)
    reader = RandomWeights(model.hf, deviation_of(config, where), seed)
    opened = Opened(config, family, model, reader, (*notes, *families.notes(config)), others=folder)
    plan, details = nemo_plan(opened, "", ["init", dict(config), seed])
    parameters = sum(math.prod(info.shape) for info in model.hf.values())
    return replace(plan, reads=[folder]), {"parameters": f"{parameters:,}", "seed": seed, **details}


def nemo_plan(opened: Opened, name: str, identity: list[Any]) -> tuple[Plan, Details]:
    """Plan of the NeMo checkpoint of an opened model.

    Args:
        name: what other programs load the model by, to be noted in the context.
        identity: what the bytes depend on.
    """
    model = opened.model
    weights = torch_dist_weights(opened, "weights", torch_dist.PREFIX)
    small, copies = context_of(opened, name)
    plan = Plan(weights.sizes, weights.pieces, {**small, **weights.small}, copies, identity)
    return plan, {"tensors": len(model.megatron)} | said_of(opened.notes, opened.companions)


def classic_layout_plan(
    found: Opened, options: classic.Options, name: str, identity: list[Any]
) -> tuple[Plan, Details]:
    """Plan of a checkpoint in Megatron's classic layout.

    Args:
        name: what other programs load the model by, to be noted beside the weights.
        identity: what the bytes depend on.
    """
    if options.mtp_num_layers != mtp_layers(found.config):
        raise UsageError(
            f"--mtp-num-layers is {options.mtp_num_layers}, but the model has {mtp_layers(found.config)} layers for "
            "multi-token prediction; keep all of them or none"
        )
    idle = len(options.noop_layers.split(",")) if options.noop_layers else 0
    layers = options.num_layers - idle if options.num_layers else found.config["num_hidden_layers"]
    opened = cut_to(found, layers, options.first_k_dense_replace) if layers > 0 else found
    mindspeed = classic.in_mindspeed(opened.config)
    layout = classic.Layout(opened.config, opened.model.megatron, options, mindspeed, in_one=mindspeed)
    output = classic_plan.Output(layout, classic_plan.megatron_args(opened.family, opened.config, layout))
    described = bf16_config(opened.config)
    noted = {**described, NAME: name} if name else described
    others = opened.companions
    kept = others.under(classic_files.HF_NOTE)
    plan = Plan(
        sizes=output.sizes(),
        pieces=classic_plan.pieces(output, opened.model.cells, opened.megatron_parts, opened.source_bytes),
        small={
            classic.TRACKER: b"1",
            **kept.small,
            f"{classic_files.NOTE}/{classic_files.LAYOUT_NOTE}": classic_files.note_of(options),
            f"{classic_files.HF_NOTE}/{classic_files.CONFIG_NOTE}": as_json(noted),
        },
        copies=kept.copies,
        identity=identity,
        finish=output.finish,
    )
    return plan, {"files": len(plan.sizes)} | said_of(opened.notes, others)


def export_plan(checkpoint: Path, shard_bytes: int, given: Given = NOTHING) -> tuple[Plan, Details]:
    """Plan of the Hugging Face folder of a checkpoint of NeMo, Megatron-Bridge, Megatron-LM or MindSpeed-LLM."""
    source = open_megatron(checkpoint, given)
    layout = huggingface.Layout(source.model.hf, shard_bytes)

    def piece(unit: list[rules.Cell]) -> Piece:
        def work() -> Iterable[Write]:
            for cell in unit:
                for ref, part in zip(cell.hf, source.hf_parts(cell), strict=True):
                    yield (*layout.place(ref), data(part))

        return Piece(sum(map(source.source_bytes, unit)), work)

    pieces = [*map(piece, source.units())]
    identity = ["export", given.identity, identity_of_files(source.reader.files())]
    others = source.companions
    plan = _hf_plan(layout, pieces, source.config, others, identity, given.reads(checkpoint))
    said = [] if others.has_tokenizer else ["there is no tokenizer beside these weights, so the output has none"]
    return plan, {"files": len(plan.sizes)} | said_of([*source.notes, *said], Companions())


def adapter_plan(checkpoint: Path, given: Given = NOTHING) -> tuple[Plan, Details]:
    """Plan of the `peft` adapter of a checkpoint of low-rank adapters."""
    model, adapters, name = adapters_in(checkpoint, given)
    files, notes = peft.peft_adapter(adapters, model, name)
    if (Path(name) / "weights").is_dir():
        notes.append(f"peft cannot load the base by its name, {name}: export it too, and load the adapter on that")
    identity = ["adapter", given.identity, identity_of_files(adapters.reader.files())]
    plan = Plan({}, [], files, {}, identity, reads=given.reads(checkpoint))
    return plan, {"files": len(files)} | said_of(notes, Companions())


def merge_plan(of_heads: Path, base: Path, shard_bytes: int, name: str = "") -> tuple[Plan, Details]:
    """Plan of one model of base and heads, in AutoDeco's form: the base's names begin with `llm.`.

    Args:
        of_heads: folder that `extract-heads` wrote.
        base: folder of a Hugging Face model in BF16.
        name: what AutoDeco's class loads the base by; its path if there is none.
    """
    heads, heads_config = read_heads(of_heads)
    source = open_model(base)
    config, model, reader = source.config, source.model, source.reader
    if reader.quantized:
        raise DataError(f"{base} is quantised; run `slipway dequant` first and give its output")
    if heads_config["temperature_hidden_size"] != config["hidden_size"]:
        raise DataError(
            f"the heads have hidden size {heads_config['temperature_hidden_size']}, but {base} has "
            f"{config['hidden_size']}; give the base that the heads were trained on"
        )
    check_base(of_heads, config, base)
    tensors = {f"llm.{name}": reader.tensors[name] for name in model.hf}
    tensors |= {name: TensorInfo(part.shape) for name, part in heads.items()}
    layout = huggingface.Layout(tensors, shard_bytes)
    refs = [ref for cell in model.cells for ref in cell.hf]
    pieces = [_copy_piece(reader, layout, ref, Ref(f"llm.{ref.name}", ref.index, ref.rows)) for ref in refs]
    pieces += [_tensor_piece(layout, name, part) for name, part in heads.items()]
    merged = merged_config(config, {**heads_config, "base_model_name_or_path": name or str(base.absolute())})
    digests = {name: hashlib.sha256(data(part)).hexdigest() for name, part in heads.items()}
    identity = ["merge", digests, identity_of_files(reader.files())]
    plan = _hf_plan(layout, pieces, merged, source.companions, identity, [of_heads, base])
    return plan, {"files": len(plan.sizes)} | said_of(source.notes, source.companions)


def _copy_piece(reader: huggingface.Reader, layout: huggingface.Layout, source: Ref, target: Ref) -> Piece:
    """Read and decode one part, and write it to its place."""
    return Piece(reader.source_bytes(source), lambda: [(*layout.place(target), data(reader.read(source)))])


def _tensor_piece(layout: huggingface.Layout, name: str, part: Bits) -> Piece:
    """Write a tensor that is in memory to its place."""
    return Piece(part.nbytes, lambda: [(*layout.place(Ref(name)), data(part))])


def _hf_plan(
    layout: huggingface.Layout,
    pieces: list[Piece],
    config: Mapping[str, Any],
    kept: Companions,
    identity: list[Any],
    reads: Sequence[Path],
) -> Plan:
    headers = [Piece(0, lambda: [(file, 0, header) for file, header in layout.headers.items()])]
    config = {**config, "torch_dtype": _main_dtype(layout.tensors.values())}
    small = {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **kept.small}
    if (index := layout.index()) is not None:
        small[huggingface.INDEX] = index
    return Plan(layout.sizes, headers + pieces, small, kept.copies, identity, reads=reads)


def _main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """torch's name of the dtype that most of the bytes have: what transformers and vLLM load the model in."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        sizes[info.dtype] += info.bytes
    return TORCH_NAMES[sizes.most_common(1)[0][0]]
