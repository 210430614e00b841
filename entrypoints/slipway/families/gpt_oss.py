"""gpt-oss (20b, 120b): mixture of experts with sinks, sliding windows on every other layer, biases everywhere.

Facts: Hugging Face's BF16 form stores the experts' matrices as [experts, in, out]. Columns of gate and up alternate in
it. Megatron stores [out, in], with gate before up. `down_proj` is square in the real models, so no shape shows a
missing transpose there, only a forward pass does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families import checks, decoder, rope
from slipway.families.checks import Config
from slipway.families.described import Described, decoder_config
from slipway.families.fields import NO_EFFECT, USED, Field, each, only
from slipway.families.quantized import Mxfp4
from slipway.families.rules import AlternatingRows, Cell, Rules, Scope, Transposed
from slipway.tensors.refs import Ref

NAME = "gpt_oss"
MODEL_TYPES = ("gpt_oss",)
REQUIRED = {
    **decoder.REQUIRED,
    "head_dim": int,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "sliding_window": int,
    "layer_types": list,
}
ALIASES = {"num_experts": "num_local_experts"}
KINDS_OF_LAYERS = ("sliding_attention", "full_attention")
FIELDS = {
    **decoder.FIELDS,
    **each(USED, "num_local_experts num_experts_per_tok sliding_window layer_types swiglu_limit"),
    **each(Field("used in training"), "router_aux_loss_coef"),
    **each(NO_EFFECT, "output_router_logits initial_context_length"),
    "num_experts": Field("used: num_local_experts"),
    "experts_per_token": Field("must be num_experts_per_tok"),
    "attention_bias": only(True),
    "swiglu_alpha": only(1.702),
}
QUANTIZED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FORM = Mxfp4()


def defaults(c: Config) -> Config:
    """What transformers assumes; the kinds of layers take turns, beginning with a window."""
    layers = c.get("num_hidden_layers")
    turns = [KINDS_OF_LAYERS[number % 2] for number in range(layers)] if type(layers) is int and layers < 1000 else None
    known = {"rope_theta": 150000.0, "rms_norm_eps": 1e-5, "head_dim": 64}
    return {**known, "layer_types": turns, "swiglu_limit": 7.0, "sliding_window": 128}


def check(c: Config, where: Path) -> None:
    """DataError for fields that do not fit together."""
    checks.check_heads(c, where)
    if len(c["layer_types"]) != c["num_hidden_layers"]:
        raise DataError(f"{where}: layer_types has {len(c['layer_types'])} entries for {c['num_hidden_layers']} layers")
    for kind in c["layer_types"]:
        if kind not in KINDS_OF_LAYERS:
            raise DataError(f"{where}: layer_types has {kind!r}; supported are {', '.join(KINDS_OF_LAYERS)}")
    if c.get("experts_per_token", c["num_experts_per_tok"]) != c["num_experts_per_tok"]:
        raise DataError(
            f"{where}: experts_per_token is {c['experts_per_token']}, but num_experts_per_tok is "
            f"{c['num_experts_per_tok']}; they must be the same: delete the wrong one"
        )
    if c["num_experts_per_tok"] > c["num_local_experts"]:
        raise DataError(f"{where}: num_experts_per_tok is larger than num_local_experts")
    limit = c["swiglu_limit"]
    if type(limit) not in (int, float) or not 0 < limit < checks.LARGEST_FACTOR:
        raise DataError(f"{where}: field swiglu_limit is {limit!r}; it must be a number larger than 0")
    rope.check(c, where, "yarn", "linear")
    if (scaling := c.get("rope_scaling")) and scaling.get("attention_factor") is not None:
        raise DataError(
            f"{where}: field rope_scaling.attention_factor is {scaling['attention_factor']}; for gpt_oss only the "
            "value that factor gives is supported, without this field"
        )


def rules(c: Config) -> Rules:
    """How every Hugging Face tensor becomes Megatron's."""
    h, e = c["hidden_size"], c["num_local_experts"]
    model = Scope(Rules())
    decoder.embeddings(model, c)
    for layer in decoder.stacked_layers(model, c):
        decoder.attention(layer, c, qkv_bias=True, proj_bias=True)
        layer.same("self_attn.sinks", "self_attention.core_attention.softmax_offset", c["num_attention_heads"])
        layer.state("self_attention.core_attention")
        decoder.norm_before_experts(layer, c)
        layer.same("mlp.router.weight", "mlp.router.weight", e, h)
        layer.same("mlp.router.bias", "mlp.router.bias", e)
        _experts(layer.within("mlp.experts.", "mlp.experts.experts."), h, c["intermediate_size"], e)
    return model.rules


