"""DeepSeek V3, V3.1 and R1, Kimi-K2 and Moonlight: latent attention (MLA), dense layers first, then routed and shared
experts, and one layer more for multi-token prediction (MTP).

Facts: the router's correction bias is float32 and stays float32, because BF16 would make different biases equal. The
MTP layer has the number after the last layer. Hugging Face stores copies of embedding and output layer with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families import checks, decoder, rope
from slipway.families.checks import Config
from slipway.families.described import Described, decoder_config
from slipway.families.fields import IN_TRAINING, NO_EFFECT, USED, Field, each, only
from slipway.families.mtp import MTP, mtp_layers
from slipway.families.quantized import Fp8
from slipway.families.rules import Rules, Scope

NAME = "deepseek_v3"
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
REQUIRED = {
    **decoder.REQUIRED,
    "kv_lora_rank": int,
    "qk_nope_head_dim": int,
    "qk_rope_head_dim": int,
    "v_head_dim": int,
    "moe_intermediate_size": int,
    "n_routed_experts": int,
    "n_shared_experts": int,
    "num_experts_per_tok": int,
    "n_group": int,
    "topk_group": int,
    "routed_scaling_factor": (int, float),
}
ALIASES = {"num_mtp_layers": MTP, "num_local_experts": "n_routed_experts"}  # of transformers 5
FIELDS = {
    **decoder.FIELDS,
    **each(USED, " ".join(REQUIRED)),
    **each(USED, f"q_lora_rank first_k_dense_replace {MTP}"),
    **each(Field(f"used: {MTP}"), "num_mtp_layers"),
    **each(Field("used: n_routed_experts"), "num_local_experts"),
    **each(Field("must be what the other sizes give"), "head_dim qk_head_dim"),
    **each(IN_TRAINING, "aux_loss_alpha seq_aux router_aux_loss_coef moe_router_bias_update_rate"),
    **each(NO_EFFECT, "pretraining_tp ep_size output_router_logits"),
    "attention_bias": only(False),
    "tie_word_embeddings": only(False),
    "rope_interleave": only(True),
    "moe_layer_freq": only(1),
    "scoring_func": only("sigmoid"),
    "topk_method": only("noaux_tc"),
    "norm_topk_prob": only(True),
}
QUANTIZED = (*decoder.PROJECTIONS, *(f"{part}.weight" for part in ("q_a_proj", "q_b_proj", "kv_b_proj", "with_mqa")))
FORM = Fp8(block=(32, 48))  # small, for tiny models


def defaults(c: Config) -> Config:
    """What transformers assumes."""
    heads = c.get("num_attention_heads")
    return {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def check(c: Config, where: Path) -> None:
    """DataError for fields that do not fit together, or that Megatron computes in another way."""
    rank, rope_dim, nope_dim = c.get("q_lora_rank"), c["qk_rope_head_dim"], c["qk_nope_head_dim"]
    if rank is not None and (type(rank) is not int or not 0 < rank < checks.LARGEST):
        raise DataError(f"{where}: field q_lora_rank is {rank!r}; it must be a whole number or null")
    derived = {
        "head_dim": rope_dim,
        "qk_head_dim": rope_dim + nope_dim,
        "num_key_value_heads": c["num_attention_heads"],
    }
    for field, value in derived.items():
        if c.get(field, value) not in (value, None):
            raise DataError(f"{where}: field {field} is {c[field]!r}; with the other sizes it must be {value}")
    checks.check_count(c, where, "first_k_dense_replace", c["num_hidden_layers"] - 1)
    if c.get(MTP) is not None:
        checks.check_count(c, where, MTP, 64)
    _check_routing(c, where)
    rope.check(c, where, "yarn")
    if (yarn := c.get("rope_scaling")) is not None:
        _check_yarn(yarn, where)


def _check_routing(c: Config, where: Path) -> None:
    if c["n_routed_experts"] % c["n_group"]:
        raise DataError(f"{where}: n_routed_experts is not a multiple of n_group")
    if not 1 < c["num_experts_per_tok"] <= c["n_routed_experts"] // c["n_group"] * min(c["topk_group"], c["n_group"]):
        raise DataError(f"{where}: num_experts_per_tok is {c['num_experts_per_tok']}; the groups have fewer experts")
    if _grouped(c) and c["num_experts_per_tok"] // c["topk_group"] != 2:
        raise DataError(
            f"{where}: num_experts_per_tok must be twice topk_group: a group's score is the sum of its best two, "
            "and Megatron takes the best num_experts_per_tok / topk_group"
        )


def _grouped(c: Config) -> bool:
    """The router first chooses some groups of experts, then experts in them."""
    return c["topk_group"] < c["n_group"]


def _check_yarn(yarn: Config, where: Path) -> None:
    """DataError for what latent attention in Megatron has no setting for."""
    if bool(yarn.get("mscale")) != bool(yarn.get("mscale_all_dim")):
        raise DataError(
            f"{where}: rope_scaling has only one of mscale and mscale_all_dim; both or neither are supported"
        )
    for field, known in (("attention_factor", None), ("truncate", True)):
        if yarn.get(field, known) not in (known, None):
            raise DataError(f"{where}: rope_scaling.{field} is {yarn[field]!r}; only {known!r} is supported")


# ---------------------------------------------------------------------------- rules


def rules(c: Config) -> Rules:
    """How every Hugging Face tensor becomes Megatron's: a key for every layer, because the layers differ."""
    h, v, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    model, ahead = Scope(Rules()), range(layers, layers + mtp_layers(c))
    embedding = ["model.embed_tokens.weight", *(f"model.layers.{n}.embed_tokens.weight" for n in ahead)]
    output = ["lm_head.weight", *(f"model.layers.{n}.shared_head.head.weight" for n in ahead)]
    model.copied(embedding, "embedding.word_embeddings.weight", v, h)
    model.copied(output, "output_layer.weight", v, h)
    decoder.final_norm(model, c)
    for n in range(layers):
        layer = model.within(f"model.layers.{n}.", f"decoder.layers.{n}.")
        _attention(layer, c)
        if n < c["first_k_dense_replace"]:
            decoder.dense_mlp(layer, c)
        else:
            _experts(layer, c)
    for n in ahead:
        _mtp(model.within(f"model.layers.{n}.", f"mtp.layers.{n - layers}."), c)
    return model.rules


