"""Plans: what dequant, import, export and merge move from where to where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from entrypoints.checkpoint import huggingface, nemo_context, torch_dist
from entrypoints.checkpoint.refs import TORCH_NAMES, Ref, TensorInfo
from entrypoints.checkpoint.stream import Piece, Plan, Write, identity_of_files, tensor_bytes
from entrypoints.errors import DataError
from entrypoints.families import family_of, read_config, rules
from entrypoints.families.decoder import has_mtp, is_tied, mtp_layers, without_mtp

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template")

HF_FILES = "hf_files"  # in context/: the other files of the source, for export


def bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the dequantised model."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def as_dtype(part: Tensor, dtype: str) -> Tensor:
    """The part in a dtype given in safetensors' spelling."""
    import torch

    return part.to(getattr(torch, TORCH_NAMES[dtype]))


def open_model(folder: Path) -> tuple[dict[str, Any], ModuleType, huggingface.Reader]:
    """(config.json, family, reader) of a Hugging Face folder whose tensors are all there and of the right shapes."""
    config = read_config(folder / "config.json")
    family = family_of(config, folder / "config.json")
    reader = huggingface.Reader(folder, huggingface.read_folder(folder), config)
    if is_tied(config):
        reader.tensors.pop("lm_head.weight", None)  # some store the embedding twice
    if not has_mtp(config, reader.tensors):
        config = without_mtp(config)  # transformers saves a model without its layer for multi-token prediction
    rules.check_tensors(reader.tensors, family.rules(config).hf, str(folder))
    return config, family, reader


def dequant_plan(folder: Path, shard_bytes: int) -> tuple[Plan, int]:
    """(plan of the BF16 copy of a quantised model, number of tensors that get decoded)."""
    config, family, reader = open_model(folder)
    if not reader.quantized:
        raise DataError(f"{folder} is not quantised: nothing to do; `import` reads it as it is")
    model = family.rules(config)
    layout = huggingface.Layout({name: reader.tensors[name] for name in model.hf}, shard_bytes)
    refs = [ref for cell in model.cells for ref in cell.hf]
    pieces = [_copy_piece(reader, layout, ref, ref) for ref in refs]
    plan = _hf_plan(layout, pieces, bf16_config(config), folder, reader.files(), "dequant")
    return plan, len(reader.quantized)


def import_plan(folder: Path, mtp: bool = False) -> tuple[Plan, Mapping[str, TensorInfo]]:
    """(plan of the NeMo checkpoint of a Hugging Face model, its Megatron tensors).

    Args:
        mtp: with the layers for multi-token prediction; else they are left out.
    """
    config, family, reader = open_model(folder)
    if mtp and not mtp_layers(config):
        raise DataError(f"{folder} has no layer for multi-token prediction; import it without --mtp")
    if not mtp:
        config = without_mtp(config)
    model = family.rules(config)
    tensors = model.megatron
    layout = torch_dist.Layout(tensors, [ref for cell in model.cells for ref in cell.megatron], model.extra_state)

    def piece(cell: rules.Cell) -> Piece:
        def work() -> Iterable[Write]:
            parts = cell.op.to_megatron(tuple(reader.read(ref) for ref in cell.hf))
            for ref, part in zip(cell.megatron, parts, strict=True):
                file, offset, length = layout.places[ref]
                info = tensors[ref.name]
                part = as_dtype(part, info.dtype).reshape(torch_dist.chunk_sizes(ref, info.shape))
                blob = torch_dist.serialize(part)
                assert len(blob) == length, f"archive of {ref} has another length than planned"
                yield f"weights/{file}", offset, blob

        return Piece(sum(reader.source_bytes(ref) for ref in cell.hf), work)

    def extra_state() -> Iterable[Write]:
        return [(f"weights/{file}", offset, layout.empty_state) for file, offset, _ in layout.extra.values()]

    context = nemo_context.context_files(*family.nemo_model(config), bf16_config(config))
    others = huggingface.other_files(folder)
    plan = Plan(
        sizes={f"weights/{file}": size for file, size in layout.sizes.items()},
        pieces=[*map(piece, model.cells), Piece(0, extra_state)],
        small={
            **{f"context/{name}": content for name, content in context.items()},
            "weights/metadata.json": torch_dist.FORMAT.encode(),
            "weights/common.pt": torch_dist.common_state(),
            "weights/.metadata": layout.metadata(),
        },
        copies={
            **{f"context/{nemo_context.TOKENIZER}/{file.name}": file for file in others if _is_tokenizer(file)},
            **{f"context/{HF_FILES}/{file.name}": file for file in others},
        },
        identity=["import", mtp, identity_of_files([*reader.files(), folder / "config.json"])],
    )
    return plan, tensors


