"""Qwen 3, dense (0.6b to 32b) and mixture of experts (30b_a3b, 235b_a22b): norms on every query and key head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families import checks, decoder, rope
from slipway.families.checks import Config, Kinds
from slipway.families.described import Described, decoder_config
from slipway.families.fields import NO_EFFECT, USED, Field, each, only
from slipway.families.quantized import Fp8
from slipway.families.rules import Rules, Scope

NAME = "qwen3"
MODEL_TYPES = ("qwen3", "qwen3_moe")
REQUIRED = {**decoder.REQUIRED, "head_dim": int}
ALIASES = {"num_local_experts": "num_experts"}  # transformers 5 saves it so
OF_EXPERTS: Kinds = {"num_experts": int, "num_experts_per_tok": int, "moe_intermediate_size": int}
FIELDS = {
    **decoder.FIELDS,
    **decoder.NO_SLIDING,
    **each(only(False), "attention_bias"),
    **each(USED, "norm_topk_prob"),
    **each(Field("used in training"), "router_aux_loss_coef"),
    **each(NO_EFFECT, "output_router_logits"),
    **each(USED, " ".join(OF_EXPERTS)),
    "num_local_experts": Field("used: num_experts"),
    "decoder_sparse_step": only(1),
    "mlp_only_layers": only([], None),
}
QUANTIZED = decoder.PROJECTIONS
FORM = Fp8(block=(32, 48))  # small, for tiny models


def is_moe(c: Config) -> bool:
    return c["model_type"] == "qwen3_moe"


def defaults(c: Config) -> Config:
    """What transformers assumes."""
    known = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    if not is_moe(c):
        return {**known, "head_dim": 128}
    hidden, heads = c.get("hidden_size"), c.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return {**known, "head_dim": hidden // heads}
    return known


def check(c: Config, where: Path) -> None:
    """DataError for fields that do not fit together."""
    checks.check_heads(c, where)
    decoder.check_no_sliding(c, where)
    rope.check(c, where, "yarn", "linear")
    if is_moe(c):
        checks.check_required(c, where, OF_EXPERTS)
        if c["num_experts_per_tok"] > c["num_experts"]:
            raise DataError(f"{where}: num_experts_per_tok is larger than num_experts")


def rules(c: Config) -> Rules:
    """How every Hugging Face tensor becomes Megatron's."""
    if not is_moe(c):
        return decoder.dense_rules(c, qk_norm=True)
    model = Scope(Rules())
    decoder.embeddings(model, c)
    for layer in decoder.stacked_layers(model, c):
        decoder.attention(layer, c, qk_norm=True)
        decoder.norm_before_experts(layer, c)
        decoder.experts(layer, c["hidden_size"], c["moe_intermediate_size"], c["num_experts"])
    return model.rules


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module, fields = "nemo.collections.llm.gpt.model.qwen3", decoder.nemo_fields(c)
    plain: dict[str, Any] = {"qk_layernorm": True}
    if is_moe(c):
        plain |= {"moe_router_load_balancing_type": "aux_loss", "moe_grouped_gemm": True}
        fields |= {
            "moe_ffn_hidden_size": c["moe_intermediate_size"],
            "num_moe_experts": c["num_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            # With normalised weights the softmax is over the chosen experts only, else over all experts.
            "moe_router_pre_softmax": not c.get("norm_topk_prob", False),
            "moe_aux_loss_coeff": c.get("router_aux_loss_coef", 1e-3),
            "moe_permute_fusion": False,  # its kernel needs another Triton than 3.6
        }
    config_class = f"{module}:{'Qwen3MoEConfig' if is_moe(c) else 'Qwen3Config'}"
    return f"{module}:Qwen3Model", *rope.scaled(c, config_class, fields, plain)


MEGATRON: dict[str, Any] = {"qk_layernorm": True}


def hf_config(f: Described) -> dict[str, Any]:
    """config.json from Megatron's fields."""
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    config = {**decoder_config(f), "attention_bias": False, "rope_scaling": rope.scaling_of(f)}
    if f.get("num_moe_experts") is None:
        return {**kind, **config}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **config,
        "num_experts": f["num_moe_experts"],
        "num_experts_per_tok": f["moe_router_topk"],
        "moe_intermediate_size": f.get("moe_ffn_hidden_size") or f["ffn_hidden_size"],
        "norm_topk_prob": not f.get("moe_router_pre_softmax", False),
        "router_aux_loss_coef": f.get("moe_aux_loss_coeff", 0.0),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tiny_config() -> dict[str, Any]:
    """A mixture of experts of the same kind with about 160,000 parameters."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "max_position_embeddings": 2048,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 512,
    }
