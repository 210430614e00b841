"""Data files: what is accepted, what is said of the rest, and an order that no layout changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from entrypoints.errors import DataError
from entrypoints.training.lines import index_lines


def write(path: Path, samples: list) -> Path:
    path.write_text("".join(json.dumps({"inputs": {"p_ids": p, "r_ids": r}}) + "\n" for p, r in samples))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data.jsonl", [([i] * (i % 4), [i, i + 1, i + 2][: 1 + i % 3]) for i in range(1, 40)])


def samples(path: Path, count: int, seed: int = 1, seq_length: int = 16):
    from entrypoints.training.samples import Samples

    return Samples(path, index_lines(path, seq_length, 100), count, seq_length, seed)


def test_a_sample_is_shifted_masked_and_padded(tmp_path):
    found = samples(write(tmp_path / "x", [([7, 8], [9, 10])]), 1, seq_length=6)[0]
    assert found["tokens"].tolist() == [7, 8, 9, 0, 0, 0]
    assert found["labels"].tolist() == [8, 9, 10, 0, 0, 0]
    assert found["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0]
    assert found["position_ids"].tolist() == list(range(6))


def test_each_epoch_holds_every_line_once_in_another_order(data):
    found = samples(data, 3 * 39)
    epochs = [[found._line_of(39 * epoch + i) for i in range(39)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(39)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(39))


def test_a_sample_depends_on_seed_and_number_alone(data):
    forward, backward = samples(data, 100), samples(data, 100)
    wanted = [forward[i] for i in range(100)]
    for i in reversed(range(100)):
        assert all(torch.equal(wanted[i][key], tensor) for key, tensor in backward[i].items())
    other = samples(data, 100, seed=2)
    assert [other._line_of(i) for i in range(39)] != [forward._line_of(i) for i in range(39)]
    rate = torch.stack([sample["drop_if_easy"] for sample in wanted]).float().mean().item()
    assert rate == pytest.approx(0.6, abs=0.05)


def test_long_lines_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "x", [([1] * 7, [2]), ([1] * 6, [2]), ([], [1] * 8), ([], [1, 2])])
    index = index_lines(path, 8, 100)
    lines = path.read_bytes().splitlines(keepends=True)
    assert index.too_long == 2
    assert index.offsets.tolist() == np.cumsum([0, *map(len, lines)])[[1, 3]].tolist()


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "null", "{}", '{"inputs": 3}', '{"inputs": {"p_ids": [1]}}', "\xff\xfe",
     '{"inputs": {"p_ids": [1], "r_ids": []}}',
     '{"inputs": {"p_ids": "ab", "r_ids": [1]}}', '{"inputs": {"p_ids": [1.5], "r_ids": [1]}}',
     '{"inputs": {"p_ids": [-1], "r_ids": [1]}}', '{"inputs": {"p_ids": [true], "r_ids": [1]}}'],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path, line):
    path = write(tmp_path / "x", [([1], [2])])
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"x:2: not a sample .*preprocess"):
        index_lines(path, 8, 100)


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"x:1: a token id is 100, the model's vocabulary has 100"):
        index_lines(write(tmp_path / "x", [([1], [100])]), 8, 100)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample is left"):
        index_lines(write(tmp_path / "x", [([1], [2, 3])]), 3, 100)
