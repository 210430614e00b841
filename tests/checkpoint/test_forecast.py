"""--dry-run: what is counted, which pieces are tried, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from slipway.checkpoint import forecast
from slipway.checkpoint.stream import Piece, Plan
from slipway.errors import WriteError


def plan_of(tmp_path: Path, tried: list[int], count: int = 50, size: int = 10) -> Plan:
    (tmp_path / "source").write_bytes(bytes(7))

    def piece(number: int) -> Piece:
        def work():
            tried.append(number)
            time.sleep(0.002)
            yield "a", number * 3, b"abc"

        return Piece(size, work)

    sizes, small = {"a": 3 * count, "b": 5}, {"c": b"1234"}
    copies = {"d": tmp_path / "source", "e": tmp_path / "source"}
    return Plan(sizes, [piece(number) for number in range(count)], small, copies, "x")


def test_what_is_counted(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage(9, 8, 1234))
    tried: list[int] = []
    out = tmp_path / "new" / "folder" / "out"
    began = time.monotonic()
    found = forecast.forecast(plan_of(tmp_path, tried), out, "import", 1 << 20, began - 3.0)
    assert (found.command, found.out, found.reads, found.pieces) == ("import", str(out), 500, 50)
    assert (found.writes, found.files, found.free) == (150 + 5 + 4 + 14, 5, 1234) and asked == [tmp_path]
    assert 3.0 <= found.planned_in < 60 and sorted(tried) == list(range(50))
    assert 0 < found.seconds < time.monotonic() - began, "all of it was tried, so it takes no longer than that"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_some_pieces_are_tried_in_no_order(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "SAMPLE_BYTES", 100)
    tried: list[int] = []
    plan = plan_of(tmp_path, tried)
    one = forecast.forecast(plan, tmp_path / "out", "import", 1 << 20, 0.0)
    assert len(tried) == 10 and set(tried) != set(range(10)), "not the first ones"
    again = list(tried)
    tried.clear()
    forecast.forecast(plan, tmp_path / "out", "import", 1 << 20, 0.0)
    assert set(tried) == set(again), "each run tries the same"
    assert one.seconds > 5 * 10 * 0.002 / 2 / 4, "what 50 pieces take, from 10"


def test_the_rest_is_estimated_from_what_was_tried(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(forecast, "SAMPLE_BYTES", 100)

    def in_parallel(sample, do, title, memory):
        assert list(sample.values()) == [10] * 10 and (title, memory) == ("forecast", 77)
        for number in sample:
            do(number)
        now[0] += 4.0

    monkeypatch.setattr(forecast, "in_parallel", in_parallel)
    found = forecast.forecast(plan_of(tmp_path, []), tmp_path / "out", "import", 77, 90.0)
    assert (found.planned_in, found.seconds) == (10.0, 500 * 4.0 / 100)
    none = Plan({}, [], {}, {}, "x")
    monkeypatch.setattr(forecast, "in_parallel", lambda *_: None)
    assert forecast.forecast(none, tmp_path / "out", "import", 77, 90.0).seconds == 0


def test_what_triton_keeps_goes_away(tmp_path, monkeypatch):
    """Only a GPU compiles; where it would write is seen without one."""
    for before in ("elsewhere", None):
        monkeypatch.setenv("TRITON_CACHE_DIR", before) if before else monkeypatch.delenv("TRITON_CACHE_DIR")
        seen: list[Path] = []

        def work(seen=seen):
            seen.append(Path(os.environ["TRITON_CACHE_DIR"]))
            (seen[0] / "kernel").touch()
            yield "a", 0, b"abc"

        forecast.forecast(Plan({"a": 3}, [Piece(3, work)], {}, {}, "x"), tmp_path / "out", "import", 1 << 20, 0.0)
        assert not seen[0].exists() and os.environ.get("TRITON_CACHE_DIR") == before


def test_a_place_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK | os.X_OK))
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/a/out: {tmp_path} is read-only"):
        forecast.forecast(plan_of(tmp_path, []), tmp_path / "a" / "out", "import", 1 << 20, 0.0)
