"""How much GPU memory a recipe needs, estimated from the model's config.json alone.

Weights, gradients and optimizer follow from the parallel sizes. Activations are what Megatron keeps of a layer for the
backward pass, with flash attention and sequence parallelism, in BF16. LoRA on the shape of Llama-3.1-8B is estimated
with 48.2 GB and took 47.8 GB (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slipway.families.checks import head_dim
from slipway.families.mtp import mtp_layers
from slipway.training.recipe import Recipe
from slipway.training.weights import Layer, Parts, experts_of, parts_of

BF16, FP32 = 2, 4
NF4 = 0.5 + FP32 / 64  # a code, and a scale for each 64 weights
GRADIENT, OPTIMIZER = FP32, 3 * FP32  # of a weight; the optimizer keeps a master copy and two moments
# Tokens whose logits exist at once: heads_loss.CHUNK_TOKENS, and cross_entropy.CHUNK_TOKENS, which need torch.
CHUNK, CHUNK_OF_LORA = 4096, 2048
OVERHEAD = 1.5e9  # bytes for workspaces and unusable gaps; CUDA's context is in what layout.SHARE leaves
ALL = "all-linear"  # every linear layer gets an adapter


@dataclass(frozen=True)
class Estimate:
    """Bytes on the GPU that needs the most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float = OVERHEAD

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in asdict(self).items() if size >= 5e7)
        return f"memory per GPU: about {self.total / 1e9:.0f} GB ({parts})"