def _is_tokenizer(file: Path) -> bool:
    return file.name.startswith(TOKENIZER_FILES) or file.name == "config.json"


def open_nemo(checkpoint: Path) -> tuple[dict[str, Any], ModuleType, torch_dist.Reader]:
    """(config.json of the source, family, reader) of a NeMo checkpoint whose tensors are all there.

    The tensors of the optimizer are left aside.
    """
    reader = torch_dist.Reader(checkpoint)
    context = context_folder(reader.folder)
    path = context / nemo_context.SOURCE_CONFIG
    if not path.is_file():
        raise DataError(f"{context} has no {path.name}; give a checkpoint that `slipway import` began")
    config = read_config(path)
    family = family_of(config, path)
    found = {key: info for key, info in reader.tensors.items() if not key.startswith("optimizer.")}
    if found and all("adapter." in key for key in found):
        raise DataError(f"{checkpoint} holds trained heads alone; `slipway extract-heads` reads those")
    rules.check_tensors(found, family.rules(config).megatron, str(reader.folder))
    return config, family, reader


def export_plan(checkpoint: Path, shard_bytes: int) -> Plan:
    """Plan of the Hugging Face folder of a NeMo checkpoint that `import` made or NeMo trained from one."""
    config, family, reader = open_nemo(checkpoint)
    context, model = context_folder(reader.folder), family.rules(config)
    wanted = model.megatron
    layout = huggingface.Layout(model.hf, shard_bytes)

    def piece(cell: rules.Cell) -> Piece:
        def work() -> Iterable[Write]:
            parts = cell.op.to_hf(tuple(reader.read(ref) for ref in cell.megatron))
            for ref, part in zip(cell.hf, parts, strict=True):
                yield (*layout.place(ref), tensor_bytes(as_dtype(part, model.hf[ref.name].dtype)))

        return Piece(sum(TensorInfo(r.shape(wanted[r.name].shape)).bytes for r in cell.megatron), work)

    return _hf_plan(layout, [*map(piece, model.cells)], config, context / HF_FILES, reader.files(), "export")


def context_folder(weights: Path) -> Path:
    """The context folder that goes with a weights folder."""
    return weights.parent / "context"


def merge_plan(heads: Mapping[str, Tensor], heads_config: Mapping[str, Any], base: Path, shard_bytes: int) -> Plan:
    """Plan of one model of base (`llm.*`) and heads, in the form of AutoDeco."""
    config, family, reader = open_model(base)
    if reader.quantized:
        raise DataError(f"{base} is quantised; run `slipway dequant` on it and merge into its output")
    if heads_config["temperature_hidden_size"] != config["hidden_size"]:
        raise DataError(
            f"the heads are for a hidden size of {heads_config['temperature_hidden_size']}, "
            f"{base} has {config['hidden_size']}; take the base they were trained on"
        )
    model = family.rules(config)
    tensors = {f"llm.{name}": reader.tensors[name] for name in model.hf}
    tensors |= {name: TensorInfo(tuple(part.shape), "BF16") for name, part in heads.items()}
    layout = huggingface.Layout(tensors, shard_bytes)
    refs = [ref for cell in model.cells for ref in cell.hf]
    pieces = [_copy_piece(reader, layout, ref, Ref(f"llm.{ref.name}", ref.index, ref.rows)) for ref in refs]
    pieces += [
        Piece(part.nbytes, lambda n=name, p=part: [(*layout.place(Ref(n)), tensor_bytes(p.bfloat16()))])
        for name, part in heads.items()
    ]
    merged = {
        **config,
        **heads_config,
        "base_model_type": config["model_type"],
        "model_type": "autodeco",
        "architectures": ["AutoDecoModelForCausalLM"],
    }
    return _hf_plan(layout, pieces, merged, base, reader.files(), "merge")


def _copy_piece(reader: huggingface.Reader, layout: huggingface.Layout, source: Ref, target: Ref) -> Piece:
    """Read (and decode) one part and put it at its place."""
    return Piece(reader.source_bytes(source), lambda: [(*layout.place(target), tensor_bytes(reader.read(source)))])


def _hf_plan(
    layout: huggingface.Layout,
    pieces: list[Piece],
    config: Mapping[str, Any],
    others: Path,
    sources: Iterable[Path],
    verb: str,
) -> Plan:
    headers = [Piece(0, lambda: [(file, 0, header) for file, header in layout.headers.items()])]
    small = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if (index := layout.index()) is not None:
        small[huggingface.INDEX] = index
    copies = {file.name: file for file in huggingface.other_files(others)} if others.is_dir() else {}
    return Plan(layout.sizes, headers + pieces, small, copies, [verb, identity_of_files(sources)])
