"""The rules in both directions: what goes to Megatron comes back, and nothing is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrypoints.checkpoint.refs import Ref, TensorInfo
from entrypoints.errors import DataError
from entrypoints.families import FAMILIES, rules

sizes = st.integers(1, 6)


def identical(back: tuple, parts: tuple) -> bool:
    return len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))


@given(groups=sizes, queries=sizes, dim=sizes, width=st.integers(0, 5))
def test_qkv_comes_back(groups, queries, dim, width):
    tail = (width,) if width else ()  # a bias has no columns
    op = rules.GroupedQKV(groups, queries * dim, dim)
    parts = tuple(torch.randn(groups * rows * dim, *tail) for rows in (queries, 1, 1))
    (merged,) = op.to_megatron(parts)
    assert merged.shape[0] == groups * (queries + 2) * dim
    assert identical(op.to_hf((merged,)), parts)
    assert identical(op.to_megatron(op.to_hf((merged,))), (merged,))


def test_qkv_is_grouped_as_megatron_reads_it():
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
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
        parts = (torch.randn(shape),)
        assert identical(op.to_hf(op.to_megatron(parts)), parts)


def test_gate_is_the_even_rows():
    gate, up = rules.AlternatingRows().to_megatron((torch.arange(6).view(6, 1),))
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
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_models_of_any_shape_are_covered_and_come_back(name, cell_bytes, monkeypatch, data):
    """In whole tensors, and in the blocks that large tensors go in."""
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", cell_bytes)
    config = FAMILIES[name].tiny_config() | data.draw(shapes(name))
    model = FAMILIES[name].rules(config)
    rules.check_coverage(model.cells, model.hf, model.megatron)
    source = {name: torch.randn(info.shape) for name, info in model.hf.items()}
    for cell in model.cells:
        if isinstance(cell.op, rules.Copies):
            for copy in cell.hf[1:]:
                view(source, copy).copy_(view(source, cell.hf[0]))
    there = {key: torch.full(info.shape, float("nan")) for key, info in model.megatron.items()}
    back = {name: torch.full(info.shape, float("nan")) for name, info in model.hf.items()}
    for cell in model.cells:
        for ref, part in zip(cell.megatron, cell.op.to_megatron(tuple(view(source, r) for r in cell.hf)), strict=True):
            view(there, ref).copy_(part)
    for cell in model.cells:
        for ref, part in zip(cell.hf, cell.op.to_hf(tuple(view(there, r) for r in cell.megatron)), strict=True):
            view(back, ref).copy_(part)
    assert all(torch.equal(back[name], source[name]) for name in model.hf)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("llama31", {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 2, "head_dim": 128,
                     "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}),
        ("qwen25", {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 2, "vocab_size": 152064,
                    "num_attention_heads": 64, "num_key_value_heads": 8}),
    ],
)  # fmt: skip
def test_the_largest_models_go_in_small_pieces(name, sizes):
    model = FAMILIES[name].rules(FAMILIES[name].tiny_config() | sizes)
    rules.check_coverage(model.cells, model.hf, model.megatron)
    largest = max(sum(TensorInfo(r.shape(model.hf[r.name].shape)).bytes for r in cell.hf) for cell in model.cells)
    assert largest <= 1.2 * rules.MAX_CELL_BYTES


def view(tensors: dict[str, torch.Tensor], ref: Ref) -> torch.Tensor:
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
        (lambda t: t.update(z=TensorInfo((1,))), "tensor z has no place"),
        (lambda t: t.update(b=TensorInfo((3,))), r"tensor b has shape \[3\], config.json asks for \[2\]"),
    ],
)
def test_every_tensor_is_accounted_for(change, message):
    wanted = {"a": TensorInfo((1,)), "b": TensorInfo((2,))}
    found = dict(wanted)
    change(found)
    with pytest.raises(DataError, match=message):
        rules.check_tensors(found, wanted, "model")
