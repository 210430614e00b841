"""`preprocess` never replaces what it reads, and never learns what it has written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sets import samples, write_rows
from slipway.commands.preprocess import preprocess
from slipway.errors import UsageError
from slipway.tokens import outputs
from slipway.tokens.tokenise import ALREADY

ROWS = [{"prompt": f"the number {number}", "completion": "is one"} for number in range(20)]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    write_rows(tmp_path / "data" / "b.eval.jsonl", ROWS)  # of the split test, by its name
    write_rows(tmp_path / "data" / "d.jsonl", ROWS)
    (tmp_path / "data" / "linked.jsonl").symlink_to("b.eval.jsonl")
    (tmp_path / "data" / "c.idx").write_text("a text of another name")
    return write_rows(tmp_path / "data" / "a.jsonl", ROWS)


@pytest.mark.parametrize("source, out, options", [
    ("data/a.jsonl", "data/a.jsonl", {}), ("data/a.jsonl", "link/a.jsonl", {}),
    ("data/linked.jsonl", "data/b.eval.jsonl", {}), ("data/b.eval.jsonl", "data/linked.jsonl", {}),
    ("data/b.eval.jsonl", "{whole}/data/b.jsonl", {"eval_split": "40%"}), ("data/c.idx", "data/c.bin", {}),
    ("data", "data/a.jsonl", {}), ("link", "data/b.jsonl", {"eval_split": "40%"}), ("data", "data/c.bin", {}),
])  # fmt: skip
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_source_is_never_replaced(mxfp4_model, tmp_path, data, source, out, options, overwrite):
    before = {path: path.read_bytes() for path in data.parent.iterdir()}
    with pytest.raises(UsageError, match=r"is a file of DATA, and this command would replace it; choose another OUT"):
        preprocess(source, out.format(whole=tmp_path), tokenizer=str(mxfp4_model), overwrite=overwrite, **options)
    assert {path: path.read_bytes() for path in data.parent.iterdir()} == before


def test_an_output_in_the_folder_of_the_data_is_not_learned(mxfp4_model, data, capsys):
    (data.parent / "linked.jsonl").unlink()
    wanted = {"tokenizer": str(mxfp4_model), "eval_split": "40%"}
    first = preprocess("data", "data/out.jsonl", **wanted).details
    content = Path("data/out.jsonl").read_bytes()
    assert first["samples"] + first["eval_samples"] == 40
    assert preprocess("data", "data/out.jsonl", **wanted).details["notes"] == [ALREADY]
    capsys.readouterr()
    again = preprocess("data", "data/out.jsonl", overwrite=True, **wanted).details
    said = capsys.readouterr().err
    assert again == first and Path("data/out.jsonl").read_bytes() == content
    assert "out.jsonl (made by Slipway)" in said and "out.eval.jsonl (made by Slipway)" in said
    preprocess("data", "data/other.jsonl", tokenizer=str(mxfp4_model))
    assert len(samples(Path("data/other.jsonl"))) == 40
    os.utime("data/out.jsonl", ns=(0, 0))  # it is another's by now: rows of tokens, which are read
    preprocess("data", "data/more.jsonl", tokenizer=str(mxfp4_model))
    assert len(samples(Path("data/more.jsonl"))) == 40 + first["samples"]


def test_a_killed_command_that_replaces_goes_on(mxfp4_model, data, monkeypatch):
    """It has written its note, and was killed before the old output was replaced."""
    (data.parent / "linked.jsonl").unlink()
    preprocess("data", "data/out.jsonl", tokenizer=str(mxfp4_model))
    wanted = {"tokenizer": str(mxfp4_model), "append_eos": False, "overwrite": True}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs.Output, "_name", killed)
        with pytest.raises(KeyboardInterrupt):
            preprocess("data", "data/out.jsonl", **wanted)
    assert preprocess("data", "data/out.jsonl", **wanted).details["samples"] == 40


@pytest.mark.parametrize("overwrite", [True, False])
def test_megatron_s_files_in_the_folder_of_the_data(mxfp4_model, data, overwrite):
    for text in ("a text", "another one"):
        (data.parent / f"{text}.txt").write_text(text)
    (data.parent / "a.jsonl").write_text('{"text": "one more"}')
    (data.parent / "d.jsonl").unlink()
    (data.parent / "linked.jsonl").unlink()
    for _ in range(2):
        done = preprocess("data", "data/out.bin", tokenizer=str(mxfp4_model), overwrite=overwrite)
        assert done.details["samples"] == 3


@pytest.mark.parametrize("note", ["[]", "{}", '{"files": {"../a.jsonl": 0}}', "x", json.dumps({"files": {"\0": []}})])
def test_a_note_of_another_is_no_note(mxfp4_model, data, note):
    (data.parent / ".a.jsonl.slipway.json").write_text(note)
    assert preprocess("data", "out.jsonl", tokenizer=str(mxfp4_model)).details["samples"] == 60
