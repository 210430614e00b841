"""The common parts of the families' decoders: their rules, and the fields of NeMo's configuration.

Hugging Face's names on the left, Megatron's on the right; h is the hidden size, f the feed-forward size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families.checks import Config, Kinds, check_count, head_dim
from slipway.families.fields import COMMON, USED, Field, Fields, each, only
from slipway.families.rules import GroupedQKV, Rules, Scope, qkv_by_groups

PROJECTIONS = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))
LATENT_EPSILON = 1e-6  # of the norms inside latent attention, in DeepSeek's code and in transformers
REQUIRED: Kinds = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "rms_norm_eps": (int, float),
    "rope_theta": (int, float),
    "max_position_embeddings": int,
}


# What is known of the fields that every family's decoder has.
FIELDS: Fields = {
    **COMMON,
    **each(USED, " ".join(REQUIRED)),
    **each(USED, "head_dim rope_scaling rope_parameters tie_word_embeddings"),
    "hidden_act": only("silu"),
    "partial_rotary_factor": only(1.0),
}


# The fields of attention with a sliding window, which is supported only where it is switched off.
NO_SLIDING: Fields = {
    **each(Field("no effect while use_sliding_window is false"), "sliding_window max_window_layers"),
    **each(USED, "use_sliding_window layer_types"),
}


def check_no_sliding(c: Config, where: Path) -> None:
    """DataError where a layer looks at a window of tokens only: transformers' rule for Qwen."""
    kinds = c.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise DataError(f"{where}: field layer_types is {kinds!r}; it must be a list with the kind of each layer")
    if kinds is None and c.get("use_sliding_window"):
        if "max_window_layers" in c:
            check_count(c, where, "max_window_layers", 1 << 31)
        first = c.get("max_window_layers", 28)  # the layers from this one on have a window
        kinds = ["sliding_attention"] * (c["num_hidden_layers"] > first)
    others = [kind for kind in kinds or () if kind != "full_attention"]
    if others:
        raise DataError(
            f"{where}: layer_types or use_sliding_window asks for {others[0]}; for {c['model_type']} only "
            "full_attention is supported"
        )


def is_tied(c: Config) -> bool:
    """The output layer is the embedding, so neither side has a tensor for it."""
    return bool(c.get("tie_word_embeddings", False))


# ---------------------------------------------------------------------------- rules


def embeddings(model: Scope, c: Config) -> None:
    """The tensors outside the layers."""
    h, v = c["hidden_size"], c["vocab_size"]
    model.same("model.embed_tokens.weight", "embedding.word_embeddings.weight", v, h)
    if not is_tied(c):
        model.same("lm_head.weight", "output_layer.weight", v, h)
    final_norm(model, c)


def final_norm(model: Scope, c: Config) -> None:
    model.same("model.norm.weight", "decoder.final_layernorm.weight", c["hidden_size"])
    model.state("decoder.final_layernorm")


def stacked_layers(model: Scope, c: Config) -> Iterator[Scope]:
    """The layers of a model in which all layers have the same tensors: Megatron stacks each tensor of all layers."""
    layers = c["num_hidden_layers"]
    for layer in range(layers):
        yield model.stacked(f"model.layers.{layer}.", "decoder.layers.", layer, layers)


def attention(layer: Scope, c: Config, *, qkv_bias: bool = False, proj_bias: bool = False, qk_norm: bool = False):
    """Attention with grouped queries, and the norm before it, which Megatron fuses into linear_qkv."""
    h, heads, groups, dim = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], head_dim(c)
    layer.same("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", h)
    module = layer.within("self_attn.", "self_attention.")
    op = GroupedQKV(groups, heads // groups * dim, dim)
    for kind, width in (("weight", (h,)), ("bias", ())) if qkv_bias else (("weight", (h,)),):
        parts = tuple(
            module.source(f"{part}_proj.{kind}", rows, *width)
            for part, rows in (("q", heads * dim), ("k", groups * dim), ("v", groups * dim))
        )
        target = module.target(f"linear_qkv.{kind}", (heads + 2 * groups) * dim, *width)
        layer.rules.cells += qkv_by_groups(parts, target, op, 2 * h if width else 2)
    module.same("o_proj.weight", "linear_proj.weight", h, heads * dim)
    if proj_bias:
        module.same("o_proj.bias", "linear_proj.bias", h)
    module.state("linear_qkv", "linear_proj")
    if qk_norm:
        for part in "qk":
            module.same(f"{part}_norm.weight", f"{part}_layernorm.weight", dim)
        module.state("q_layernorm", "k_layernorm")


def gated_mlp(module: Scope, h: int, f: int) -> None:
    """down(silu(gate) · up); Megatron keeps gate above up in linear_fc1."""
    module.joined(("gate_proj.weight", "up_proj.weight"), "linear_fc1.weight", f, h)
    module.same("down_proj.weight", "linear_fc2.weight", h, f)
    module.state("linear_fc1", "linear_fc2")


def dense_mlp(layer: Scope, c: Config) -> None:
    """A gated MLP, and the norm before it, which Megatron fuses into linear_fc1."""
    h = c["hidden_size"]
    layer.same("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", h)
    gated_mlp(layer.within("mlp.", "mlp."), h, c["intermediate_size"])


def norm_before_experts(layer: Scope, c: Config) -> None:
    """The norm before a mixture of experts, a module of its own."""
    layer.same("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", c["hidden_size"])
    layer.state("pre_mlp_layernorm")


def experts(layer: Scope, h: int, f: int, count: int) -> None:
    """A router, and the gated MLPs that it chooses from; Megatron stacks the MLPs."""
    layer.same("mlp.gate.weight", "mlp.router.weight", count, h)
    for expert in range(count):
        gated_mlp(layer.stacked(f"mlp.experts.{expert}.", "mlp.experts.experts.", expert, count), h, f)


def dense_rules(c: Config, **kinds: bool) -> Rules:
    """A decoder with attention (`kinds`: options of `attention`) and dense MLPs."""
    model = Scope(Rules())
    embeddings(model, c)
    for layer in stacked_layers(model, c):
        attention(layer, c, **kinds)
        dense_mlp(layer, c)
    return model.rules


# ---------------------------------------------------------------------------- NeMo


@dataclass(frozen=True)
class Symbol:
    """A Python object by its name, as "module:name": a value of NeMo's configuration that JSON has no form for."""

    target: str


def nemo_fields(c: Config) -> dict[str, Any]:
    """The fields of NeMo's configuration that every family sets from config.json."""
    return {
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": c["num_attention_heads"],
        "num_query_groups": c["num_key_value_heads"],
        "kv_channels": head_dim(c),
        "vocab_size": c["vocab_size"],
        "layernorm_epsilon": c["rms_norm_eps"],
        "rotary_base": c["rope_theta"],
        "seq_length": c["max_position_embeddings"],
        "share_embeddings_and_output_weights": is_tied(c),
        # It needs Apex; `train` sets it where Apex is there and the base itself is trained.
        "gradient_accumulation_fusion": False,
    }
