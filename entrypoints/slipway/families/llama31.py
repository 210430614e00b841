"""Llama 2, 3, 3.1, 3.2 and 3.3, Nemotron-Nano and others of `model_type` llama: dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.families import checks, decoder, rope
from slipway.families.checks import Config
from slipway.families.described import Described, decoder_config
from slipway.families.fields import NO_EFFECT, each, only
from slipway.families.quantized import CompressedTensors
from slipway.families.rules import Rules

NAME = "llama31"
MODEL_TYPES = ("llama",)
REQUIRED = decoder.REQUIRED
ALIASES: dict[str, str] = {}
FIELDS = {
    **decoder.FIELDS,
    **each(NO_EFFECT, "pretraining_tp"),
    **each(only(False), "attention_bias mlp_bias"),
}
QUANTIZED = decoder.PROJECTIONS
FORM = CompressedTensors()


def defaults(c: Config) -> Config:
    """What transformers assumes: Llama 2 has neither rope_theta nor, in its small models, num_key_value_heads."""
    heads = c.get("num_attention_heads")
    return {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def check(c: Config, where: Path) -> None:
    """DataError for fields that do not fit together."""
    checks.check_heads(c, where)
    rope.check(c, where, "llama3", "linear", "yarn")


def rules(c: Config) -> Rules:
    """How every Hugging Face tensor becomes Megatron's."""
    return decoder.dense_rules(c)


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module, fields = "nemo.collections.llm.gpt.model.llama", decoder.nemo_fields(c)
    scaling = c.get("rope_scaling")
    if scaling and scaling["rope_type"] == "llama3":
        fields |= {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
        return f"{module}:LlamaModel", f"{module}:Llama31Config", fields
    return f"{module}:LlamaModel", *rope.scaled(c, f"{module}:Llama3Config", fields, plain={})


MEGATRON: dict[str, Any] = {}


def hf_config(f: Described) -> dict[str, Any]:
    """config.json from Megatron's fields."""
    scaling = rope.scaling_of(f)
    if f.get("scale_factor"):
        scaling = {
            "rope_type": "llama3",
            "factor": float(f["scale_factor"]),
            "low_freq_factor": float(f["low_freq_factor"]),
            "high_freq_factor": float(f["high_freq_factor"]),
            "original_max_position_embeddings": f["old_context_len"],
        }
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {**kind, **decoder_config(f), "attention_bias": False, "mlp_bias": False, "rope_scaling": scaling}


def tiny_config() -> dict[str, Any]:
    """A model of the same kind with about 120,000 parameters."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 512,
    }
