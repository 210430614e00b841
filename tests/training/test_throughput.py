"""The arithmetic of a token against what is published and against counting by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from slipway.families import FAMILIES
from slipway.training.throughput import arithmetic, load_of, peak_tflops

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


def of(family: str, **sizes) -> tuple:
    config = {**FAMILIES[family].tiny_config(), **sizes}
    fields = FAMILIES[family].nemo_model(config)[2]
    model = SimpleNamespace(**{"window_size": None, **fields})
    return arithmetic(FAMILIES[family].rules(config).megatron, model), config


def test_llama_8b_takes_two_operations_for_each_of_its_multiplied_weights():
    found, _ = of("llama31", **LLAMA_8B)
    parameters, embedding, norms = 8_030_261_248, 128256 * 4096, 65 * 4096
    assert found.weights == 2 * (parameters - embedding - norms)
    attention = found.attention(4096)
    assert attention == 32 * 2 * 2 * 32 * 128 * (4096 + 1) / 2
    assert found.per_token("lora", 4096) == 2 * found.weights + 3 * attention
    assert found.per_token("heads", 4096) == found.weights + attention


def test_tied_embeddings_are_multiplied_once():
    tied, config = of("qwen25", tie_word_embeddings=True)
    untied, _ = of("qwen25", tie_word_embeddings=False)
    assert tied.weights == untied.weights and config["vocab_size"] > 0


def test_only_the_chosen_experts_and_the_window_count():
    found, c = of("gpt_oss")
    h, f, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    attention = h * dim * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    experts = c["num_experts_per_tok"] * 3 * h * f
    layer = attention + experts + h * c["num_local_experts"]
    assert found.weights == pytest.approx(2 * (2 * layer + h * c["vocab_size"]))
    window, full = sum(min(i + 1, c["sliding_window"]) for i in range(64)) / 64, 65 / 2
    assert found.attention(64) == pytest.approx(2 * 2 * c["num_attention_heads"] * dim * (window + full))


def test_every_family_is_counted():
    for family in FAMILIES:
        found, _ = of(family)
        assert found.weights > 0 and found.attention(128) > 0


def test_the_load_of_a_step_is_without_padding_and_with_it():
    load = load_of([100, 300, 50, 10], 2, lambda longest: -(-longest // 128) * 128)
    assert (load.tokens, load.positions) == (460, 2 * 384 + 2 * 128)
    assert load.length == (100**2 + 300**2 + 50**2 + 10**2) / 460


def test_peaks_are_found_by_the_name_that_torch_gives():
    assert peak_tflops("NVIDIA H200") == 989 and peak_tflops("NVIDIA GB200") == 2500
    assert peak_tflops("NVIDIA H100 PCIe") == 756 and peak_tflops("a CPU") is None
