"""What other programs write by mistake, or in a way of their own: it is read, or its cause is named."""

from __future__ import annotations

import csv
import json
import struct

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from sets import PLAIN, model_with, processed
from slipway.errors import DataError

USER, SAYS = {"role": "user", "content": "it's q"}, {"role": "assistant", "content": "a"}


@pytest.fixture
def model(mxfp4_model, tmp_path):
    return model_with(mxfp4_model, tmp_path / "model", PLAIN)


def frame(content: bytes) -> bytes:
    return arrow.Codec("zstd").compress(content).to_pybytes()


def skipped(content: bytes, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(content)) + content


def test_zstd_of_pzstd(model, tmp_path):
    """It writes the size of each frame in a frame before it, which is skipped."""
    parts = [frame(b'{"text": "row %d"}\n' % number) for number in range(3)]
    for number, before in ((0, b"1234"), (15, bytes(100_000))):
        content = b"".join(skipped(before, number) + part for part in parts)
        (tmp_path / "in.jsonl.zst").write_bytes(content)
        assert processed(model, tmp_path / "in.jsonl.zst")[0] == [f"⟦row {number}<|end|>⟧" for number in range(3)]


@pytest.mark.parametrize("name, content", [
    ("in.jsonl", b""), ("in.jsonl", b"\n \n"), ("in.json", b"[]"), ("in.json", b" "), ("in.csv", b""),
    ("in.csv", b"prompt,completion\n"), ("in.txt", b""), ("in.jsonl.zst", frame(b"")), ("in.jsonl.zst", skipped(b"1")),
    ("in.parquet", None),
])  # fmt: skip
def test_empty_data_is_said_to_be_empty(model, tmp_path, name, content):
    if content is None:
        parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is empty: there is no row and no text in it; give other data$"):
        processed(model, tmp_path / name)


@pytest.mark.parametrize("row", [
    {"messages": [USER, SAYS]}, {"conversations": [USER, SAYS]},
    {"messages": json.dumps([USER, SAYS]), "tools": [{"a": 1}]},
    {"messages": json.dumps([USER, SAYS]), "chat_template_kwargs": {"a": 1}},
    {"instruction": "q", "output": "a", "history": [["q", "a"]]},
])  # fmt: skip
def test_lists_as_python_prints_them_are_named(model, tmp_path, row):
    """So Dataset.to_csv and DataFrame.to_csv write them."""
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, [*map(str, row.values())]])
    with pytest.raises(DataError, match=r"in.csv:2: .* as Python prints it, not JSON; write it by json.dumps, or"):
        processed(model, tmp_path / "in.csv")


@pytest.mark.parametrize("separator", ["|", "^", "~", "\x1f"])
def test_another_separator_of_columns_is_named(model, tmp_path, separator):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("instruction", "output"), ('Say "hi", ok', "hi; there")])
    with pytest.raises(
        DataError, match=r"in.csv:1: its columns are separated by .*, which is not read; separate them by"
    ):
        processed(model, tmp_path / "in.csv")


def test_a_bar_in_a_name_is_no_separator(model, tmp_path):
    (tmp_path / "in.csv").write_text("prompt,completion,a|b\nq,a,x\n")
    (tmp_path / "in.tsv").write_text("prompt\tcompletion\ta|b|c|d\nq\ta\tx\n")
    assert processed(model, tmp_path / "in.csv")[0] == processed(model, tmp_path / "in.tsv")[0] == ["q⟦a<|end|>⟧"]


@pytest.mark.parametrize("content, said", [
    ({"data": [{"text": "a"}]},
     r"its keys are data; but the objects inside of data have one: .* jq -c '\.\[\"data\"\]\[\]' FILE"),
    ({"version": "1", "data": [{"instruction": "q", "output": "a"}]},
     "keys are version, data; but the objects inside of data"),
    ([{"train": [{"messages": [USER, SAYS]}]}], r":2, row 1: no form .* the objects inside of train have one"),
    ({"1": {"prompt": "q", "completion": "a"}, "2": {"prompt": "q", "completion": "a"}},
     r"keys are 1, 2; but the objects inside of it have one: .* jq -c '\.\[\]' FILE"),
    ({"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a", "1": "b"}},
     r"a table column by column \(prompt, completion\); write it row by row"),
    ({"prompt": ["q", "r"], "completion": ["a", "b"]}, r"a table column by column \(prompt, completion\)"),
    ({"dialog": [{"role": "user", "text": "q"}]}, "no form that is known: its keys are dialog; needed are"),
])  # fmt: skip
def test_what_stands_around_rows_is_named(model, tmp_path, content, said):
    """One object around all rows, or a table by its columns: `datasets` and pandas write and read such files."""
    (tmp_path / "in.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match=said):
        processed(model, tmp_path / "in.json")


def test_objects_beside_a_chat_are_no_rows(model, tmp_path):
    row = {"messages": [USER, SAYS], "tools": [{"input": "a", "output": "b"}], "sources": [{"text": "x"}]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    assert len(processed(model, tmp_path / "in.json")[0]) == 1
