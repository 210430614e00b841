"""`slipway extract-heads` and `slipway merge-heads`: the trained heads alone, and on their base."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from entrypoints.errors import DataError
from entrypoints.report import Summary

FILE = "heads.safetensors"
NAMES = [
    f"{head}.mlp.{layer}.{kind}"
    for head in ("temp_head", "top_p_head")
    for layer in (0, 2)
    for kind in ("weight", "bias")
]
ADAPTER = "adapter."
FEATURES = 4


def extract_heads(ckpt: str, out: str) -> Summary:
    """Write the trained heads of a checkpoint, reading nothing but their eight tensors.

    Args:
        ckpt: NeMo checkpoint of heads training.
        out: folder to write: heads.safetensors and config.json.
    """
    from entrypoints.checkpoint import huggingface, locate, stream, torch_dist
    from entrypoints.checkpoint.refs import Ref

    started, target = time.monotonic(), locate.output(out)
    stream.refuse_existing(target)
    reader = torch_dist.Reader(locate.nemo_folder(ckpt))
    if missing := [name for name in NAMES if ADAPTER + name not in reader.tensors]:
        raise DataError(
            f"{ckpt} holds no trained heads ({ADAPTER}{missing[0]} is missing); give one of `train --mode heads`"
        )
    heads = {name: reader.read(Ref(ADAPTER + name)) for name in NAMES}
    content = huggingface.one_file({n: (part, reader.tensors[ADAPTER + n].dtype) for n, part in heads.items()})
    config = (json.dumps(heads_config(heads, _base_of(reader.folder)), indent=2) + "\n").encode()
    plan = stream.Plan({}, [], {FILE: content, "config.json": config}, {}, ["extract-heads", str(reader.folder)])
    stream.run(plan, target, "extract-heads", 1)
    details = {"tensors": len(heads), "parameters": sum(part.size for part in heads.values())}
    return Summary("extract-heads", str(target), plan.bytes, time.monotonic() - started, details)


def heads_config(heads: dict[str, Any], base: str) -> dict[str, Any]:
    """The fields of an AutoDeco config.json that the heads decide."""
    hidden_size = heads["temp_head.mlp.0.weight"].shape[1]
    extra = heads["top_p_head.mlp.0.weight"].shape[1] - hidden_size - 1
    if extra not in (0, FEATURES):
        raise DataError(f"the top-p head takes {extra} features beside hidden state and temperature; known are 0 and 4")
    return {
        "enable_temperature_head": True,
        "enable_top_p_head": True,
        "use_enhanced_features": extra == FEATURES,
        "base_model_name_or_path": base,
        "temperature_hidden_size": hidden_size,
        "top_p_hidden_size": hidden_size,
    }


def _base_of(weights: Path) -> str:
    """The base model's name, as NeMo noted its path beside the heads."""
    note = weights / "adapter_metadata.json"
    return Path(json.loads(note.read_text())["model_ckpt_path"]).name if note.is_file() else ""


def merge_heads(heads: str, base: str, out: str, *, shard_size: str = "5GB", memory: str = "1GB") -> Summary:
    """Join extracted heads and their Hugging Face base into one model, streamed.

    Args:
        heads: folder that `extract-heads` wrote.
        base: folder of the base model in BF16, or hf://org/name[@revision].
        out: folder to write.
        shard_size: most bytes in one safetensors file.
        memory: bytes that tensors at work may take.
    """
    from entrypoints.checkpoint import convert, locate, stream

    started, target = time.monotonic(), locate.output(out)
    limit, budget = stream.parse_size(shard_size, "--shard-size"), stream.parse_size(memory, "--memory")
    stream.refuse_existing(target)
    tensors, config = read_heads(stream.existing_folder(heads))
    plan = convert.merge_plan(tensors, config, locate.folder(base), limit)
    stream.run(plan, target, "merge-heads", budget)
    return Summary("merge-heads", str(target), plan.bytes, time.monotonic() - started, {"files": len(plan.sizes)})


def read_heads(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name → tensor in BF16, config fields) of a folder that `extract-heads` wrote; DataError for any other."""
    from entrypoints.checkpoint.bits import as_dtype
    from entrypoints.checkpoint.huggingface import Reader, read_header
    from entrypoints.checkpoint.refs import Ref
    from entrypoints.families import read_config

    if not (folder / FILE).is_file():
        raise DataError(f"{folder} has no {FILE}; give a folder that `slipway extract-heads` wrote")
    stored = Reader(folder, read_header(folder / FILE), {})
    if set(stored.tensors) != set(NAMES):
        odd = sorted(set(stored.tensors) ^ set(NAMES))[0]
        raise DataError(f"{folder / FILE}: {odd} is missing or surplus; extract the heads again")
    tensors = {name: as_dtype(stored.read(Ref(name)), stored.tensors[name].dtype, "BF16") for name in NAMES}
    base = read_config(folder / "config.json").get("base_model_name_or_path", "")
    return tensors, heads_config(tensors, base)
