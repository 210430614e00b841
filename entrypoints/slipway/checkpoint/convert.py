"""The plans of dequant, import, export and merge-heads: which bytes go where."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipway import families
from slipway.checkpoint import archive, huggingface, lora, nemo_context, peft, surplus, torch_dist
from slipway.checkpoint.companions import Companions, companions_of
from slipway.checkpoint.formats import IN_CONFIG as QUANTIZATION
from slipway.checkpoint.heads import merged_config
from slipway.checkpoint.initialise import STANDARD_DEVIATION, RandomWeights, changed
from slipway.checkpoint.source import NAME, source_of
from slipway.checkpoint.stream import Piece, Plan, Write, identity_of_files
from slipway.errors import DataError
from slipway.families import Family, read_config, rules, understood
from slipway.families.checks import Config, check_stored
from slipway.families.decoder import has_mtp, is_tied, mtp_layers, without_mtp
from slipway.tensors.bits import Bits, as_dtype, data
from slipway.tensors.refs import TORCH_NAMES, Ref, TensorInfo, stored_bytes

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_BYTES = 32 << 20


def bf16_config(config: Config) -> dict[str, Any]:
    """The config.json of the dequantised model."""
    return {**{key: value for key, value in config.items() if key not in QUANTIZATION}, "torch_dtype": "bfloat16"}


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has all its tensors, in the right shapes.

    Args:
        config: config.json of the Hugging Face form.
        model: the family's rules for this config.json.
        reader: reads its tensors: a Reader of huggingface or torch_dist, or lora.Merged.
        notes: what a person should know of how it was read.
    """

    config: Config
    family: Family
    model: rules.Rules
    reader: Any
    notes: tuple[str, ...] = ()


def open_model(folder: Path, devices: Sequence[str] = ("cpu",)) -> Opened:
    """Open a Hugging Face folder; DataError if a tensor is missing, unexpected or damaged."""
    where = folder / "config.json"
    config: Config
    family, config = understood(read_config(where), where)
    notes = families.notes(config)
    reader = huggingface.Reader(folder, huggingface.read_folder(folder, notes), config, devices)
    notes += surplus.settle(reader, config)
    if not reader.quantized:  # a model that was merged in BF16 often keeps the quantization_config of its base
        config = {key: value for key, value in config.items() if key not in QUANTIZATION}
    if is_tied(config) and HEAD in reader.tensors:
        if _same_head(reader):  # some checkpoints store the embedding twice
            del reader.tensors[HEAD]
        else:
            config = {**config, "tie_word_embeddings": False}
            notes.append(
                f"{HEAD} is not the embedding, although config.json says so: it is kept, as transformers 5 does"
            )
    if not has_mtp(config, reader.tensors):
        config = without_mtp(config)  # transformers drops the layer for multi-token prediction, but not its field
    check_stored(config, where, stored_bytes(reader.tensors))
    model = family.rules(config)
    surplus.unstack(reader, model.hf)
    rules.check_tensors(reader.tensors, model.hf, str(folder))
    return Opened(config, family, model, reader, tuple(notes))


