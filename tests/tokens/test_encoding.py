"""What becomes of rows and texts in one encoder, without a command around it."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from sets import PLAIN, model_with, write_rows
from slipway.arguments import parse
from slipway.commands.preprocess import preprocess
from slipway.errors import DataError, UsageError
from slipway.options import take
from slipway.tokens import inputs
from slipway.tokens.encoder import Encoder, Settings, _parts_of
from slipway.tokens.inputs import pieces
from slipway.tokens.lines import Sample
from slipway.tokens.rows import rows_of
from slipway.tokens.sources import recognise
from slipway.tokens.wanted import Wanted

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(scope="module")
def model(mxfp4_model, tmp_path_factory) -> Path:
    return model_with(mxfp4_model, tmp_path_factory.mktemp("encoding") / "model", PLAIN)


def encoded(model: Path, file: Path, **options: object) -> list[Sample]:
    encoder, counts = Encoder(Settings(model, 100, **options)), Counter[str]()
    found = [document.samples for piece in pieces([recognise(file)]) for document in encoder.documents(piece, counts)]
    return [sample for samples in found for sample in samples]


# ---------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("text", ["word " * 40, "a line\n" * 30, "x" * 137, "x" * 90 + " " + "y" * 90, " z" * 5])
def test_a_text_is_encoded_in_parts_of_which_none_is_long_and_none_short(text):
    parts = list(_parts_of(text, 20))
    assert "".join(parts) == text and max(map(len, parts)) <= 20
    assert all(len(part) >= 10 for part in parts[:-1]), "at least half of what is allowed, or there would be too many"


def test_parts_begin_with_white_space_where_there_is_some():
    assert list(_parts_of("aaaa bbbb cccc dddd", 12)) == ["aaaa bbbb", " cccc dddd"]
    assert list(_parts_of("aaaa\nbbbb\ncccc dddd", 12)) == ["aaaa\nbbbb", "\ncccc dddd"]
    assert list(_parts_of("a bbbbbbbbbbbbbbbb", 8)) == ["a bbbbbb", "bbbbbbbb", "bb"], (
        "not at once where it is too early"
    )
    assert list(_parts_of("", 8)) == []


def test_a_long_text_has_the_tokens_of_its_parts(model):
    encoder = Encoder(Settings(model, 100))
    text = "some words of a text " * 9
    whole = encoder.encode(text)
    encoder.longest = 40
    assert encoder.encode(text) == whole, "a part begins where the tokenizer would split in any case"
    encoder.longest = len(text)
    assert encoder.encode(text) == whole


# ---------------------------------------------------------------------------- samples that are too long


def cut(sample: Sample, seq_length: int, long: str, model: Path) -> tuple[list[Sample], dict[str, int]]:
    counts = Counter[str]()
    found = list(Encoder(Settings(model, seq_length, long=long))._fitting([sample], counts))
    return found, dict(counts)


def test_what_is_cut_ends_before_what_is_not_learned(model):
    sample = Sample([90], [*range(10)], ((2, 3), (5, 8)))
    for seq_length, response, context in (
        (11, [*range(9)], ((2, 3), (5, 8))),
        (10, [*range(5)], ((2, 3),)),  # the rest of the second turn would teach nothing
        (8, [*range(5)], ((2, 3),)),
        (7, [*range(5)], ((2, 3),)),
        (6, [*range(4)], ((2, 3),)),
        (5, [0, 1], ()),
        (4, [0, 1], ()),
        (3, [0], ()),
    ):
        found, counts = cut(sample, seq_length, "cut", model)
        assert found == [Sample([90], response, context)], seq_length
        assert counts == {"cut": 1, "lost": 10 - len(response)}


def test_a_sample_that_just_fits_is_left_as_it_is(model):
    sample = Sample([90], [*range(10)])
    for long in ("cut", "drop", "refuse"):
        assert cut(sample, 12, long, model) == ([sample], {})
    for long in ("drop", "refuse"):
        assert cut(sample, 11, long, model) == ([], {"dropped_too_long": 1, "lost": 11})
    assert cut(Sample([1] * 10, [2]), 11, "cut", model) == ([], {"dropped_too_long": 1, "lost": 11})
    for empty in (Sample([1, 2], []), Sample([], [3])):
        assert cut(empty, 11, "cut", model) == ([], {"dropped_empty": 1})
    assert cut(Sample([1], [2]), 11, "cut", model) == ([Sample([1], [2])], {})


# ---------------------------------------------------------------------------- rows


def test_what_is_not_set_is_as_the_help_says(model, tmp_path):
    rows = [CHAT, {"prompt": "q", "completion": "a"}, {"text": "t"}]
    file = write_rows(tmp_path / "x.jsonl", rows)
    told = {"append_eos": True, "learn": "all", "long": "refuse", "pairs": "auto", "arguments": "{}", "held_out": 0.0}
    assert encoded(model, file) == encoded(model, file, **told) and len(encoded(model, file)) == 3
    assert encoded(model, file, append_eos=False)[2].response == encoded(model, file)[2].response[:-1]


def test_arguments_of_the_template_reach_it(model, tmp_path):
    asks = PLAIN + "{% if shout is defined %}{{ shout }}{% endif %}"
    own = model_with(model, tmp_path / "asks", "{% if not shout %}" + PLAIN + "{% else %}" + asks + "{% endif %}")
    file = write_rows(tmp_path / "x.jsonl", [CHAT])
    with_it = encoded(own, file, arguments=json.dumps({"shout": "!"}))
    assert encoded(own, file) == encoded(model, file) != with_it


def test_a_null_is_named_as_a_null(model, tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [{"prompt": "q", "completion": None, "note": None}])
    with pytest.raises(DataError, match=r"keys are prompt .and null are completion, note."):
        encoded(model, file)


def test_every_row_is_named_by_its_place_whatever_pieces_it_is_read_in(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 40)
    monkeypatch.setattr("slipway.tokens.sources.BLOCK_BYTES", 30)
    rows = [{"text": f"row {number} {'x' * (number % 5 * 9)}"} for number in range(1, 30)]
    over_lines = ",\n\n".join(json.dumps(row, indent=1) for row in rows)
    for name, content in (("a.json", f"[\n{over_lines}]"), ("b.json", over_lines.replace(",\n\n", "\n"))):
        file = tmp_path / name
        file.write_text(content)
        cut_up = list(pieces([recognise(file)]))
        found = [place for piece in cut_up for place, _ in rows_of(piece)]
        begins = [number for number, line in enumerate(content.split("\n"), 1) if line.startswith(("{", "[{"))]
        assert len(cut_up) > 5 and sum(piece.size for piece in cut_up) <= file.stat().st_size
        assert found == [f"{file}:{line}, row {row}" for row, line in enumerate(begins, 1)]


def test_rows_of_lines_and_of_tables_are_named_too(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 90)
    monkeypatch.setattr("slipway.tokens.sources.BLOCK_BYTES", 30)
    rows = [{"text": f"row {number}"} for number in range(1, 30)]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, place in (("a.jsonl", ":"), ("a.jsonl.gz", ":"), ("a.parquet", ": row ")):
        cut_up = list(pieces([recognise(tmp_path / name)]))
        found = [row for piece in cut_up for row in rows_of(piece)]
        assert len(cut_up) > 2 and found == [(f"{tmp_path / name}{place}{n}", row) for n, row in enumerate(rows, 1)]


# ---------------------------------------------------------------------------- what a person must say


def test_a_tokenizer_is_asked_for():
    with pytest.raises(UsageError, match="--tokenizer is missing"):
        parse("preprocess", preprocess, ["in.jsonl", "out.jsonl"])
    found = parse("preprocess", preprocess, ["in.jsonl", "out.jsonl", "--tokenizer", "t"])[1]
    assert take(Wanted, found) == Wanted(tokenizer="t") and take(Wanted, found).held_out() == 0
