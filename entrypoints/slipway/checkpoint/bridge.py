"""The plan of a Megatron-Bridge checkpoint: torch_dist without NeMo's prefix, `run_config.yaml`, and the trackers.

Bridge's model providers have the fields of NeMo's configurations, and one class each for them. The weights are the
same, key by key; `checkpoint.pretrained_checkpoint` takes the folder, and so does AutoBridge.load_megatron_model.

Source: Megatron-Bridge v0.2.2 (training/checkpointing.py, training/state.py, utils/instantiate_utils.py).
"""

from __future__ import annotations

import re
from typing import Any

from slipway.checkpoint import torch_files
from slipway.checkpoint.described import BRIDGE
from slipway.checkpoint.opened import Opened
from slipway.checkpoint.outputs import Details, as_json, bf16_config, said_of, torch_dist_weights
from slipway.checkpoint.stream import Plan
from slipway.checkpoint.torch_dist import TRACKER
from slipway.errors import DataError
from slipway.families.decoder import Symbol
from slipway.tensors.refs import TensorInfo

ITERATION = "iter_0000000"
MODELS = "megatron.bridge.models."
# NeMo's configuration class, without its module → Bridge's.
PROVIDERS = {
    "Llama3Config": f"{MODELS}llama.llama_provider.Llama3ModelProvider",
    "Llama31Config": f"{MODELS}llama.llama_provider.Llama31ModelProvider",
    "Qwen2Config": f"{MODELS}qwen.qwen_provider.Qwen2ModelProvider",
    "Qwen3Config": f"{MODELS}qwen.qwen_provider.Qwen3ModelProvider",
    "Qwen3MoEConfig": f"{MODELS}qwen.qwen_provider.Qwen3MoEModelProvider",
    "GPTOSSConfig": f"{MODELS}gpt_oss.gpt_oss_provider.GPTOSSProvider",
    "DeepSeekV3Config": f"{MODELS}deepseek.deepseek_provider.DeepSeekV3ModelProvider",
}
# How far a run has come: nothing is trained yet. dtype → the fields of it.
STATE = {
    "I32": ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"),
    "F32": ("floating_point_operations_so_far",),
    "BOOL": ("do_train", "do_valid", "do_test"),
}


def plan(opened: Opened, identity: list[Any]) -> tuple[Plan, Details]:
    """(plan of the checkpoint, what the summary says)."""
    weights = torch_dist_weights(opened, ITERATION, "")
    others = opened.companions
    # All of them, not the tokenizer's alone: Bridge passes over the others, and `export` finds them again.
    tokenizer = others.under(f"{ITERATION}/tokenizer")
    config = as_json(bf16_config(opened.config))
    state = _train_state()
    small = {
        **weights.small,
        **tokenizer.small,
        f"{ITERATION}/tokenizer/config.json": config,
        f"{ITERATION}/{BRIDGE}": run_config(opened),
        f"{ITERATION}/train_state.pt": state,
        "latest_train_state.pt": state,
        TRACKER: b"0",
    }
    whole = Plan(weights.sizes, weights.pieces, small, tokenizer.copies, identity)
    return whole, {"tensors": len(opened.model.megatron)} | said_of(opened.notes, others)


def run_config(opened: Opened) -> bytes:
    """run_config.yaml: JSON, which is YAML too."""
    _, name, fields = opened.family.nemo_model(opened.config)
    provider = PROVIDERS.get(name.rpartition(":")[2])
    if provider is None:
        raise DataError(f"Megatron-Bridge has no provider for {name.rpartition(':')[2]}; use --format nemo")
    bf16 = {"_target_": "torch.bfloat16", "_call_": False}
    model = {"_target_": provider, **{name: _value(value) for name, value in fields.items()}}
    model |= {"bf16": True, "params_dtype": bf16, "pipeline_dtype": bf16}
    saved = {"save_optim": False, "save_rng": False, "fully_parallel_save": True, "ckpt_format": "torch_dist"}
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tokenizer"}
    text = as_json({"model": model, "checkpoint": saved, "tokenizer": tokenizer}).decode()
    # YAML 1.1 takes 1e-05 for a text: it wants a point.
    return re.sub(r"(?m)^(.*: -?\d+)(e[-+]\d+,?)$", r"\1.0\2", text).encode()


def _value(value: Any) -> Any:
    if isinstance(value, Symbol):
        return {"_target_": value.target.replace(":", "."), "_call_": False}
    return list(value) if isinstance(value, tuple) else value


def _train_state() -> bytes:
    """The file in which a run notes how far it has come."""
    return torch_files.of_zeros({name: TensorInfo((), dtype) for dtype, names in STATE.items() for name in names})
