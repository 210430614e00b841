"""gpt-oss (20b, 120b): mixture of experts with sinks, sliding windows on every other layer, biases everywhere.

Facts: Hugging Face's BF16 form stores the experts' matrices as [experts, in, out], the rows (there: columns) of
gate and up in turn; Megatron stores [out, in] with gate before up. `down_proj` is square in the real models, so a
transpose forgotten there shows in no shape, only in a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrypoints.checkpoint.refs import Ref, TensorInfo
from entrypoints.errors import DataError
from entrypoints.families.rules import AlternatingRows, Cell, GroupedQKV, Transposed, same

MODEL_TYPE = "gpt_oss"
REQUIRED = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "vocab_size": int,
    "rms_norm_eps": float,
    "rope_theta": (int, float),
    "sliding_window": int,
    "layer_types": list,
    "rope_scaling": dict,
}
# The matrices that the published checkpoints hold in MXFP4.
QUANTIZED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

Config = dict[str, Any]


def check(c: Config, where: Path) -> None:
    """DataError for what the fields cannot be together."""
    if c["num_attention_heads"] % c["num_key_value_heads"]:
        raise DataError(f"{where}: num_attention_heads is no multiple of num_key_value_heads")
    if len(c["layer_types"]) != c["num_hidden_layers"]:
        raise DataError(f"{where}: layer_types has {len(c['layer_types'])} entries for {c['num_hidden_layers']} layers")
    for field in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        if not isinstance(c["rope_scaling"].get(field), (int, float)):
            raise DataError(f"{where}: field rope_scaling.{field} is missing or no number")


def hf_tensors(c: Config) -> dict[str, TensorInfo]:
    """Every tensor of the BF16 form."""
    h, f, e, v = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["vocab_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (v, h),
    }
    for layer in range(c["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (h,),
                "post_attention_layernorm.weight": (h,),
                "self_attn.q_proj.weight": (q, h),
                "self_attn.k_proj.weight": (kv, h),
                "self_attn.v_proj.weight": (kv, h),
                "self_attn.o_proj.weight": (h, q),
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
                "self_attn.o_proj.bias": (h,),
                "self_attn.sinks": (c["num_attention_heads"],),
                "mlp.router.weight": (e, h),
                "mlp.router.bias": (e,),
                "mlp.experts.gate_up_proj": (e, h, 2 * f),
                "mlp.experts.gate_up_proj_bias": (e, 2 * f),
                "mlp.experts.down_proj": (e, f, h),
                "mlp.experts.down_proj_bias": (e, h),
            }.items()
        }
    return {name: TensorInfo(shape) for name, shape in shapes.items()}


def megatron_tensors(c: Config) -> dict[str, TensorInfo]:
    """Every tensor of Megatron's, the layers of a kind stacked under one key."""
    h, f, e, v = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["vocab_size"]
    layers = c["num_hidden_layers"]
    q = c["num_attention_heads"] * c["head_dim"]
    qkv = q + 2 * c["num_key_value_heads"] * c["head_dim"]
    stacked = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_qkv.bias": (qkv,),
        "self_attention.linear_proj.weight": (h, q),
        "self_attention.linear_proj.bias": (h,),
        "self_attention.core_attention.softmax_offset": (c["num_attention_heads"],),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.router.weight": (e, h),
        "mlp.router.bias": (e,),
        "mlp.experts.experts.linear_fc1.weight": (e, 2 * f, h),
        "mlp.experts.experts.linear_fc1.bias": (e, 2 * f),
        "mlp.experts.experts.linear_fc2.weight": (e, h, f),
        "mlp.experts.experts.linear_fc2.bias": (e, h),
    }
    tensors = {
        "embedding.word_embeddings.weight": (v, h),
        "decoder.final_layernorm.weight": (h,),
        "output_layer.weight": (v, h),
    } | {f"decoder.layers.{key}": (layers, *shape) for key, shape in stacked.items()}
    return {key: TensorInfo(shape) for key, shape in tensors.items()}


# The modules for which Transformer Engine asks for an entry of extra state: (key, is it there once per expert?)
EXTRA_STATE = (
    ("self_attention.linear_qkv", False),
    ("self_attention.linear_proj", False),
    ("self_attention.core_attention", False),
    ("pre_mlp_layernorm", False),
    ("mlp.experts.experts.linear_fc1", True),
    ("mlp.experts.experts.linear_fc2", True),
)


