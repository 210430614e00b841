"""Data files: what is accepted, what is said of the rest, and an order that no layout changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slipway.errors import DataError
from slipway.tokens.indexed import write_index
from slipway.tokens.lines import as_line, index_lines, pack
from slipway.tokens.scan import Index, open_units, scan
from slipway.training.samples import Samples


def write(path: Path, samples: list) -> Path:
    path.write_text("".join(json.dumps({"inputs": {"p_ids": p, "r_ids": r}}) + "\n" for p, r in samples))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", [([i] * (i % 4 or 1), [i, i + 1, i + 2][: 1 + i % 3]) for i in range(1, 40)])


def samples(path: Path, count: int, seed: int = 1, seq_length: int = 16):
    return Samples([open_units(path, scan(path, seq_length, 100), seq_length)], count, seq_length, seed)


def test_a_sample_is_shifted_masked_and_padded(tmp_path):
    found = samples(write(tmp_path / "x", [([7, 8], [9, 10])]), 1, seq_length=6)[0]
    assert found["tokens"].tolist() == [7, 8, 9, 0, 0, 0]
    assert found["labels"].tolist() == [8, 9, 10, 0, 0, 0]
    assert found["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0]
    assert found["position_ids"].tolist() == list(range(6))


def test_each_epoch_holds_every_line_once_in_another_order(data):
    found = samples(data, 3 * 39)
    epochs = [[found.unit_of(39 * epoch + i)[1] for i in range(39)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(39)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(39))


def test_a_sample_depends_on_seed_and_number_alone(data):
    forward, backward = samples(data, 100), samples(data, 100)
    wanted = [forward[i] for i in range(100)]
    for i in reversed(range(100)):
        assert all(torch.equal(wanted[i][key], tensor) for key, tensor in backward[i].items())
    other = samples(data, 100, seed=2)
    assert [other.unit_of(i) for i in range(39)] != [forward.unit_of(i) for i in range(39)]
    rate = torch.stack([sample["drop_if_easy"] for sample in wanted]).float().mean().item()
    assert rate == pytest.approx(0.6, abs=0.05)


def test_another_thread_can_be_in_another_epoch(data):
    found = samples(data, 100)
    wanted = [found.unit_of(number) for number in range(78)]

    class Shared(list):
        """Another thread always puts its own epoch there at once."""

        def __setitem__(self, part, known):
            super().__setitem__(part, (known[0] + 1000, np.roll(known[1], 1)))

    found._epochs = Shared(found._epochs)
    assert [found.unit_of(number) for number in range(78)] == wanted


def test_long_lines_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "x", [([1] * 7, [2]), ([1] * 6, [2]), ([], [1] * 8), ([], [1, 2])])
    index = index_lines(path, 8, 100)
    lines = path.read_bytes().splitlines(keepends=True)
    assert index.too_long == 1
    assert index.offsets.tolist() == np.cumsum([0, *map(len, lines)])[1:4].tolist()


def test_a_text_that_is_longer_than_a_sequence_is_cut_and_nothing_is_lost(tmp_path):
    """Whatever sequence length `preprocess` had: only a sample with a prompt can be too long."""
    text = list(range(1, 20))
    index = index_lines(write(tmp_path / "x.jsonl", [([], text), ([5], [6])]), 8, 100)
    index.save(tmp_path / "index.npz")
    units = open_units(tmp_path / "x.jsonl", Index.load(tmp_path / "index.npz"), 8)
    found = [units[unit][0] for unit in range(len(units))]
    assert [sample.response for sample in found] == [text[:7], text[7:14], text[14:], [6]]
    assert index.too_long == 0 and index.lengths.tolist() == [7, 7, 5, 2]


def test_one_token_alone_is_dropped_and_counted(tmp_path):
    """It predicts nothing, and a micro batch of it alone would have no positions to compute."""
    path = write(tmp_path / "x.jsonl", [([], [5]), ([5], [6]), ([], [7])])
    index = index_lines(path, 8, 100)
    assert index.lengths.tolist() == [2] and (index.too_short, index.too_long, index.lost) == (2, 0, 0)
    assert "1 samples of up to 2 tokens, 2 dropped for one token alone;" in index.describe(8)
    with pytest.raises(DataError, match="no sample is left, 1 have 2 tokens or more and 2 one token alone"):
        index_lines(path, 2, 100)
    with pytest.raises(DataError, match="no sample is left"):  # windows of a text, each too short
        index_lines(write(tmp_path / "text.jsonl", [([], [5, 6, 7])]), 2, 100)


def test_context_in_the_response_is_not_learned(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_line([1, 2], [3, 4, 5, 6, 7], ((1, 3),)) + as_line([], [8, 9, 8, 9], ((0, 2),)))
    index = scan(path, 12, 100, packed=True)
    found = Samples([open_units(path, index, 12)], 1, 12, 1, packed=True, shuffled=False)[0]
    assert found["labels"].tolist()[:9] == [2, 3, 4, 5, 6, 7, 9, 8, 9]
    assert found["loss_mask"].tolist()[:9] == [0, 1, 0, 0, 1, 1, 0, 1, 1]
    whole = Samples([open_units(path, index, 12)], 1, 12, 1, packed=True, learn_prompts=True, shuffled=False)[0]
    assert whole["loss_mask"].tolist()[:9] == [1] * 9


def test_packed_samples_keep_their_bounds(tmp_path):
    path = write(tmp_path / "x.jsonl", [([7, 8], [9, 10]), ([], [1] * 5), ([3, 5], [4])])
    index = scan(path, 6, 100, packed=True)
    assert list(map(list, index.packs)) == [[1, 2], [0]] and len(index) == 2
    index.save(tmp_path / "index.npz")
    units = open_units(path, Index.load(tmp_path / "index.npz"), 6)
    one, other = (Samples([units], 2, 6, 1, packed=True, shuffled=False)[i] for i in range(2))
    assert one["tokens"].tolist() == [1, 1, 1, 1, 3, 5] and one["labels"].tolist() == [1, 1, 1, 1, 5, 4]
    assert one["loss_mask"].tolist() == [1, 1, 1, 1, 0, 1] and one["cu_seqlens"].tolist() == [0, 4, 6]
    assert one["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert other["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0] and other["cu_seqlens"].tolist() == [0, 3, 6]
    both = Samples([units], 2, 6, 1, packed=True, joined=2, shuffled=False)
    assert len(both) == 1 and both[0].keys() == one.keys()
    assert both[0]["cu_seqlens"].tolist() == [0, 4, 6, 9, 12]
    assert all(torch.cat([one[key], other[key]]).equal(both[0][key]) for key in one if key != "cu_seqlens")
    assert Samples([units], 2, 6, 1, learn_prompts=True, shuffled=False)[0]["loss_mask"].tolist() == [1] * 6


def test_packed_samples_can_be_shared_in_equal_parts(tmp_path):
    path = write(tmp_path / "x.jsonl", [([7, 8], [9, 10]), ([], [1] * 6), ([3, 5], [4])])
    index = scan(path, 8, 100, packed=True, multiple=4)
    units = open_units(path, index, 8)
    assert list(map(list, index.packs)) == [[1], [0, 2]], "six places would do for the second, and four of the first"
    one, other = (Samples([units], 2, 8, 1, packed=True, multiple=4, shuffled=False)[i] for i in range(2))
    assert one["cu_seqlens"].tolist() == [0, 8] and one["is_real"].tolist() == [True] * 5 + [False] * 3
    assert other["cu_seqlens"].tolist() == [0, 4, 8]
    assert other["is_real"].tolist() == [True, True, True, False, True, True, False, False]
    assert other["tokens"].tolist()[:3] == [7, 8, 9] and other["labels"].tolist()[4:6] == [5, 4]
    assert other["loss_mask"].tolist() == [0, 1, 1, 0, 0, 1, 0, 0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_loses_nothing_and_nearly_fills(lengths):
    packs = pack(np.array(lengths, np.int32), 20)
    assert sorted(int(number) for each in packs for number in each) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in each) for each in packs]
    assert max(filled) <= 20
    assert sum(1 for each in filled if each <= 10) <= 1, "two half-empty sequences would have been one"


def test_windows_hold_every_token_once_as_a_label(tmp_path):
    write_texts(tmp_path / "x.bin", [[1, 2, 3], [4, 5, 6, 7], [8, 9]])
    units = open_units(tmp_path / "x.bin", scan(tmp_path / "x.bin", 4, 100), 4)
    found = [Samples([units], 2, 4, 1, shuffled=False)[i] for i in range(2)]
    assert [sample["tokens"].tolist() for sample in found] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [sample["labels"].tolist() for sample in found] == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert all(sample["loss_mask"].all() for sample in found)


@pytest.mark.parametrize("suffix", ["jsonl", "bin"])
def test_a_file_that_becomes_shorter_or_another_one_while_it_is_read(tmp_path, suffix):
    """A mapped file would have the process killed here, without a word."""
    path, long = tmp_path / f"x.{suffix}", list(range(1, 90)) * 2000
    write(path, [([1], long), ([2], long)]) if suffix == "jsonl" else write_texts(path, [long, long])
    length = 200_000 if suffix == "jsonl" else 1000
    units = open_units(path, scan(path, length, 100), length)
    wanted = [units[number] for number in range(len(units))]
    assert suffix == "bin" or [sample.response == long for (sample,) in wanted] == [True, True]
    (tmp_path / "other").write_bytes(path.read_bytes()[::-1])
    os.link(path, tmp_path / "same")
    os.replace(tmp_path / "other", path)
    assert [units[number] for number in range(len(units))] == wanted
    os.truncate(tmp_path / "same", 5000)
    assert suffix == "jsonl" or units[0] == wanted[0]
    with pytest.raises(DataError, match=rf"x.{suffix} has become shorter, it ends before byte .*; restore it"):
        units[len(units) - 1]


def write_texts(path: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    path.write_bytes(b"".join(np.array(each, dtype).tobytes() for each in documents))
    with path.with_suffix(".idx").open("wb") as file:
        write_index(file, dtype, np.array([len(each) for each in documents], np.int32), np.ones(len(documents), bool))
    return path


def test_damaged_texts_are_named(tmp_path):
    path, index = write_texts(tmp_path / "x.bin", [[1, 2, 3], [4, 5, 99]]), tmp_path / "x.idx"
    for seq_length, vocab_size, message in ((6, 100, "has 6 tokens"), (2, 99, "token 5 is 99")):
        with pytest.raises(DataError, match=message):
            scan(path, seq_length, vocab_size)
    whole = index.read_bytes()
    for content, message in (
        (b"", "not an index of Megatron's"),
        (b"X" + whole[1:], "not an index of Megatron's"),
        (whole[:-9], "damaged"),
        (whole[:9] + b"\x02" + whole[10:], "its version is not 1"),
        (whole[:34] + b"\x07" + whole[35:], "has 12 bytes"),
    ):
        index.write_bytes(content)
        with pytest.raises(DataError, match=message):
            scan(path, 2, 100)
    index.unlink()
    with pytest.raises(DataError, match=r"x\.idx does not exist"):
        scan(path, 2, 100)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "null", "{}", '{"inputs": 3}', '{"inputs": {"p_ids": [1]}}', "\xff\xfe",
     '{"inputs": {"p_ids": [1], "r_ids": []}}',
     '{"inputs": {"p_ids": "ab", "r_ids": [1]}}', '{"inputs": {"p_ids": [1.5], "r_ids": [1]}}',
     '{"inputs": {"p_ids": [1], "r_ids": [1, 2], "context": [[0, 3]]}}',
     '{"inputs": {"p_ids": [1], "r_ids": [1, 2], "context": [[0, 2]]}}',
     '{"inputs": {"p_ids": [1], "r_ids": [1, 2], "context": [[1, 0]]}}',
     '{"inputs": {"p_ids": [1], "r_ids": [1, 2], "context": [3]}}',
     '{"inputs": {"p_ids": [-1], "r_ids": [1]}}', '{"inputs": {"p_ids": [true], "r_ids": [1]}}'],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path, line):
    path = write(tmp_path / "x", [([1], [2])])
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"x:2: not a sample.*preprocess"):
        index_lines(path, 8, 100)


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"x:1: a token id is 100, the model's vocabulary has 100"):
        index_lines(write(tmp_path / "x", [([1], [100])]), 8, 100)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample is left"):
        index_lines(write(tmp_path / "x", [([1], [2, 3])]), 3, 100)