def _experts(module: Scope, h: int, f: int, count: int) -> None:
    """All experts of a layer; Hugging Face stacks them too, as Megatron does."""
    gate_up, down = module.source("gate_up_proj", count, h, 2 * f), module.source("down_proj", count, f, h)
    gate_up_bias = module.source("gate_up_proj_bias", count, 2 * f)
    down_bias = module.source("down_proj_bias", count, h)
    for number in range(count):
        expert, at = module.stacked("", "", number, count), (number,)
        fc1, fc1_bias = expert.target("linear_fc1.weight", 2 * f, h), expert.target("linear_fc1.bias", 2 * f)
        fc2, fc2_bias = expert.target("linear_fc2.weight", h, f), expert.target("linear_fc2.bias", h)
        module.rules.cells += [
            Cell((replace(gate_up, index=at),), _halves(fc1, f), Transposed(AlternatingRows())),
            Cell((replace(gate_up_bias, index=at),), _halves(fc1_bias, f), AlternatingRows()),
            Cell((replace(down, index=at),), (fc2,), Transposed()),
            Cell((replace(down_bias, index=at),), (fc2_bias,)),
        ]
        expert.state("linear_fc1", "linear_fc2")


def _halves(fc1: Ref, f: int) -> tuple[Ref, Ref]:
    """Gate and up, f rows each, in linear_fc1."""
    return replace(fc1, rows=(0, f)), replace(fc1, rows=(f, 2 * f))


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module = "nemo.collections.llm.gpt.model.gpt_oss"
    sliding = [int(kind == "sliding_attention") for kind in c["layer_types"]]
    return (
        f"{module}:GPTOSSModel",
        f"{module}:GPTOSSConfig",
        {
            **decoder.nemo_fields(c),
            "moe_ffn_hidden_size": c["intermediate_size"],
            "num_moe_experts": c["num_local_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "activation_func_clamp_value": float(c["swiglu_limit"]),
            **_positions(c),
            "window_size": (c["sliding_window"] - 1, 0),  # Hugging Face counts the token itself, NeMo does not
            "window_attn_skip_freq": sliding,
            # The class's own values need kernels that Triton 3.6, or a machine without a GPU, does not have.
            "bias_activation_fusion": False,
            "moe_permute_fusion": False,
        },
    )


def _positions(c: Config) -> dict[str, Any]:
    """Rotary positions: NeMo's class has YaRN, and computes plain ones where it is told to."""
    scaling = c.get("rope_scaling")
    if scaling and scaling["rope_type"] == "yarn":
        return rope.yarn_fields(c)
    return {"position_embedding_type": "rope", **(rope.linear_fields(c) if scaling else {})}


MEGATRON: dict[str, Any] = {
    "add_bias_linear": True,
    "softmax_type": "learnable",
    "glu_linear_offset": 1.0,
    "activation_func": "quick_gelu",
    "add_qkv_bias": False,
}


def hf_config(f: Described) -> dict[str, Any]:
    """config.json from Megatron's fields."""
    layers, window = f["num_layers"], f["window_size"][0]
    skip = f.get("window_attn_skip_freq", 2)
    # A number n: every layer but each n-th has a window, counted from 1. A list: 1 for a layer with a window.
    sliding = skip if isinstance(skip, list) else [int((layer + 1) % skip != 0) for layer in range(layers)]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **decoder_config(f),
        "attention_bias": True,
        "num_local_experts": f["num_moe_experts"],
        "num_experts_per_tok": f["moe_router_topk"],
        "intermediate_size": f.get("moe_ffn_hidden_size") or f["ffn_hidden_size"],
        "layer_types": [KINDS_OF_LAYERS[0] if one else KINDS_OF_LAYERS[1] for one in sliding],
        # NeMo's and Megatron-Bridge's classes have 128, where Hugging Face counts the token itself: it has 128 too.
        "sliding_window": window if window == 128 else window + 1,
        "swiglu_limit": f["activation_func_clamp_value"],
        "rope_scaling": rope.scaling_of(f),
        "router_aux_loss_coef": f.get("moe_aux_loss_coeff", 0.0),
    }


def tiny_config() -> dict[str, Any]:
    """A model of the same kind with about 130,000 parameters; down_proj is not square."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "experts_per_token": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initial_context_length": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 64,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 16,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 512,
    }