def estimate(recipe: Recipe, c: Mapping[str, Any], world_size: int) -> Estimate:
    """The memory of the pipeline stage that needs the most.

    Args:
        c: config.json of the model.
    """
    parts, sizes = parts_of(c), recipe.stages(c["num_hidden_layers"])
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    found = [
        _stage(recipe, c, parts, parts.layers[start : start + size], number, world_size)
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return max(found, key=lambda one: one.total)


def _stage(
    recipe: Recipe, c: Mapping[str, Any], parts: Parts, layers: list[Layer], number: int, world_size: int
) -> Estimate:
    tensor, pipeline, expert = (
        recipe.tensor_parallel_size,
        recipe.pipeline_parallel_size,
        recipe.expert_parallel_size,
    )
    is_last = number == pipeline - 1
    outside = parts.embedding if number == 0 else 0
    outside += (parts.output or parts.embedding * (pipeline > 1)) if is_last else 0
    if is_last and parts.ahead:
        layers = [*layers, *parts.ahead]
        outside += parts.embedding * (pipeline > 1)  # of the tokens that are predicted from
    in_layers = sum(layer.plain for layer in layers)
    plain = (outside + in_layers) / tensor
    experts = sum(layer.expert * layer.count for layer in layers) / expert
    # Ranks with the same weights share the optimizer's state. Experts are spread over more ranks, so fewer share it.
    copies = world_size / tensor / pipeline
    copies_of_experts = max(1.0, world_size / pipeline / expert)
    if recipe.is_frozen:
        trained = _adapters(recipe, c, layers) if recipe.mode == "lora" else 0.0
        gradients, optimizer = trained * GRADIENT, trained * OPTIMIZER
    else:
        gradients = (plain + experts) * GRADIENT
        optimizer = (plain / copies + experts / copies_of_experts) * OPTIMIZER
    # A stage keeps the activations of a micro batch until its backward pass: the first stage waits longest for it.
    in_flight = 1 if recipe.mode == "heads" else max(1, pipeline - number)
    weights = (plain + experts) * BF16
    if recipe.base_precision == "nf4":
        weights = outside / tensor * BF16 + (in_layers / tensor + experts) * NF4 + _unpacked(recipe, c)
    return Estimate(
        weights,
        gradients,
        optimizer,
        _activations(recipe, c, layers, in_flight),
        _logits(recipe, c) if is_last else 0.0,
    )


def _unpacked(recipe: Recipe, c: Mapping[str, Any]) -> float:
    """Bytes of the largest matrix of a layer, which exists in BF16 for its product; grouped experts are one."""
    dense = 2 * c["intermediate_size"] * c["hidden_size"] / recipe.tensor_parallel_size
    experts = experts_of(c) / recipe.expert_parallel_size
    return BF16 * max(dense, experts * 2 * c.get("moe_intermediate_size", c["intermediate_size"]) * c["hidden_size"])


def _attention(c: Mapping[str, Any]) -> float:
    """Values per token in the projections of a layer's attention."""
    heads = c["num_attention_heads"]
    if "kv_lora_rank" in c:
        key, value = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["v_head_dim"]
        return heads * (2 * key + 2 * value) + (c.get("q_lora_rank") or 0) + c["kv_lora_rank"]
    return (2 * heads + 2 * c["num_key_value_heads"]) * head_dim(c)


def _feed_forward(recipe: Recipe, c: Mapping[str, Any], layer: Layer) -> tuple[float, float]:
    """Values per token of a layer's feed-forward part: all that exist at once, and those kept for the backward pass."""
    # The inputs of products are kept for the gradients of weights and adapters alone, and those behind an activation
    # are made again where adapters are two products and nothing else: activations.py and low_rank.py.
    all_kept = not recipe.is_frozen or recipe.adapts_feed_forward
    is_made_again = recipe.is_frozen and recipe.tensor_parallel_size == 1 and not (recipe.dora or recipe.lora_dropout)
    behind = all_kept and not is_made_again
    if not layer.count:
        width = c["intermediate_size"]
        return 3 * width, (2 + behind) * width
    hidden, width = c["hidden_size"], c.get("moe_intermediate_size", c["intermediate_size"])
    chosen = c["num_experts_per_tok"] + c.get("n_shared_experts", 0)
    # The bias of a row's expert is kept for the gradient of the router's weight.
    biases = hidden * (c["model_type"] == "gpt_oss")
    kept = chosen * ((2 + behind) * width + all_kept * hidden + biases)
    return chosen * (3 * width + 2 * hidden), kept


def _activations(recipe: Recipe, c: Mapping[str, Any], layers: list[Layer], in_flight: int) -> float:
    tokens = recipe.micro_batch_size * recipe.seq_length / recipe.context_parallel_size / recipe.tensor_parallel_size
    streams = 4 * c["hidden_size"]  # inputs and outputs of a layer's two halves, and their norms
    outside = streams + _attention(c)
    if recipe.mode == "lora":
        # Adapters see the whole of the sequence that a layer's norm has a share of, and keep it for their gradient.
        gathered = 1 + (recipe.adapts_feed_forward and not any(layer.count for layer in layers))
        outside += gathered * (recipe.tensor_parallel_size - 1) * c["hidden_size"]
        # Transformer Engine keeps the outputs of a layer's two norms in FP8 too, a byte for each value.
        outside += c["hidden_size"] * (recipe.precision == "fp8")
    parts = [_feed_forward(recipe, c, layer) for layer in layers]
    largest, kept_of_largest = max(parts)
    if recipe.mode == "heads":
        return tokens * BF16 * (outside + largest)  # without a backward pass only one layer's values exist at once
    if recipe.recompute == "full":
        kept = in_flight * len(layers) * c["hidden_size"] + outside + kept_of_largest
    else:
        kept = in_flight * (len(layers) * outside + sum(kept for _, kept in parts))
    # Beside what is kept, the tokens of experts exist again while a layer is computed backwards, as they were sorted.
    if any(layer.count for layer in layers):
        kept += streams + largest
    return tokens * BF16 * kept


def _logits(recipe: Recipe, c: Mapping[str, Any]) -> float:
    tokens = recipe.micro_batch_size * recipe.seq_length / recipe.context_parallel_size
    part = c["vocab_size"] / recipe.tensor_parallel_size
    if recipe.mode == "heads":
        return min(tokens, CHUNK) * part * BF16
    if recipe.is_frozen:
        return min(tokens, CHUNK_OF_LORA) * part * BF16
    # The logits, which become their gradient, also those of further tokens, and the weight's.
    return part * BF16 * (tokens * (1 + mtp_layers(c)) + c["hidden_size"])


def _adapters(recipe: Recipe, c: Mapping[str, Any], layers: list[Layer]) -> float:
    h, heads = c["hidden_size"], c["num_attention_heads"] * head_dim(c)
    width = c.get("moe_intermediate_size", c["intermediate_size"])
    rank, value = c.get("kv_lora_rank", 0), c.get("v_head_dim", 0)
    query = c.get("qk_nope_head_dim", 0) + c.get("qk_rope_head_dim", 0)
    of_values = c["num_attention_heads"] * (c.get("qk_nope_head_dim", 0) + value)
    sides = {
        "linear_qkv": h + heads + 2 * c["num_key_value_heads"] * head_dim(c),
        "linear_proj": (c["num_attention_heads"] * value or heads) + h,
        "linear_fc1": h + 2 * width,
        "linear_fc2": width + h,
        "linear_q_down_proj": h + (c.get("q_lora_rank") or 0),
        "linear_q_up_proj": (c.get("q_lora_rank") or 0) + c["num_attention_heads"] * query,
        "linear_q_proj": h + c["num_attention_heads"] * query,
        "linear_kv_down_proj": h + rank + c.get("qk_rope_head_dim", 0),
        "linear_kv_up_proj": rank + of_values,
    }
    targets = recipe.lora_targets if recipe.lora_targets != ALL else "linear_qkv,linear_proj,linear_fc1,linear_fc2"
    # A layer's experts share their adapters.
    of_layer = recipe.lora_rank * sum(sides.get(target, 0) for target in targets.split(","))
    return len(layers) * of_layer / recipe.tensor_parallel_size
