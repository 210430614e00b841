"""What `inspect` and --dry-run print, word for word, and as JSON."""

from __future__ import annotations

from slipway.checkpoint.contents import Contents
from slipway.checkpoint.forecast import Forecast

ONE = Contents(
    path="models/tiny",
    format="Hugging Face",
    model="gpt_oss",
    parameters=1_234_567,
    dtypes={"BF16": (1000, 2_000_000), "U8": (2, 5)},
    files={"a.safetensors": 2_000_005},
    parts={"model": 1002},
    checked="config.json",
)
MANY = Contents(
    path="x",
    format="NeMo checkpoint",
    model="",
    parameters=7,
    dtypes={"F32": (1, 28)},
    files={"a": 10, "b": 30, "c": 20},
    parts={"model": 1, "optimizer": 2000},
    quantization={"method": "fp8", "block": [128, 64], "tensors": 1500},
    problems={"missing": ["a", "b", "c"], "unexpected": ["a", "b", "c", "d", "e"]},
    notes=["one thing", "another"],
)


def test_a_whole_model_in_words():
    assert str(ONE).splitlines() == [
        "models/tiny",
        "format           Hugging Face",
        "model            gpt_oss",
        "parameters       1,234,567",
        "dtypes           BF16         1,000 tensors      2 MB",
        "                 U8               2 tensors       5 B",
        "size             2 MB in one file, a.safetensors",
        "complete         yes (compared with config.json)",
    ]
    assert ONE.whole and ONE.exit_code == 0 and ONE.tensors == 1002


def test_what_is_wrong_in_words():
    assert str(MANY).splitlines() == [
        "x",
        "format           NeMo checkpoint",
        "model            unknown",
        "parameters       7",
        "parts            model 1 tensors, optimizer 2,000 tensors",
        "dtypes           F32              1 tensors      28 B",
        "size             60 B in 3 files, the largest b with 30 B",
        "quantised        fp8, blocks of 128×64, 1,500 tensors",
        "missing          3: a, b, c",
        "unexpected       5: a, b, c, … (2 more)",
        "note             one thing",
        "note             another",
        "complete         no",
    ]
    assert not MANY.whole and MANY.exit_code == 65


def test_nothing_to_compare_with_and_no_files():
    found = Contents("x", "f", "m", 0, {}, {}, quantization={"method": "fp8", "block": [], "tensors": 1})
    assert str(found).splitlines()[-3:] == [
        "size             0 B",
        "quantised        fp8, 1 tensors",
        "complete         unknown: nothing here says which tensors there must be",
    ]
    assert (found.as_dict()["largest_file"], found.as_dict()["largest_file_bytes"]) == ("", 0)


def test_as_json():
    assert MANY.as_dict() == {
        "command": "inspect",
        "path": "x",
        "format": "NeMo checkpoint",
        "model": "",
        "parameters": 7,
        "tensors": 1,
        "parts": {"model": 1, "optimizer": 2000},
        "dtypes": {"F32": {"tensors": 1, "bytes": 28}},
        "bytes": 60,
        "files": 3,
        "largest_file": "b",
        "largest_file_bytes": 30,
        "quantization": {"method": "fp8", "block": [128, 64], "tensors": 1500},
        "checked": "",
        "problems": {"missing": ["a", "b", "c"], "unexpected": ["a", "b", "c", "d", "e"]},
        "notes": ["one thing", "another"],
        "whole": False,
    }


def test_a_forecast_in_words():
    found = Forecast("import", "out", 3_000_000, 2_000_000, 4, 5, 2_000_000, 90.0, 0.25)
    assert str(found) == (
        "import: would read 3 MB and write 2 MB (4 files, 5 pieces) to out in about 1.5 min if that disk keeps up; "
        "it has 2 MB free: enough (planned in 0.2 s)"
    )
    found.free -= 1
    assert ": NOT ENOUGH, free some space (" in str(found) and found.as_dict()["free"] == 1_999_999
