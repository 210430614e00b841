"""Several files in one run, by their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from slipway.errors import UsageError
from slipway.tokens.blend import Part, as_text, order, parts_of


def test_weights_become_shares():
    assert parts_of("a.bin:3,b.bin:1") == [Part(Path("a.bin"), 0.75), Part(Path("b.bin"), 0.25)]
    assert parts_of("a.bin:7e0,dir/b.bin:.5") == [Part(Path("a.bin"), 7 / 7.5), Part(Path("dir/b.bin"), 0.5 / 7.5)]
    assert parts_of("a:b.bin:1,c.bin:1")[0].path == Path("a:b.bin"), "the last colon counts"
    assert parts_of("a.bin:2") == [Part(Path("a.bin"), 1.0)]


def test_one_path_is_one_part_whatever_is_in_its_name(tmp_path):
    assert parts_of("a.bin") == [Part(Path("a.bin"), 1.0)]
    assert parts_of("dir:3/a.bin") == [Part(Path("dir:3/a.bin"), 1.0)]
    odd = tmp_path / "a.bin:2,b.bin:3"
    odd.touch()
    assert parts_of(str(odd)) == [Part(odd, 1.0)]


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan", "x", "", "1:"])
def test_what_is_no_weight_is_named(weight):
    with pytest.raises(UsageError, match=r"--data .*is not PATH:WEIGHT with a weight above 0; write it as a.bin:0.7"):
        parts_of(f"a.bin:{weight},b.bin:1")


def test_what_is_no_blend_is_named_with_its_flag():
    for data in (":1,b.bin:1", "a.bin,b.bin:1"):
        with pytest.raises(UsageError, match=f"^--data {data}: "):
            parts_of(data)
    with pytest.raises(UsageError, match=r"^--eval-data .*names a\.bin twice; name it once with the sum"):
        parts_of("a.bin:1,b.bin:1,a.bin:2", "--eval-data")


def test_the_same_parts_come_back_from_their_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert as_text(parts_of("a.bin")) == str(tmp_path / "a.bin")
    text = as_text(parts_of("a.bin:3,b.bin:1"))
    assert text == f"{tmp_path}/a.bin:0.75,{tmp_path}/b.bin:0.25"
    assert [part.share for part in parts_of(text)] == [0.75, 0.25]


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.75, 0.25], [0.7, 0.2, 0.1], [0.999, 0.001]])
def test_every_stretch_is_a_blend(shares):
    parts, numbers = order(shares, 2000)
    assert parts.dtype == np.int16 and len(parts) == len(numbers) == 2000
    for part, share in enumerate(shares):
        assert numbers[parts == part].tolist() == list(range(int((parts == part).sum()))), "each in its own order"
        taken = np.cumsum(parts == part)
        assert np.abs(taken - share * np.arange(1, 2001)).max() <= 1, "never more than one ahead or behind"
    longer = order(shares, 3000)
    assert np.array_equal(longer[0][:2000], parts) and np.array_equal(longer[1][:2000], numbers)


def test_where_two_have_the_same_place_the_first_named_comes_first():
    parts, _ = order([0.5, 0.5], 6)
    assert parts.tolist() == [0, 1, 0, 1, 0, 1]
    assert order([0.75, 0.25], 5)[0].tolist() == [0, 0, 1, 0, 0], "half of a step in: not at the beginning of a stretch"
    assert order([1.0], 0)[0].tolist() == []
