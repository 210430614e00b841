"""PREFIX.bin and PREFIX.idx, byte by byte, and what `train` makes of them before it starts."""

from __future__ import annotations

import hashlib
import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from slipway.errors import DataError
from slipway.tokens import indexed, scan
from slipway.tokens.indexed import Documents, index_of, write_index
from slipway.tokens.lines import Index, Lines, as_line, read_line


def written(folder: Path, lengths: list[int], ends: list[bool], dtype: type = np.uint16) -> Path:
    """A .bin of the tokens 0, 1, 2, … with its index."""
    tokens = np.arange(sum(lengths), dtype=dtype)
    (folder / "a.bin").write_bytes(tokens.tobytes())
    with (folder / "a.idx").open("wb") as file:
        write_index(file, dtype, np.array(lengths, np.int32), np.array(ends, bool))
    return folder / "a.bin"


@pytest.mark.parametrize("chunk", [1, 2, 1 << 22])
@pytest.mark.parametrize("dtype, code", [(np.uint16, 8), (np.int32, 4)])
def test_the_index(monkeypatch, chunk, dtype, code):
    """As megatron/core/datasets/indexed_dataset.py reads it; the byte where each begins, however many are summed up."""
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    file = io.BytesIO()
    write_index(file, dtype, np.array([3, 1, 5], np.int32), np.array([False, True, True]))
    size = np.dtype(dtype).itemsize
    wanted = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 3, 3) + struct.pack("<3i", 3, 1, 5)
    wanted += struct.pack("<3q", 0, 3 * size, 4 * size) + struct.pack("<3q", 0, 2, 3)
    assert file.getvalue() == wanted


def test_names_of_the_pair():
    assert [str(index_of(Path(name))) for name in ("a.bin", "a.idx", "a", "a.b")] == [
        "a.idx",
        "a.idx",
        "a.idx",
        "a.b.idx",
    ]


def test_either_name_opens_the_pair(tmp_path):
    written(tmp_path, [2, 3], [True, True])
    for name in ("a.bin", "a.idx", "a"):
        found = Documents.open(tmp_path / name)
        assert found.tokens.tolist() == [0, 1, 2, 3, 4] and found.lengths.tolist() == [2, 3]


@pytest.mark.parametrize("cut", [1, 8, 9, 20])
def test_an_index_that_is_cut_off(tmp_path, cut):
    file = index_of(written(tmp_path, [2, 3], [True, True]))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match="is damaged, or its version is not 1"):
        Documents.open(tmp_path / "a.bin")


def test_what_train_gets_of_texts(tmp_path):
    file = written(tmp_path, [4, 6], [True, True])
    found = scan.scan(file, 3, 10)
    assert found.offsets.tolist() == [0, 3, 6] and found.lengths.tolist() == [4, 4, 4] and len(found) == 3
    assert (found.too_long, found.lost, found.packs, found.starts) == (0, 0, None, None)
    assert found.digest == hashlib.sha256(index_of(file).read_bytes()).hexdigest()
    units = scan.open_units(file, found, 3)
    assert [unit.response for each in range(3) for unit in units[each]] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(DataError, match="token 9 is 9, the model's vocabulary has 9 tokens"):
        scan.scan(file, 3, 9)
    with pytest.raises(DataError, match="has 10 tokens, a sample needs 11"):
        scan.scan(file, 10, 10)
    assert len(scan.scan(file, 9, 10)) == 1


def test_what_train_gets_of_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_line([1], [2, 3]) + as_line([], [4, 5]) + as_line([1] * 9, [2]))
    found = scan.scan(file, 5, 10)
    assert (len(found), found.lengths.tolist(), found.too_long, found.lost) == (2, [3, 2], 1, 10)
    packed = scan.scan(file, 5, 10, packed=True)
    assert [pack.tolist() for pack in packed.packs] == [[0, 1]], (
        "of three and of two tokens: two places and one of five"
    )
    assert len(scan.scan(file, 4, 10, packed=True).packs) == 1, "the last token of each has no place of its own"
    assert isinstance(scan.open_units(file, found, 5), Lines)
    assert not scan.is_indexed(file) and scan.is_indexed(Path("a.bin"))


def test_spans_that_are_not_learned_may_touch():
    line = b'{"inputs": {"p_ids": [], "r_ids": [1, 2, 3, 4], "context": [[0, 1], [1, 2], [2, 2]]}}'
    assert read_line(line, "x").context == ((0, 1), (1, 2), (2, 2))
    for spans in (
        b"[[1, 2], [0, 1]]",
        b"[[0, 5]]",
        b"[[3, 5]]",
        b"[[-1, 1]]",
        b"[[0, 4]]",
        b"[[0, 2], [1, 3]]",
        b"[[2, 1]]",
    ):
        with pytest.raises(DataError, match="not a sample"):
            read_line(line.replace(b"[[0, 1], [1, 2], [2, 2]]", spans), "x")


def test_what_the_workers_get_is_what_was_scanned(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(as_line([], [*range(1, size + 1)]) for size in (3, 4, 2, 9, 3)))
    found = scan.scan(file, 5, 10, packed=True)
    found.save(tmp_path / "kept.npz")
    again = Index.load(tmp_path / "kept.npz")
    for name in ("offsets", "lengths", "starts"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
    assert [pack.tolist() for pack in again.packs] == [pack.tolist() for pack in found.packs] and len(again.packs) > 2
    assert re.fullmatch(r"\d+ samples of up to 4 tokens; packed into \d sequences of 5, which are \d+\.\d% full",
                        found.describe(5))  # fmt: skip
    file.write_bytes(as_line([1], [2]) * 3)
    assert scan.scan(file, 4, 10).describe(4) == "3 samples of up to 2 tokens; sequences of 4, which are 25.0% full"


def test_all_names_are_there():
    assert {name for name in scan.__all__ if not hasattr(scan, name)} == set() and not scan.is_indexed(Path("a.jsonl"))


def test_files_that_need_each_other(tmp_path):
    file = written(tmp_path, [4, 6], [True, True])
    for gone in (index_of(file), file):
        content = gone.read_bytes()
        gone.unlink()
        with pytest.raises(DataError, match=f"^{gone} does not exist; .bin and .idx need each other; copy both$"):
            Documents.open(file)
        gone.write_bytes(content)
    assert len(Documents.open(file).tokens) == 10


# As Megatron numbers them; its 6 and 7 are floating point.
NUMBERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@pytest.mark.parametrize("number, dtype", NUMBERS.items())
def test_every_dtype_has_megatron_s_number(tmp_path, number, dtype):
    file = tmp_path / "a.bin"
    np.arange(5, dtype=dtype).tofile(file)
    with index_of(file).open("wb") as index:
        indexed.write_index(index, dtype, np.array([2, 3], np.int32), np.array([True, True]))
    assert index_of(file).read_bytes()[17] == number
    found = Documents.open(file)
    assert found.tokens.dtype == dtype and found.tokens.tolist() == [0, 1, 2, 3, 4]
