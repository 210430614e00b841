"""An output that is there: the same command again ends well, another is refused, --overwrite keeps the old output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_model
from slipway import cli
from slipway.checkpoint import finished, stream


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "hf", "llama31", quantized=False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_same_command_again_writes_nothing_and_ends_well(model, tmp_path, capsys):
    """Through a whole chain, as a scheduler starts it again."""
    chain = [("import", model, tmp_path / "nemo"), ("export", tmp_path / "nemo", tmp_path / "out")]
    for words in chain:
        assert run(*words) == 0
    before = {folder: bytes_of(tmp_path / folder) for folder in ("nemo", "out")}
    times = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]
    for words in chain:
        capsys.readouterr()
        assert run(*words) == 0
        assert "is there already, made from the same source with the same flags" in capsys.readouterr().out
    assert before == {folder: bytes_of(tmp_path / folder) for folder in ("nemo", "out")}
    assert times == [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]


@pytest.mark.parametrize("change", ["source", "flags"])
def test_another_source_or_other_flags_are_refused(model, tmp_path, capsys, change):
    assert run("import", model, tmp_path / "nemo") == 0
    assert run("export", tmp_path / "nemo", tmp_path / "out") == 0
    if change == "source":
        other = make_model(tmp_path / "hf2", "llama31", quantized=False, seed=2)
        code = run("import", other, tmp_path / "nemo")
    else:
        code = run("export", tmp_path / "nemo", tmp_path / "out", "--shard-size", "100KB")
    assert code == 2
    assert "exists, and was made from another source or with other flags" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_is_not_whole_or_not_ours_is_not_taken_for_one(model, tmp_path, capsys):
    assert run("import", model, tmp_path / "nemo") == 0
    (file,) = (tmp_path / "nemo" / "weights").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert run("import", model, tmp_path / "nemo") == 2
    assert "nemo exists; remove it or choose another name" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert run("import", model, tmp_path / "mine") == 2


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(model, tmp_path, monkeypatch):
    assert run("import", model, tmp_path / "nemo") == 0
    before = bytes_of(tmp_path / "nemo")
    other = make_model(tmp_path / "hf2", "llama31", quantized=False, seed=2)
    assert run("import", other, tmp_path / "wanted") == 0

    def fail(*_: object) -> None:
        assert bytes_of(tmp_path / "nemo") == before
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(stream, "_fill", fail)
        assert run("import", other, tmp_path / "nemo", "--overwrite") == 73
    assert bytes_of(tmp_path / "nemo") == before
    assert run("import", other, tmp_path / "nemo", "--overwrite") == 0
    assert bytes_of(tmp_path / "nemo") == bytes_of(tmp_path / "wanted")
    notes = {f".{name}{finished.NOTE}" for name in ("nemo", "wanted")}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == notes


@pytest.mark.parametrize("name", ["a file", "a folder of mine", "a link"])
def test_overwrite_replaces_nothing_but_models(model, tmp_path, capsys, name):
    out = tmp_path / "out"
    if name == "a file":
        out.write_text("mine")
    elif name == "a link":
        out.symlink_to(model)
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert run("import", model, out, "--overwrite") == 2
    assert "remove it or choose another name" in capsys.readouterr().err
    assert (
        out.is_symlink() or out.read_text() == "mine" if name != "a folder of mine" else (out / "thesis.txt").exists()
    )


def test_a_dry_run_of_what_is_there_says_what_it_would_take(model, tmp_path, capsys):
    assert run("import", model, tmp_path / "nemo") == 0
    assert run("import", model, tmp_path / "nemo", "--dry-run", "--overwrite") == 0


def test_a_note_that_says_nothing_counts_as_none(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for content in ("", "[]", '{"files": 3}', json.dumps({"made_from": "x", "files": {"a": [1, 2]}})):
        finished.note_of(out).write_text(content)
        assert finished.noted(out) is None
