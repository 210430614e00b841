"""The rules in both directions: what goes to Megatron comes back, and nothing is left out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slipway.errors import DataError
from slipway.families import FAMILIES, rules
from slipway.tensors.refs import Ref, TensorInfo

sizes = st.integers(1, 6)


def random_bits(shape: tuple[int, ...]) -> np.ndarray:
    """Bits of which none are zero."""
    return np.random.default_rng(0).integers(1, 1 << 16, shape, dtype=np.uint16)


def identical(back: tuple, parts: tuple) -> bool:
    return len(back) == len(parts) and all(np.array_equal(a, b) for a, b in zip(back, parts, strict=True))


@given(groups=sizes, queries=sizes, dim=sizes, width=st.integers(0, 5))
def test_qkv_comes_back(groups, queries, dim, width):
    tail = (width,) if width else ()  # a bias has no columns
    op = rules.GroupedQKV(groups, queries * dim, dim)
    parts = tuple(random_bits((groups * rows * dim, *tail)) for rows in (queries, 1, 1))
    (merged,) = op.to_megatron(parts)
    assert merged.shape[0] == groups * (queries + 2) * dim
    assert identical(op.to_hf((merged,)), parts)
    assert identical(op.to_megatron(op.to_hf((merged,))), (merged,))


def test_qkv_is_grouped_as_megatron_reads_it():
    q, k, v = np.arange(8), np.arange(100, 104), np.arange(200, 204)
    (merged,) = rules.GroupedQKV(2, 4, 2).to_megatron((q, k, v))
    assert merged.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@given(rows=sizes, columns=sizes)
def test_gate_and_up_come_back(rows, columns):
    for op, shape in (
        (rules.AlternatingRows(), (2 * rows, columns)),
        (rules.Transposed(rules.AlternatingRows()), (columns, 2 * rows)),
        (rules.Transposed(), (rows, columns)),
        (rules.SAME, (rows, columns)),
    ):
        parts = (random_bits(shape),)
        assert identical(op.to_hf(op.to_megatron(parts)), parts)


def test_gate_is_the_even_rows():
    gate, up = rules.AlternatingRows().to_megatron((np.arange(6).reshape(6, 1),))
    assert gate.flatten().tolist() == [0, 2, 4] and up.flatten().tolist() == [1, 3, 5]


def shapes(family: str) -> st.SearchStrategy[dict[str, Any]]:
    """Config fields that give a small model of any shape."""
    groups, queries, layers = st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)
    fields = {
        "num_hidden_layers": layers, "num_key_value_heads": groups, "num_attention_heads": queries,
        "hidden_size": st.sampled_from([32, 64]), "intermediate_size": st.sampled_from([32, 96]),
        "head_dim": st.sampled_from([4, 16]), "vocab_size": st.just(40), "tie_word_embeddings": st.booleans(),
        "num_local_experts": st.integers(1, 4), "num_experts": st.integers(1, 4),
        "moe_intermediate_size": st.sampled_from([16, 48]), "q_lora_rank": st.integers(1, 9),
        "kv_lora_rank": st.integers(1, 9), "v_head_dim": st.integers(1, 9), "n_routed_experts": st.integers(1, 4),
        "n_shared_experts": st.integers(1, 3), "first_k_dense_replace": st.integers(0, 4),
    }  # fmt: skip
    if family == "gpt_oss":
        fields["tie_word_embeddings"] = st.just(False)
    if family == "deepseek_v3":
        fields["num_nextn_predict_layers"] = st.integers(0, 2)
    if family == "qwen3":
        fields["model_type"] = st.sampled_from(["qwen3", "qwen3_moe"])

    def whole_groups(c: dict[str, Any]) -> dict[str, Any]:
        return c | {"num_attention_heads": c["num_attention_heads"] * c["num_key_value_heads"]}

    return st.fixed_dictionaries(fields).map(whole_groups)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cell_bytes", [rules.MAX_CELL_BYTES, 1000])
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_models_of_any_shape_are_covered_and_come_back(name, cell_bytes, monkeypatch, data):
    """In whole tensors, and in the blocks that large tensors go in."""
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", cell_bytes)
    config = FAMILIES[name].tiny_config() | data.draw(shapes(name))
    model = FAMILIES[name].rules(config)
    rules.check_coverage(model.cells, model.hf, model.megatron)
    source = {name: random_bits(info.shape) for name, info in model.hf.items()}
    for cell in model.cells:
        if isinstance(cell.op, rules.Copies):
            for copy in cell.hf[1:]:
                view(source, copy)[...] = view(source, cell.hf[0])
    there = {key: np.zeros(info.shape, np.uint16) for key, info in model.megatron.items()}
    back = {name: np.zeros(info.shape, np.uint16) for name, info in model.hf.items()}
    for cell in model.cells:
        for ref, part in zip(cell.megatron, cell.op.to_megatron(tuple(view(source, r) for r in cell.hf)), strict=True):
            view(there, ref)[...] = part
    for cell in model.cells:
        for ref, part in zip(cell.hf, cell.op.to_hf(tuple(view(there, r) for r in cell.megatron)), strict=True):
            view(back, ref)[...] = part
    assert all(np.array_equal(back[name], source[name]) for name in model.hf)


# (family, what config.json says of a published model, its parameters as published)
PUBLISHED = {
    "gpt_oss 120b": ("gpt_oss", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 128,
    }, 116_829_156_672),
    "llama31 8b": ("llama31", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    }, 8_030_261_248),
    "llama31 405b": ("llama31", {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    }, 405_853_388_800),
    "qwen25 0.5b": ("qwen25", {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    }, 494_032_768),
    "qwen3 235b": ("qwen3", {
        "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    }, 235_093_634_560),
    "deepseek_v3": ("deepseek_v3", {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "vocab_size": 129280, "n_routed_experts": 256, "n_shared_experts": 1,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 3,
    }, 684_489_845_504),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_go_in_small_pieces(name):
    family, sizes, parameters = PUBLISHED[name]
    model = FAMILIES[family].rules(FAMILIES[family].tiny_config() | sizes)
    rules.check_coverage(model.cells, model.hf, model.megatron)
    assert sum(math.prod(info.shape) for info in model.hf.values()) == parameters
    largest = max(sum(TensorInfo(r.shape(model.hf[r.name].shape)).bytes for r in cell.hf) for cell in model.cells)
    group = 2 * 18 * 128 * 16384  # of queries, keys and values, which is not cut; that of Llama 405B is the largest
    assert largest <= (group if name == "llama31 405b" else 1.2 * rules.MAX_CELL_BYTES)


def view(tensors: dict[str, np.ndarray], ref: Ref) -> np.ndarray:
    part = tensors[ref.name][ref.index]
    return part if ref.rows is None else part[slice(*ref.rows)]


def test_large_tensors_go_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", 100)
    info = TensorInfo((10, 20))
    cells = list(rules.by_rows((Ref("a"),), Ref("b"), info))
    assert len(cells) == 5 and cells[1].hf[0].rows == cells[1].megatron[0].rows == (2, 4)
    rules.check_coverage(cells, {"a": info}, {"b": info})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("b"), "tensor b is missing"),
        (lambda t: t.update(z=TensorInfo((1,))), "unexpected tensor z"),
        (lambda t: t.update(b=TensorInfo((3,))), r"tensor b has shape \[3\], but config.json needs \[2\]"),
    ],
)
def test_every_tensor_is_accounted_for(change, message):
    wanted = {"a": TensorInfo((1,)), "b": TensorInfo((2,))}
    found = dict(wanted)
    change(found)
    with pytest.raises(DataError, match=message):
        rules.check_tensors(found, wanted, "model")
