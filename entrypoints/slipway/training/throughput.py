"""How much arithmetic a token needs, and what share of a GPU's peak that is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipway.tensors.refs import TensorInfo

MULTIPLIED = re.compile(r"(linear_\w+|router|output_layer|eh_proj)\.weight$")
EXPERT = ".experts.experts."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# Dense BF16, in TFLOP/s, by what torch calls the device; NVIDIA's data sheets.
PEAKS = {"GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}
# In units of the forward pass: products with weights, and products of queries, keys and values. A full backward pass
# takes two more. A frozen base has no gradients of its weights, and the heads need none of the base at all.
PASSES = {"heads": (1, 1), "lora": (2, 3), "sft": (3, 3), "pretrain": (3, 3)}


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a forward pass.

    Args:
        weights: of the products with weights, for a token.
        of_a_key: of attention, for a key that a token sees.
        windows: for each layer, how many earlier keys a token sees; None = all.
    """

    weights: float
    of_a_key: float
    windows: tuple[int | None, ...]

    def attention(self, length: float) -> float:
        """Of attention, for a token of a sequence of this length, on average."""
        return self.of_a_key * sum(_mean_keys(length, window) for window in self.windows)

    def per_token(self, mode: str, length: float) -> float:
        """Operations per token of training in this mode, in a sequence of this length. What is recomputed is not
        counted, as usual for MFU."""
        weights, attention = PASSES[mode]
        return weights * self.weights + attention * self.attention(length)


@dataclass(frozen=True)
class Load:
    """What a step computes.

    Args:
        positions: tokens and their padding.
        length: of the sequence that a token is in, on average.
    """

    tokens: int
    positions: int
    length: float


def load_of(lengths: Sequence[int], micro_batch_size: int, positions_of: Callable[[int], int]) -> Load:
    """The load of a global batch.

    Args:
        lengths: positions of each of its sequences that are no padding, in order.
        positions_of: positions of the longest → those that each sequence of a micro batch is computed with.
    """
    batches = [lengths[at : at + micro_batch_size] for at in range(0, len(lengths), micro_batch_size)]
    positions = sum(positions_of(max(batch)) * len(batch) for batch in batches)
    tokens = sum(lengths)
    return Load(tokens, positions, sum(length * length for length in lengths) / max(tokens, 1))


def arithmetic(tensors: Mapping[str, TensorInfo], config: Any) -> Arithmetic:
    """The arithmetic of a model, from the tensors of its NeMo checkpoint and its NeMo configuration."""
    topk, experts = getattr(config, "moe_router_topk", 1), getattr(config, "num_moe_experts", None) or 1
    multiplied = 0.0
    for name, info in tensors.items():
        if MULTIPLIED.search(name) or (name.endswith(EMBEDDING) and not any(n.endswith(OUTPUT) for n in tensors)):
            multiplied += math.prod(info.shape) * (topk / experts if EXPERT in name else 1)
    if getattr(config, "multi_latent_attention", False):
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        width = 2 * config.kv_channels
    return Arithmetic(2 * multiplied, 2 * config.num_attention_heads * width, tuple(_windows(config)))


def _windows(config: Any) -> list[int | None]:
    """For each layer, how many earlier keys a token sees; None = all."""
    window, skip = getattr(config, "window_size", None), getattr(config, "window_attn_skip_freq", None)
    layers = config.num_layers
    slides = skip if isinstance(skip, list) else [1] * layers
    return [window[0] if window and slides[layer] else None for layer in range(layers)]


def _mean_keys(seq_length: float, window: int | None) -> float:
    """Keys that a token sees on average under a causal mask, itself included."""
    if window is None or window >= seq_length:
        return (seq_length + 1) / 2
    seen = window + 1
    return seen - seen * (seen - 1) / 2 / seq_length


def peak_tflops(device: str) -> float | None:
    """The peak of the device with this name in torch, or None if it is unknown."""
    return next((float(peak) for name, peak in PEAKS.items() if name in device), None)
