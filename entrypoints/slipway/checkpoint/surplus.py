"""Tensors that a model's files have and its weights do not need, and those that are arranged in another way.

Scales for what is quantised at inference, buffers that are computed anew, layers that config.json switches off: every
other program ignores them. They are left out, and counted in the summary. Everything else surplus stays an error.

Sources of the names: vLLM (model_executor/model_loader/weight_utils.py: maybe_remap_kv_scale_name), compressed-tensors
0.20 (quantization/quant_metadata.py), ModelOpt (torch/export/quant_utils.py), AutoFP8, Quark; transformers'
_keys_to_ignore_on_load_unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from slipway.checkpoint.companions import ADAPTER
from slipway.checkpoint.huggingface import HEAD, Reader
from slipway.errors import DataError
from slipway.families.decoder import is_tied
from slipway.families.mtp import mtp_layers
from slipway.tensors.refs import Ref, TensorInfo

LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Only the layer for multi-token prediction has it: any other layer beyond num_hidden_layers is an error.
MTP_MARK = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")
STACK = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
EMBEDDING = "embed_tokens.weight"
CLASSIFIER = ("score.weight", "classifier.weight", "classification_head.weight")


def settle(reader: Reader, config: Mapping[str, Any]) -> list[str]:
    """Take layers that config.json switches off away from the reader's tensors; what to say of all that is left out.

    Errors: DataError for a model of another task.
    """
    _refuse_classifier(reader, config)
    _refuse_other_names(reader)
    notes = [*reader.notes, *_embedding_from_head(reader, config)]
    if (reader.folder / ADAPTER).is_file():
        notes.append(
            f"left out the adapter of peft beside the model ({ADAPTER}): `import --adapter` takes it, "
            "unless these weights have it merged into them"
        )
    for number, names in sorted(_switched_off(reader.tensors, config).items()):
        for name in names:
            del reader.tensors[name]
        notes.append(
            f"left out layer {number} for multi-token prediction ({len(names)} tensors), "
            "which config.json does not have (num_nextn_predict_layers)"
        )
    return notes


def _embedding_from_head(reader: Reader, config: Mapping[str, Any]) -> list[str]:
    """Take the output layer as the embedding where both are tied and only it is stored; what to say of it.

    Of tensors that share their memory safetensors.torch.save_model stores the one whose name is first in the alphabet.
    transformers 5 loads such a file.
    """
    if not is_tied(config) or HEAD not in reader.tensors or f"model.{EMBEDDING}" in reader.tensors:
        return []
    reader.rename(HEAD, f"model.{EMBEDDING}")
    return [f"{HEAD} is read as the embedding, which is not stored: config.json ties the two"]


def _switched_off(names: Iterable[str], config: Mapping[str, Any]) -> dict[int, list[str]]:
    """Number of a layer for multi-token prediction that config.json does not count → its tensors."""
    names = list(names)
    first = config["num_hidden_layers"] + mtp_layers(config)
    marked = {int(found[1]) for found in map(MTP_MARK.fullmatch, names) if found}
    layers: dict[int, list[str]] = {number: [] for number in marked if number >= first}
    for name in names if layers else ():
        if (found := LAYER.match(name)) and int(found[1]) in layers:
            layers[int(found[1])].append(name)
    return layers


def _refuse_classifier(reader: Reader, config: Mapping[str, Any]) -> None:
    found = next((name for name in CLASSIFIER if name in reader.tensors), None)
    if found and HEAD not in reader.tensors:
        kind = next(iter(config.get("architectures") or ()), "a classifier or reward model")
        raise DataError(
            f"{reader.folder} is a classifier or reward model ({kind}): it has {found} in place of the output layer; "
            "only models that generate text (…ForCausalLM) are supported"
        )


def _refuse_other_names(reader: Reader) -> None:
    """DataError for a model that was saved inside another one, or without its output layer."""
    found = next((name for name in reader.tensors if name.endswith(EMBEDDING)), "")
    prefix = found.removesuffix(EMBEDDING)
    if not found or prefix == "model." or LAYER.match(found) or f"model.{EMBEDDING}" in reader.tensors:
        return
    if not prefix:
        raise DataError(
            f"{reader.folder} has the names of a decoder alone ({found}, without model.), and no output layer; "
            "save the whole model, AutoModelForCausalLM, with transformers"
        )
    if not prefix.startswith("llm."):  # the base of a model merged with heads, which has a message of its own
        raise DataError(
            f"{reader.folder}: the tensors' names begin with {prefix} ({found}), as of a model inside another one; "
            "expected model.: save the inner model with transformers"
        )


def unstack(reader: Reader, wanted: Mapping[str, TensorInfo]) -> None:
    """Replace experts that are stored as a stack by the matrices that the family knows.

    transformers 5 has them in memory as gate_up_proj [experts, gate rows and then up rows, columns] and down_proj
    [experts, rows, columns]. It saves matrices; with save_original_format=False, or where somebody saves the state
    dict itself, it is stacks.

    Args:
        wanted: the tensors of the family's rules.

    Errors: DataError for stacks of another shape.
    """
    for name in [name for name in reader.tensors if name not in wanted and STACK.fullmatch(name)]:
        module, part = STACK.fullmatch(name).groups()  # type: ignore[union-attr]  # it matched in the line above
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        experts = _experts(module, parts, wanted)
        if not experts:
            continue  # the family has no such experts: an unexpected tensor
        info = next(iter(experts[0].values()))
        shape, rows = (len(experts), info.shape[0] * len(parts), info.shape[1]), info.shape[0]
        if reader.tensors[name].shape != shape:
            raise DataError(
                f"{reader.folder}: {name} holds all experts in one tensor {list(reader.tensors[name].shape)}; "
                f"expected {list(shape)}, or a matrix for each expert ({next(iter(experts[0]))})"
            )
        views = {
            matrix: Ref(name, (number,), (place * rows, (place + 1) * rows))
            for number, expert in enumerate(experts)
            for place, matrix in enumerate(expert)
        }
        reader.split(name, views)


def _experts(module: str, parts: tuple[str, ...], wanted: Mapping[str, TensorInfo]) -> list[dict[str, TensorInfo]]:
    """The matrices of each expert of a module, as the family knows them."""
    found: list[dict[str, TensorInfo]] = []
    while f"{module}.{len(found)}.{parts[0]}.weight" in wanted:
        names = [f"{module}.{len(found)}.{part}.weight" for part in parts]
        found.append({name: wanted[name] for name in names})
    return found
