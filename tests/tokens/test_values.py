"""Values that JSON lines cannot hold, and answers that look like messages: written right, or named by file and row."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from sets import PLAIN, model_with, processed, write_rows
from slipway.errors import DataError

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
DAY = datetime.datetime(2026, 1, 2, 3, 4)


@pytest.fixture
def model(mxfp4_model, tmp_path):
    return model_with(mxfp4_model, tmp_path / "model", PLAIN)


@pytest.fixture
def tabled(model, tmp_path):
    """tabled(rows, type of "messages") → the samples of a parquet file, marked."""

    def run(rows: list[Any], kind: Any = None) -> list[str]:
        column = arrow.array(rows, kind and arrow.list_(kind))
        parquet.write_table(arrow.table({"messages": column}), tmp_path / "in.parquet")
        return processed(model, tmp_path / "in.parquet")[0]

    return run


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def message_with(arguments: Any) -> Any:
    """The type of a message whose calls have such arguments."""
    function = arrow.struct([("name", arrow.string()), ("arguments", arguments)])
    calls = arrow.list_(arrow.struct([("function", function)]))
    return arrow.struct([("role", arrow.string()), ("content", arrow.string()), ("tool_calls", calls)])


@pytest.mark.parametrize("kind, pairs, written", [
    (arrow.map_(arrow.string(), arrow.string()), [("city", "Paris"), ("day", None)], '{"city": "Paris"}'),
    (arrow.map_(arrow.string(), arrow.map_(arrow.string(), arrow.int64())), [("a", [("b", 1)])], '{"a": {"b": 1}}'),
    (arrow.map_(arrow.int32(), arrow.bool_()), [(7, True)], '{"7": true}'),
])  # fmt: skip
def test_a_map_is_an_object(tabled, kind, pairs, written):
    found = tabled([[USER, calling(pairs), SAYS]], message_with(kind))
    assert f'⟦{{"name": "f", "arguments": {written}}}<|end|>⟧' in found[0]


def test_a_map_with_a_key_twice_is_named(tabled):
    rows = [[USER, calling([("a", "x")])], [USER, calling([("a", "x"), ("a", "y")])]]
    with pytest.raises(DataError, match=r"in.parquet: row 2: a map has the same key twice; leave one"):
        tabled(rows, message_with(arrow.map_(arrow.string(), arrow.string())))


@pytest.mark.parametrize("value, written", [
    (DAY, '"2026-01-02T03:04:00"'), (DAY.date(), '"2026-01-02"'), (DAY.time(), '"03:04:00"'),
    (DAY.replace(tzinfo=datetime.UTC), '"2026-01-02T03:04:00+00:00"'),
    (decimal.Decimal("1.50"), "1.5"), (decimal.Decimal("12345678901234567890"), "12345678901234567890"),
    ([DAY.date()], '["2026-01-02"]'),
])  # fmt: skip
def test_days_and_numbers_of_tables(tabled, value, written):
    wanted = f'⟦{{"name": "f", "arguments": {{"x": {written}}}}}<|end|>⟧\n<|tool|>{{"x": {written}}}<|end|>'
    call = calling({"x": value})
    assert wanted.split("\n")[0] in tabled([[USER, call, SAYS]])[0]
    tool = {"role": "tool", "content": {"x": value}}
    assert f'<|tool|>{{"x": {written}}}<|end|>' in tabled([[tool, {"role": "assistant", "value": "a"}]])[0]


@pytest.mark.parametrize("value, said", [
    (b"ab", r"bytes \(b'ab'\)"),
    (datetime.timedelta(1), "timedelta"), (decimal.Decimal("0.1234567890123456789"), "Decimal"),
])  # fmt: skip
def test_what_json_has_no_place_for_is_named(tabled, value, said):
    with pytest.raises(DataError, match=rf"in.parquet: row 1: message 2: it holds {said}.*; write it as text"):
        tabled([[USER, calling({"x": value})]])
    with pytest.raises(DataError, match=rf"in.parquet: row 1: message 1: it holds {said}.*; write it as text"):
        tabled([[{"role": "tool", "content": {"x": value}}, {"role": "assistant", "value": "a"}]])


@pytest.mark.parametrize("row, said", [
    *(({"messages": [{"role": "user", "content": content}, SAYS]}, "its content is a list that holds more")
      for content in ([None], [1], ["a", None], [{"text": "a"}], [["a"]])),
    *(({"inputs": {"p_ids": p, "r_ids": r}}, "lists of token ids") for p, r in
      (([1], [1 << 63]), ([1 << 31], [1]), ([1], [10**25]), ("a", "b"), ([1], {"a": 1}))),
    *(({"instruction": "q", "output": "a", "history": history}, "history")
      for history in ([1], [None], ["ab"], [{}], {"a": 1})),
    ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
])  # fmt: skip
@pytest.mark.parametrize("eval_split", ["", "50%"])
def test_what_is_malformed_is_named(model, tmp_path, row, said, eval_split):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"in.jsonl:2: .*{said}"):
        processed(model, tmp_path / "in.jsonl", eval_split=eval_split)


MESSAGES = json.dumps([USER, SAYS])


@pytest.mark.parametrize("prompt, completion", [
    ("Extract: Bob", '[{"name": "Bob"}]'), ("A chat", MESSAGES), (MESSAGES, "it has two messages"),
    ('[{"a": 1}]', '[{"b": 2}]'), ("x", '[{"role": 1}]'),
    (MESSAGES, '[{"role": "x"}, {"name": "Bob"}]'), (MESSAGES, '{"role": "user"}'), (MESSAGES, "[]"),
])  # fmt: skip
@pytest.mark.parametrize("key", ["completion", "response"])
def test_json_in_a_text_is_text(model, tmp_path, prompt, completion, key):
    rows = [{"prompt": prompt, key: completion}]
    assert processed(model, write_rows(tmp_path / "in.jsonl", rows))[0] == [f"{prompt}⟦{completion}<|end|>⟧"]


def test_messages_on_both_sides_in_csv(model, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), (json.dumps([USER]), json.dumps([SAYS]))])
    assert processed(model, tmp_path / "in.csv")[0] == ["<|user|>q<|end|>\n<|assistant|>⟦a<|end|>⟧"]
    rows = [{"prompt": [USER], "completion": "[1]"}, {"prompt": [USER], "completion": json.dumps([SAYS])}]
    found, _ = processed(model, write_rows(tmp_path / "in.jsonl", rows))
    assert found == [f"<|user|>q<|end|>\n<|assistant|>⟦{answer}<|end|>⟧" for answer in ("[1]", "a")]
