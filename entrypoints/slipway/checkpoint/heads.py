"""Trained decoding heads as files: extract them from a checkpoint, and read them for merging with their base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint import huggingface, stream, torch_dist
from slipway.checkpoint.lora import noted_base
from slipway.checkpoint.nemo_context import SOURCE_CONFIG
from slipway.checkpoint.source import NAME, source_of
from slipway.errors import DataError
from slipway.families import read_config
from slipway.tensors.bits import as_dtype
from slipway.tensors.refs import Ref
from slipway.untrusted import AGAIN

FILE = "heads.safetensors"
NAMES = [
    f"{head}.mlp.{layer}.{kind}"
    for head in ("temp_head", "top_p_head")
    for layer in (0, 2)
    for kind in ("weight", "bias")
]
ADAPTER = "adapter."  # before their names in a checkpoint
MODEL_TYPE, ARCHITECTURE = "autodeco", "AutoDecoModelForCausalLM"
FEATURES = 4  # of the distribution, which the top-p head may take besides hidden state and temperature


def extract_plan(checkpoint: Path) -> tuple[stream.Plan, dict[str, Any]]:
    """(plan of a folder with the heads of a training checkpoint, number of tensors and parameters).

    Only the eight tensors are read. Errors: DataError if the checkpoint has no heads.
    """
    reader = torch_dist.Reader(checkpoint)
    if missing := [name for name in NAMES if ADAPTER + name not in reader.tensors]:
        raise DataError(
            f"{checkpoint} holds no trained heads ({ADAPTER}{missing[0]} is missing); "
            "give a checkpoint that `slipway train --mode heads` saved"
        )
    heads = {name: reader.read(Ref(ADAPTER + name)) for name in NAMES}
    content = huggingface.one_file({n: (part, reader.tensors[ADAPTER + n].dtype) for n, part in heads.items()})
    base, name = _base_of(reader.folder)
    config = merged_config(base, config_of(heads, name)) if base else config_of(heads, name)
    files = {FILE: content, "config.json": (json.dumps(config, indent=2) + "\n").encode()}
    plan = stream.Plan({}, [], files, {}, ["extract-heads"], reads=[checkpoint])
    return plan, {"tensors": len(heads), "parameters": sum(part.size for part in heads.values())}


def config_of(heads: dict[str, Any], base: str) -> dict[str, Any]:
    """The fields of an AutoDeco config.json that the heads decide.

    Args:
        base: what AutoDeco's class loads the base by.
    """
    hidden_size = heads["temp_head.mlp.0.weight"].shape[1]
    extra = heads["top_p_head.mlp.0.weight"].shape[1] - hidden_size - 1
    if extra not in (0, FEATURES):
        raise DataError(
            f"the top-p head takes {extra} features besides hidden state and temperature, expected 0 or {FEATURES}; "
            "train or extract the heads again"
        )
    return {
        "enable_temperature_head": True,
        "enable_top_p_head": True,
        "use_enhanced_features": extra == FEATURES,
        "base_model_name_or_path": base,
        "hidden_size": hidden_size,
        "temperature_hidden_size": hidden_size,
        "top_p_hidden_size": hidden_size,
    }


def merged_config(base: Mapping[str, Any], heads: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model with heads, in AutoDeco's form: its class and its merge script want the base's fields too.

    Args:
        base: config.json of the base.
        heads: the fields that the heads decide.
    """
    about = {"base_model_type": base["model_type"], "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    return {**base, **heads, **about}


def _base_of(weights: Path) -> tuple[dict[str, Any], str]:
    """(config.json of the base, what AutoDeco's class loads the base by) of a checkpoint of heads.

    The config is {} if the base was not made by `import`; its checkpoint is the name then, or "".
    """
    note = weights / "adapter_metadata.json"
    checkpoint = str(noted_base(note)) if note.is_file() else ""
    # Training carries hf_config.json over to its own checkpoints. Older ones have it, but not the name in it.
    contexts = [weights.parent / "context", *([Path(checkpoint) / "context"] if checkpoint else [])]
    files = [file for context in contexts if (file := context / SOURCE_CONFIG).is_file()]
    config = read_config(files[0]) if files else {}
    config.pop(NAME, None)
    if files and not isinstance(config.get("model_type"), str):
        raise DataError(f"{files[0]} has no model_type; {AGAIN}")
    return config, next(filter(None, map(source_of, contexts)), checkpoint)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name → tensor in BF16, config fields) of a folder that `extract-heads` wrote; DataError for any other folder."""
    if not (folder / FILE).is_file():
        raise DataError(f"{folder} has no {FILE}; give a folder that `slipway extract-heads` wrote")
    stored = huggingface.Reader(folder, huggingface.read_header(folder / FILE), {})
    if set(stored.tensors) != set(NAMES):
        odd = sorted(set(stored.tensors) ^ set(NAMES))[0]
        raise DataError(f"{folder / FILE}: tensor {odd} is missing or unexpected; extract the heads again")
    tensors = {name: as_dtype(stored.read(Ref(name)), stored.tensors[name].dtype, "BF16") for name in NAMES}
    base = read_config(folder / "config.json").get("base_model_name_or_path", "")
    return tensors, config_of(tensors, base)


def check_base(folder: Path, config: Mapping[str, Any], base: Path) -> None:
    """DataError if what the heads' config.json tells of the base that they were trained on is not true of this one.

    Args:
        config: the base's config.json. A vocabulary of another size does no harm: the heads read hidden states.
    """
    trained_on = read_config(folder / "config.json")
    for name, field in (("base_model_type", "model_type"), ("num_hidden_layers", "num_hidden_layers")):
        if name in trained_on and trained_on[name] != config[field]:
            raise DataError(
                f"the heads in {folder} were trained on a model with {field} {trained_on[name]!r}, but {base} has "
                f"{config[field]!r}; give the base that the heads were trained on"
            )