def _same_head(reader: huggingface.Reader) -> bool:
    """The output layer has the embedding's values; compared in blocks of rows up to the first difference."""
    info, embedding = reader.tensors[HEAD], reader.tensors.get(EMBEDDING)
    if embedding is None or info.shape != embedding.shape:
        return False
    block = max(1, BLOCK_BYTES * info.shape[0] // max(1, info.bytes))
    ends = range(0, info.shape[0], block)
    return all(same_values(reader, HEAD, EMBEDDING, (at, min(at + block, info.shape[0]))) for at in ends)


def same_values(reader: huggingface.Reader, one: str, other: str, rows: tuple[int, int]) -> bool:
    """Whether two tensors have the same values in some rows, whatever their dtypes."""
    parts = [as_dtype(reader.read(Ref(name, (), rows)), reader.tensors[name].dtype, "F32") for name in (one, other)]
    return np.array_equal(parts[0], parts[1])


Details = dict[str, Any]  # what the summary of a command says besides sizes and time


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
    plan = _hf_plan(layout, pieces, bf16_config(source.config), folder, reader.files(), "dequant")
    details = {"files": len(plan.sizes), "decoded_tensors": len(reader.quantized)}
    return plan, details | _said(source.notes, companions_of(folder))


def to_import(folder: Path, mtp: bool, devices: Sequence[str]) -> Opened:
    """A Hugging Face folder as it will be imported: without the layers for multi-token prediction unless `mtp`."""
    opened = open_model(folder, devices)
    if mtp and not mtp_layers(opened.config):
        raise DataError(f"{folder} has no layer for multi-token prediction; leave out --mtp")
    if mtp or not mtp_layers(opened.config):
        return opened
    config = without_mtp(opened.config)
    return replace(opened, config=config, model=opened.family.rules(config))


def import_plan(
    folder: Path, mtp: bool = False, devices: Sequence[str] = ("cpu",), name: str = ""
) -> tuple[Plan, Details]:
    """Plan of the NeMo checkpoint of a Hugging Face model.

    Args:
        mtp: keep the layers for multi-token prediction.
        devices: what decodes quantised tensors.
        name: what other programs load the model by, to be noted in the context.
    """
    opened = to_import(folder, mtp, devices)
    identity = ["import", mtp, identity_of_files([*opened.reader.files(), folder / "config.json"])]
    return nemo_plan(opened, folder, name, identity)


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
    reader = RandomWeights(model.hf, config.get("initializer_range", STANDARD_DEVIATION), seed)
    opened = Opened(config, family, model, reader, (*notes, *families.notes(config)))
    plan, details = nemo_plan(opened, folder, "", ["init", dict(config), seed])
    parameters = sum(math.prod(info.shape) for info in model.hf.values())
    return plan, {"parameters": f"{parameters:,}", "seed": seed, **details}


def nemo_plan(opened: Opened, folder: Path, name: str, identity: list[Any]) -> tuple[Plan, Details]:
    """Plan of the NeMo checkpoint of an opened model.

    Args:
        folder: where the files beside the weights lie.
        name: what other programs load the model by, to be noted in the context.
        identity: what the bytes depend on.
    """
    config, model, reader = opened.config, opened.model, opened.reader
    tensors = model.megatron
    layout = torch_dist.Layout(tensors, [ref for cell in model.cells for ref in cell.megatron], model.extra_state)

    def piece(cell: rules.Cell) -> Piece:
        def work() -> Iterable[Write]:
            parts = cell.op.to_megatron(tuple(reader.read(ref) for ref in cell.hf))
            dtype = reader.tensors[cell.hf[0].name].dtype
            for ref, part in zip(cell.megatron, parts, strict=True):
                file, offset, length = layout.places[ref]
                info = tensors[ref.name]
                part = as_dtype(part, dtype, info.dtype)
                blob = archive.write(part.reshape(torch_dist.chunk_sizes(ref, info.shape)), info.dtype)
                assert sum(map(len, blob)) == length, f"the archive of {ref} is not as long as planned"
                for content in blob:
                    yield f"weights/{file}", offset, content
                    offset += len(content)

        return Piece(sum(reader.source_bytes(ref) for ref in cell.hf), work)

    def extra_state() -> Iterable[Write]:
        return [(f"weights/{file}", offset, layout.empty_state) for file, offset, _ in layout.extra.values()]

    described = bf16_config(config)
    noted = {**described, NAME: name} if name else described
    context = nemo_context.context_files(*opened.family.nemo_model(config), noted)
    others = companions_of(folder)
    tokenizer = others.of_tokenizer().under(f"context/{nemo_context.TOKENIZER}")
    kept = others.under(f"context/{nemo_context.HF_FILES}")
    plan = Plan(
        sizes={f"weights/{file}": size for file, size in layout.sizes.items()},
        pieces=[*map(piece, model.cells), Piece(0, extra_state)],
        small={
            **{f"context/{name}": content for name, content in context.items()},
            "weights/metadata.json": torch_dist.FORMAT.encode(),
            "weights/common.pt": torch_dist.common_state(),
            "weights/.metadata": layout.metadata(),
            # transformers finds a tokenizer without a class by the model's type.
            f"context/{nemo_context.TOKENIZER}/config.json": (json.dumps(described, indent=2) + "\n").encode(),
            **tokenizer.small,
            **kept.small,
        },
        copies={**tokenizer.copies, **kept.copies},
        identity=identity,
    )
    return plan, {"tensors": len(tensors)} | _said(opened.notes, others)


def _said(notes: Iterable[str], others: Companions) -> Details:
    """What the summary says of how a model was read, and of what stayed behind."""
    left_out = (
        f"left out: {', '.join(others.left_out)}, which no tool of transformers writes" if others.left_out else ""
    )
    said = [*notes, *filter(None, [left_out])]
    return {"notes": said} if said else {}


def open_nemo(checkpoint: Path, base: Path | None = None) -> Opened:
    """Open a NeMo checkpoint without the optimizer's tensors; low-rank adapters are merged into their base.

    Args:
        base: checkpoint of the adapters' base; None = the one that NeMo noted.
    """
    reader = torch_dist.Reader(checkpoint)
    if lora.has_adapters(reader):
        opened, adapters = _with_adapters(reader, base)
        return replace(opened, reader=lora.Merged(opened.reader, adapters), notes=adapters.notes)
    context = context_folder(reader.folder)
    path = context / nemo_context.SOURCE_CONFIG
    if not path.is_file():
        raise DataError(f"{context} has no {path.name}; this command needs a checkpoint created by `slipway import`")
    family, config = understood(read_config(path), path)
    check_stored(config, path, stored_bytes(reader.tensors))
    config.pop(NAME, None)  # `import` noted it; what is exported need not be that any more
    model = family.rules(config)
    found = {key: info for key, info in reader.tensors.items() if not key.startswith("optimizer.")}
    if found and all("adapter." in key for key in found):
        raise DataError(f"{checkpoint} holds only trained heads; use `slipway extract-heads`")
    rules.check_tensors(found, model.megatron, str(reader.folder))
    return Opened(config, family, model, reader)


def _with_adapters(reader: torch_dist.Reader, base: Path | None) -> tuple[Opened, lora.Adapters]:
    """(their base, the adapters of a checkpoint); DataError where they do not fit each other."""
    folder = lora.base_of(reader, base)
    opened = open_nemo(folder)
    return opened, lora.Adapters(reader, opened.model.megatron, folder)


def hf_parts(source: Opened, cell: rules.Cell) -> tuple[Bits, ...]:
    """The Hugging Face parts of a cell of a NeMo checkpoint, in the dtypes of the family's rules."""
    dtype = source.reader.tensors[cell.megatron[0].name].dtype
    parts = cell.op.to_hf(tuple(map(source.reader.read, cell.megatron)))
    return tuple(
        as_dtype(part, dtype, source.model.hf[ref.name].dtype) for ref, part in zip(cell.hf, parts, strict=True)
    )


def export_plan(checkpoint: Path, shard_bytes: int, base: Path | None = None) -> tuple[Plan, Details]:
    """Plan of the Hugging Face folder of a NeMo checkpoint, as `import` created it or NeMo trained it further."""
    source = open_nemo(checkpoint, base)
    reader, model = source.reader, source.model
    layout = huggingface.Layout(model.hf, shard_bytes)

    def piece(cell: rules.Cell) -> Piece:
        def work() -> Iterable[Write]:
            for ref, part in zip(cell.hf, hf_parts(source, cell), strict=True):
                yield (*layout.place(ref), data(part))

        return Piece(sum(TensorInfo(r.shape(model.megatron[r.name].shape)).bytes for r in cell.megatron), work)

    others = context_folder(reader.folder) / nemo_context.HF_FILES
    plan = _hf_plan(layout, [*map(piece, model.cells)], source.config, others, reader.files(), "export")
    return plan, {"files": len(plan.sizes)} | _said(source.notes, Companions())


def adapter_plan(checkpoint: Path, base: Path | None = None) -> tuple[Plan, Details]:
    """Plan of the `peft` adapter of a checkpoint of low-rank adapters."""
    reader = torch_dist.Reader(checkpoint)
    if not lora.has_adapters(reader):
        raise DataError(f"{checkpoint} has no low-rank adapters; leave out --adapter")
    opened, adapters = _with_adapters(reader, base)
    name = source_of(context_folder(opened.reader.folder)) or lora.base_of(reader, base).name
    files, notes = peft.peft_adapter(adapters, opened.model, name)
    plan = Plan({}, [], files, {}, ["adapter", identity_of_files(reader.files())])
    return plan, {"files": len(files)} | _said(notes, Companions())


def context_folder(weights: Path) -> Path:
    """The context folder that belongs to a weights folder."""
    return weights.parent / "context"


def merge_plan(
    heads: Mapping[str, Bits], heads_config: Mapping[str, Any], base: Path, shard_bytes: int, name: str = ""
) -> tuple[Plan, Details]:
    """Plan of one model of base and heads, in AutoDeco's form: the base's names begin with `llm.`.

    Args:
        heads: name → tensor in BF16.
        heads_config: the fields of config.json that the heads decide.
        base: folder of a Hugging Face model in BF16.
        name: what AutoDeco's class loads the base by; its path if there is none.
    """
    source = open_model(base)
    config, model, reader = source.config, source.model, source.reader
    if reader.quantized:
        raise DataError(f"{base} is quantised; run `slipway dequant` first and give its output")
    if heads_config["temperature_hidden_size"] != config["hidden_size"]:
        raise DataError(
            f"the heads have hidden size {heads_config['temperature_hidden_size']}, but {base} has "
            f"{config['hidden_size']}; give the base that the heads were trained on"
        )
    tensors = {f"llm.{name}": reader.tensors[name] for name in model.hf}
    tensors |= {name: TensorInfo(part.shape) for name, part in heads.items()}
    layout = huggingface.Layout(tensors, shard_bytes)
    refs = [ref for cell in model.cells for ref in cell.hf]
    pieces = [_copy_piece(reader, layout, ref, Ref(f"llm.{ref.name}", ref.index, ref.rows)) for ref in refs]
    pieces += [_tensor_piece(layout, name, part) for name, part in heads.items()]
    merged = merged_config(config, {**heads_config, "base_model_name_or_path": name or str(base.absolute())})
    plan = _hf_plan(layout, pieces, merged, base, reader.files(), "merge")
    return plan, {"files": len(plan.sizes)} | _said(source.notes, companions_of(base))


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
    others: Path,
    sources: Iterable[Path],
    verb: str,
) -> Plan:
    headers = [Piece(0, lambda: [(file, 0, header) for file, header in layout.headers.items()])]
    kept = companions_of(others)
    config = {**config, "torch_dtype": _main_dtype(layout.tensors.values())}
    small = {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **kept.small}
    if (index := layout.index()) is not None:
        small[huggingface.INDEX] = index
    return Plan(layout.sizes, headers + pieces, small, kept.copies, [verb, identity_of_files(sources)])


def _main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """torch's name of the dtype that most of the bytes have: what transformers and vLLM load the model in."""
    sizes: Counter[str] = Counter()
    for info in tensors:
        sizes[info.dtype] += info.bytes
    return TORCH_NAMES[sizes.most_common(1)[0][0]]
