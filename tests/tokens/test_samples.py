"""Samples that training reads by their number, and what becomes of rows that are malformed or empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from slipway.errors import DataError
from slipway.tokens.forms import form_of, present
from slipway.tokens.inputs import pieces
from slipway.tokens.lines import Index, Lines, Sample, as_line, index_lines
from slipway.tokens.messages import Malformed
from slipway.tokens.rows import rows_of
from slipway.tokens.scan import open_units, scan
from slipway.tokens.sources import recognise

SAMPLES = [Sample([1], [2, 3]), Sample([], [*range(5, 12)]), Sample([4], [5, 6, 7], ((0, 1),)), Sample([], [8, 9])]


def data(folder: Path, end: bytes = b"\n") -> Path:
    file = folder / "a.jsonl"
    file.write_bytes(b"".join(as_line(*sample) for sample in SAMPLES).removesuffix(b"\n") + end)
    return file


@pytest.mark.parametrize("end", [b"\n", b""])
def test_every_sample_is_found_by_its_number(tmp_path, end):
    file = data(tmp_path, end)
    units = Lines(file, index_lines(file, 20, 100))
    assert len(units) == 4 and [units[number] for number in range(4)] == [[sample] for sample in SAMPLES]
    assert units[2] == [SAMPLES[2]] and units[0] == [SAMPLES[0]], "in any order"


def test_a_text_is_read_in_parts_and_what_else_is_too_long_is_left_out(tmp_path):
    file = data(tmp_path)
    index = index_lines(file, 4, 100)
    units = Lines(file, index)
    parts = [Sample([1], [2, 3]), *(Sample([], part) for part in ([5, 6, 7], [8, 9, 10])), Sample([], [8, 9])]
    assert [sample for number in range(len(units)) for sample in units[number]] == parts
    assert (index.too_long, index.lost) == (1, 4), "of the seven tokens of the text the last has no label"
    assert index.starts is not None and index.starts.tolist() == [0, 0, 3, 0]


def test_samples_that_share_a_sequence_come_together(tmp_path):
    file = data(tmp_path)
    index = scan(file, 20, 100, packed=True)
    units = open_units(file, index, 20)
    assert len(units) == 1 and sorted(units[0]) == sorted(SAMPLES)


def test_what_was_changed_after_it_was_checked_is_named(tmp_path):
    file = data(tmp_path)
    index = index_lines(file, 20, 100)
    at = int(index.offsets[1])
    file.write_bytes(file.read_bytes().replace(b'"r_ids": [5', b'"r_ids": [x'))
    with pytest.raises(DataError, match=rf"a\.jsonl at byte {at}: not a sample"):
        Lines(file, index)[1]


def test_tokens_outside_of_the_vocabulary_are_named(tmp_path):
    file = data(tmp_path)
    assert len(index_lines(file, 20, 12)) == 4
    with pytest.raises(DataError, match=r"a\.jsonl:2: a token id is 11, the model's vocabulary has 11 tokens"):
        index_lines(file, 20, 11)
    file.write_bytes(as_line([50], [1]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: a token id is 50"):
        index_lines(file, 20, 50)


def test_the_digest_tells_other_places_from_these(tmp_path):
    digests = set()
    for samples in (SAMPLES, SAMPLES[:2], SAMPLES[::-1]):
        file = tmp_path / "x.jsonl"
        file.write_bytes(b"".join(as_line(*sample) for sample in samples))
        digests |= {index_lines(file, length, 100).digest for length in (6, 20)}
    assert len(digests) == 6


def test_how_full_sequences_are():
    index = Index(np.array([0, 9], np.int64), np.array([5, 3], np.int32), too_long=2)
    assert index.describe(8) == (
        "2 samples of up to 5 tokens, 2 dropped for 8 tokens or more; sequences of 8, which are 37.5% full"
    )


# ---------------------------------------------------------------------------- rows


def test_lines_without_a_row_are_passed_over_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\n{"text": "a"}\n  \t\r\n{"text": "b"}\n\n{"text": "c"}')
    (piece,) = pieces([recognise(file)])
    assert list(rows_of(piece)) == [(f"{file}:{line}", {"text": text}) for line, text in ((2, "a"), (4, "b"), (6, "c"))]


@pytest.mark.parametrize("content, said", [
    (b'{"text": "a"}\n{"text": "caf\xe9"}', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\); convert the file to UTF-8"),
    (b'{"text": "a"}\n{"text"}', r"a\.jsonl:2: not JSON \(.*\); fix or delete it"),
    (b'[{"text": "a"},\n{"text": "b"},\n{"text" "c"}]', r"a\.jsonl:3, row 3: not JSON"),
    (b'[{"text": "a"},\n"caf\xe9"]', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
])  # fmt: skip
def test_a_malformed_row_is_named_by_its_line(tmp_path, content, said):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        [row for piece in pieces([recognise(file)]) for row in rows_of(piece)]


def test_rows_under_our_names():
    row = {"ask": "q", "prompt": "other", "answer": None, "id": 3}
    assert present(row, {}) == {"ask": "q", "prompt": "other", "id": 3}
    assert present(row, {"ask": "prompt"}) == {"prompt": "q", "id": 3}, "ours gives way where theirs takes its name"
    assert present(row, {"reply": "completion"}) == {"ask": "q", "prompt": "other", "id": 3}
    assert present([1], {"ask": "prompt"}) == [1]


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_more_than_text_is_refused_where_there_is_some(key):
    with pytest.raises(Malformed, match=f"^{key} beside the text, which is not learned; only text is$"):
        form_of({"text": "a", key: ["x"]})
    assert form_of({"text": "a", key: []}).name == "text"


@pytest.mark.parametrize("label, refused", [
    *((label, True) for label in (True, False, 0, 1, "true", "False", "0", "1")), ("news", False), (0.5, False),
])  # fmt: skip
def test_a_label_that_says_which_answer_is_better(label, refused):
    row = {"prompt": "a", "completion": "b", "label": label}
    assert form_of({**row, "text": "t"}), "of a text it is the class"
    if refused:
        with pytest.raises(Malformed, match=r"^preference data \(label\)"):
            form_of(row)
    else:
        assert form_of(row).name == "prompt and completion"