def _attention(layer: Scope, c: Config) -> None:
    """Latent attention: queries, and keys with values, go to a small size, through a norm, and back."""
    h, heads, q, kv = c["hidden_size"], c["num_attention_heads"], c.get("q_lora_rank"), c["kv_lora_rank"]
    nope, positions, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    layer.same("input_layernorm.weight", "input_layernorm.weight", h)
    layer.state("input_layernorm")
    module = layer.within("self_attn.", "self_attention.")
    if q is None:  # Moonlight: queries are not compressed
        module.same("q_proj.weight", "linear_q_proj.weight", heads * (nope + positions), h)
        module.state("linear_q_proj")
    else:
        module.same("q_a_proj.weight", "linear_q_down_proj.weight", q, h)
        module.same("q_a_layernorm.weight", "linear_q_up_proj.layer_norm_weight", q)
        module.same("q_b_proj.weight", "linear_q_up_proj.weight", heads * (nope + positions), q)
        module.state("linear_q_down_proj", "linear_q_up_proj")
    module.same("kv_a_proj_with_mqa.weight", "linear_kv_down_proj.weight", kv + positions, h)
    module.same("kv_a_layernorm.weight", "linear_kv_up_proj.layer_norm_weight", kv)
    module.same("kv_b_proj.weight", "linear_kv_up_proj.weight", heads * (nope + value), kv)
    module.same("o_proj.weight", "linear_proj.weight", h, heads * value)
    module.state("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")


def _experts(layer: Scope, c: Config) -> None:
    h, f = c["hidden_size"], c["moe_intermediate_size"]
    decoder.norm_before_experts(layer, c)
    decoder.experts(layer, h, f, c["n_routed_experts"])
    layer.same("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", c["n_routed_experts"], dtype="F32")
    decoder.gated_mlp(layer.within("mlp.shared_experts.", "mlp.shared_experts."), h, f * c["n_shared_experts"])


def _mtp(ahead: Scope, c: Config) -> None:
    """Multi-token prediction: a layer whose input is the hidden states joined with the next token's embedding."""
    h = c["hidden_size"]
    ahead.same("eh_proj.weight", "eh_proj.weight", h, 2 * h)
    for name, key in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "final_layernorm")):
        ahead.same(f"{name}.weight", f"{key}.weight", h)
    ahead.state("eh_proj", "enorm", "hnorm", "final_layernorm")
    layer = ahead.within("", "transformer_layer.")
    _attention(layer, c)
    layer.state("self_attention.core_attention")
    _experts(layer, c)


