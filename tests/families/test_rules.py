"""The rules in both directions: what goes to Megatron comes back, and nothing is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
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


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 3), groups=st.integers(1, 3), queries=st.integers(1, 3), experts=st.integers(1, 4),
    hidden=st.sampled_from([32, 64]), ffn=st.sampled_from([32, 96]), dim=st.sampled_from([4, 16]),
)  # fmt: skip
def test_gpt_oss_of_any_shape_is_covered_and_comes_back(layers, groups, queries, experts, hidden, ffn, dim):
    family = FAMILIES["gpt_oss"]
    config = family.tiny_config() | {
        "num_hidden_layers": layers, "num_key_value_heads": groups, "num_attention_heads": groups * queries,
        "num_local_experts": experts, "hidden_size": hidden, "intermediate_size": ffn, "head_dim": dim,
        "vocab_size": 40,
    }  # fmt: skip
    hf, megatron = family.hf_tensors(config), family.megatron_tensors(config)
    cells = list(family.cells(config))
    rules.check_coverage(cells, hf, megatron)
    source = {name: torch.randn(info.shape) for name, info in hf.items()}
    there = {key: torch.full(info.shape, float("nan")) for key, info in megatron.items()}
    back = {name: torch.full(info.shape, float("nan")) for name, info in hf.items()}
    for cell in cells:
        for ref, part in zip(cell.megatron, cell.op.to_megatron(tuple(view(source, r) for r in cell.hf)), strict=True):
            view(there, ref).copy_(part)
    for cell in cells:
        for ref, part in zip(cell.hf, cell.op.to_hf(tuple(view(there, r) for r in cell.megatron)), strict=True):
            view(back, ref).copy_(part)
    assert all(torch.equal(back[name], source[name]) for name in hf)


def view(tensors: dict[str, torch.Tensor], ref: Ref) -> torch.Tensor:
    part = tensors[ref.name][ref.index]
    return part if ref.rows is None else part[slice(*ref.rows)]


def test_large_tensors_go_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", 100)
    info = TensorInfo((10, 20))
    cells = list(rules.same(Ref("a"), Ref("b"), info))
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
