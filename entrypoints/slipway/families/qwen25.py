"""Qwen 2 and 2.5: dense, with biases on q, k and v; the small ones tie the output layer to the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.families import checks, decoder, rope
from slipway.families.checks import Config
from slipway.families.described import Described, decoder_config
from slipway.families.fields import Field, only
from slipway.families.quantized import CompressedTensors
from slipway.families.rules import Rules

NAME = "qwen25"
MODEL_TYPES = ("qwen2",)
REQUIRED = decoder.REQUIRED
ALIASES: dict[str, str] = {}
FIELDS = {
    **decoder.FIELDS,
    **decoder.NO_SLIDING,
    "attention_bias": Field("always there on q, k and v", (True, False)),
    "use_mrope": only(False),
    "dual_chunk_attention_config": Field("no effect: transformers ignores it too (Qwen2.5-1M)"),
}
QUANTIZED = decoder.PROJECTIONS
FORM = CompressedTensors()


def defaults(c: Config) -> Config:
    """What transformers assumes."""
    return {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def check(c: Config, where: Path) -> None:
    """DataError for fields that do not fit together."""
    checks.check_heads(c, where)
    decoder.check_no_sliding(c, where)
    rope.check(c, where, "yarn", "linear")


def rules(c: Config) -> Rules:
    """How every Hugging Face tensor becomes Megatron's."""
    return decoder.dense_rules(c, qkv_bias=True)


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module, fields = "nemo.collections.llm.gpt.model.qwen2", decoder.nemo_fields(c)
    return f"{module}:Qwen2Model", *rope.scaled(c, f"{module}:Qwen2Config", fields, plain={"add_qkv_bias": True})


MEGATRON: dict[str, Any] = {"add_qkv_bias": True}


def hf_config(f: Described) -> dict[str, Any]:
    """config.json from Megatron's fields."""
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {**kind, **decoder_config(f), "rope_scaling": rope.scaling_of(f)}


def tiny_config() -> dict[str, Any]:
    """A tied model of the same kind with about 90,000 parameters."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "max_position_embeddings": 2048,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 512,
    }