# ---------------------------------------------------------------------------- NeMo


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    """(NeMo's model class, its configuration class, the fields that this config.json sets)."""
    module = "nemo.collections.llm.gpt.model.deepseek"
    dense, h_expert = c["first_k_dense_replace"], c["moe_intermediate_size"]
    return (
        f"{module}:DeepSeekModel",
        f"{module}:DeepSeekV3Config",
        {
            **decoder.nemo_fields(c),
            "kv_channels": c["v_head_dim"],
            "q_lora_rank": c.get("q_lora_rank"),
            "kv_lora_rank": c["kv_lora_rank"],
            "qk_head_dim": c["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": c["qk_rope_head_dim"],
            "v_head_dim": c["v_head_dim"],
            "moe_ffn_hidden_size": h_expert,
            "moe_shared_expert_intermediate_size": h_expert * c["n_shared_experts"],
            "moe_layer_freq": [0] * dense + [1] * (c["num_hidden_layers"] - dense),
            "num_moe_experts": c["n_routed_experts"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_router_num_groups": c["n_group"] if _grouped(c) else None,
            "moe_router_group_topk": c["topk_group"] if _grouped(c) else None,
            "moe_router_topk_scaling_factor": c["routed_scaling_factor"],
            "max_position_embeddings": c["max_position_embeddings"],
            "moe_permute_fusion": False,  # its kernel needs another Triton than 3.6
            **_rope(c),
            **_prediction(c),
        },
    )


def _rope(c: Config) -> dict[str, Any]:
    if (yarn := c.get("rope_scaling")) is None:
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(yarn["factor"]),
        "original_max_position_embeddings": yarn.get("original_max_position_embeddings")
        or c["max_position_embeddings"],
        "beta_fast": float(yarn.get("beta_fast") or 32),
        "beta_slow": float(yarn.get("beta_slow") or 1),
        "mscale": float(yarn.get("mscale") or 1),
        "mscale_all_dim": float(yarn.get("mscale_all_dim") or 0),
    }


def _prediction(c: Config) -> dict[str, Any]:
    if not mtp_layers(c):
        return {}
    # NeMo leaves the factor empty, and then the loss fails. The model was trained with 0.1 at the end.
    return {"mtp_num_layers": mtp_layers(c), "mtp_loss_scaling_factor": 0.1}


MEGATRON: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}


def hf_config(f: Described) -> dict[str, Any]:
    """config.json from Megatron's fields."""
    layers, experts, width = f["num_layers"], f["num_moe_experts"], f["moe_ffn_hidden_size"]
    with_experts = f["moe_layer_freq"]
    if isinstance(with_experts, int):  # every n-th layer from the first one on
        with_experts = [int(layer % with_experts == 0) for layer in range(layers)]
    dense = with_experts.index(1) if 1 in with_experts else layers
    if with_experts != [0] * dense + [1] * (layers - dense):
        raise DataError(f"{f.where}: moe_layer_freq is {with_experts}; only dense layers before the others can be said")
    groups = f.get("moe_router_num_groups")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: value for name, value in decoder_config(f).items() if name != "head_dim"},
        "num_key_value_heads": f["num_attention_heads"],
        "attention_bias": False,
        "q_lora_rank": f.get("q_lora_rank"),
        "kv_lora_rank": f["kv_lora_rank"],
        "qk_nope_head_dim": f["qk_head_dim"],
        "qk_rope_head_dim": f["qk_pos_emb_head_dim"],
        "v_head_dim": f["v_head_dim"],
        "moe_intermediate_size": width,
        "n_routed_experts": experts,
        "n_shared_experts": f["moe_shared_expert_intermediate_size"] // width,
        "num_experts_per_tok": f["moe_router_topk"],
        "n_group": groups or 1,
        "topk_group": f["moe_router_group_topk"] if groups else 1,
        "routed_scaling_factor": f["moe_router_topk_scaling_factor"],
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        MTP: f.get("mtp_num_layers", 0),
        "rope_scaling": _scaling_of(f),
    }


def _scaling_of(f: Described) -> dict[str, Any] | None:
    if f.get("rope_type", "yarn") != "yarn" or float(f.get("rotary_scaling_factor", 1.0)) == 1.0:
        return None
    scaling = {
        "type": "yarn",
        "factor": float(f["rotary_scaling_factor"]),
        "original_max_position_embeddings": f.get("original_max_position_embeddings", 4096),
        "beta_fast": float(f.get("beta_fast", 32)),
        "beta_slow": float(f.get("beta_slow", 1)),
    }
    if f.get("mscale_all_dim"):
        scaling |= {"mscale": float(f.get("mscale", 1.0)), "mscale_all_dim": float(f["mscale_all_dim"])}
    return scaling


def tiny_config() -> dict[str, Any]:
    """A model of the same kind with about 190,000 parameters: one dense layer, two with experts, one for MTP."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "kv_lora_rank": 40,
        "max_position_embeddings": 2560,
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 32,
        "vocab_size": 512,
    }
