"""Which modules get an adapter: Megatron's names, and what Hugging Face and peft call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipway.errors import UsageError
from slipway.families import by_model_type
from slipway.families.checks import EXPERTS
from slipway.families.mtp import MTP
from slipway.options import suggestion
from slipway.training.memory import ALL

__all__ = ["ALL", "EVERY", "modules_of", "resolved"]

# Hugging Face's modules and the one of Megatron's that holds them. Several of them in one share its adapter.
OF_HUGGING_FACE = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "qkv_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "gate_up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
    "q_a_proj": "linear_q_down_proj",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_b_proj": "linear_kv_up_proj",
}
EVERY = tuple(dict.fromkeys([*OF_HUGGING_FACE.values(), "linear_q_proj"]))  # of all families
SEPARATE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # those that Hugging Face has as modules of their own


def modules_of(c: Mapping[str, Any]) -> list[str]:
    """Megatron's linear modules in a layer of the model with this config.json, in order."""
    few = {**c, "num_hidden_layers": c.get("first_k_dense_replace", 0) + 1, MTP: 0}
    few |= {key: 2 for key in EXPERTS if key in c}
    if "layer_types" in c:
        few["layer_types"] = c["layer_types"][: few["num_hidden_layers"]]
    keys = by_model_type()[c["model_type"]].rules(few).megatron
    names = (key.split(".")[-2] for key in keys if key.endswith(".weight"))
    return list(dict.fromkeys(name for name in names if name.startswith("linear_")))


def resolved(words: str, c: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(Megatron's modules with commas between, notes) of what a person wrote.

    Args:
        words: names with commas between, of Megatron, Hugging Face or peft; `all-linear` is every linear layer.

    Errors: UsageError for a name that this model has no module for.
    """
    there = modules_of(c)
    found: list[str] = []
    notes = []
    for word in (part.strip() for part in words.split(",")):
        if word == ALL:
            found += there
            continue
        # Where queries are not compressed, q_proj is a module of its own.
        name = "linear_q_proj" if word == "q_proj" and "linear_q_proj" in there else OF_HUGGING_FACE.get(word, word)
        if name not in there:
            known = [*there, *(other for other, module in OF_HUGGING_FACE.items() if module in there), ALL]
            raise UsageError(
                f"--lora-targets {words}: the model has no module {word!r}{suggestion(word, known)}; it has "
                f"{', '.join(there)}, or {ALL}"
            )
        found.append(name)
    chosen = list(dict.fromkeys(found))
    asked = {part.strip() for part in words.split(",")}
    for name in chosen:
        parts = [other for other, module in OF_HUGGING_FACE.items() if module == name and other in SEPARATE]
        if asked & set(parts) and not asked >= set(parts):
            missing = ", ".join(part for part in parts if part not in asked)
            notes.append(f"{name} also holds {missing}, so the adapter of {name} is for these too")
    return ",".join(chosen), notes