def extra_state(c: Config) -> list[str]:
    """The keys of Transformer Engine's extra state."""
    layers, experts = c["num_hidden_layers"], c["num_local_experts"]
    keys = []
    for layer in range(layers):
        for module, per_expert in EXTRA_STATE:
            key = f"decoder.layers.{module}._extra_state/shard_{layer}"
            if per_expert:
                keys += [f"{key}.{expert}_{layers}.{experts}" for expert in range(experts)]
            else:
                keys.append(f"{key}_{layers}")
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def cells(c: Config) -> Iterator[Cell]:
    """How every Hugging Face tensor becomes Megatron's."""
    hf = hf_tensors(c)
    for name, key in (
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        ("model.norm.weight", "decoder.final_layernorm.weight"),
        ("lm_head.weight", "output_layer.weight"),
    ):
        yield from same(Ref(name), Ref(key), hf[name])
    for layer in range(c["num_hidden_layers"]):
        yield from _layer(c, layer)


SAME_IN_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.o_proj.bias": "self_attention.linear_proj.bias",
    "self_attn.sinks": "self_attention.core_attention.softmax_offset",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
}


def _layer(c: Config, layer: int) -> Iterator[Cell]:
    groups, dim, f = c["num_key_value_heads"], c["head_dim"], c["intermediate_size"]
    qkv = GroupedQKV(groups, c["num_attention_heads"] // groups * dim, dim)

    def hf(name: str, *index: int) -> Ref:
        return Ref(f"model.layers.{layer}.{name}", index)

    def megatron(key: str, *index: int, rows: tuple[int, int] | None = None) -> Ref:
        return Ref(f"decoder.layers.{key}", (layer, *index), rows)

    for name, key in SAME_IN_LAYER.items():
        yield Cell((hf(name),), (megatron(key),))
    for kind in ("weight", "bias"):
        parts = tuple(hf(f"self_attn.{p}_proj.{kind}") for p in "qkv")
        yield Cell(parts, (megatron(f"self_attention.linear_qkv.{kind}"),), qkv)
    gate, up = (0, f), (f, 2 * f)
    for expert in range(c["num_local_experts"]):
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            rows = AlternatingRows()
            fc1 = f"mlp.experts.experts.linear_fc1.{kind}"
            yield Cell(
                (hf(f"mlp.experts.gate_up_proj{suffix}", expert),),
                (megatron(fc1, expert, rows=gate), megatron(fc1, expert, rows=up)),
                rows if kind == "bias" else Transposed(rows),
            )
        fc2 = "mlp.experts.experts.linear_fc2"
        yield Cell((hf("mlp.experts.down_proj", expert),), (megatron(f"{fc2}.weight", expert),), Transposed())
        yield Cell((hf("mlp.experts.down_proj_bias", expert),), (megatron(f"{fc2}.bias", expert),))


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module = "nemo.collections.llm.gpt.model.gpt_oss"
    yarn = c["rope_scaling"]
    sliding = [int(kind == "sliding_attention") for kind in c["layer_types"]]
    return (
        f"{module}:GPTOSSModel",
        f"{module}:GPTOSSConfig",
        {
            "num_layers": c["num_hidden_layers"],
            "hidden_size": c["hidden_size"],
            "ffn_hidden_size": c["intermediate_size"],
            "moe_ffn_hidden_size": c["intermediate_size"],
            "num_attention_heads": c["num_attention_heads"],
            "num_query_groups": c["num_key_value_heads"],
            "kv_channels": c["head_dim"],
            "num_moe_experts": c["num_local_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "vocab_size": c["vocab_size"],
            "layernorm_epsilon": c["rms_norm_eps"],
            "rotary_base": c["rope_theta"],
            "yarn_rotary_scaling_factor": float(yarn["factor"]),
            "yarn_original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "yarn_beta_fast": float(yarn["beta_fast"]),
            "yarn_beta_slow": float(yarn["beta_slow"]),
            # Cosine and sine are multiplied by 0.1·ln(factor) + 1; NeMo's own default cancels that out.
            "yarn_mscale": 1.0,
            "yarn_mscale_all_dim": 0.0,
            "yarn_correction_range_round_to_int": bool(yarn.get("truncate", True)),
            "seq_length": c.get("max_position_embeddings", 131072),
            "window_size": (c["sliding_window"] - 1, 0),  # the token itself is one of Hugging Face's
            "window_attn_skip_freq": sliding,
            "share_embeddings_and_output_weights": False,
            # As shipped, the class asks for kernels that Triton 3.6 or a machine without a GPU cannot give.
            "bias_activation_fusion": False,
            "moe_permute_fusion": False,
            "gradient_accumulation_fusion": False,
        },
    )


def tiny_config() -> Config:
    """A model of the same make with about 130,000 parameters; down_proj is not square."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": MODEL_TYPE,
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
