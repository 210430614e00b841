"""Folders where unfinished work would be, and names that no output can have.

What they do: a journal is garbled, gone, a device or names pieces that there are not; the folder, or a file in it, is a
link to somebody's own files; a folder of a person's has the same name by chance; a name is too long, or has controls.

What must happen: work of ours is continued or begun again, with the same bytes; what is not ours is never written to or
deleted, and one line says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from slipway.checkpoint import stream
from slipway.checkpoint.stream import Piece, Plan, partial_of, run
from slipway.errors import UsageError
from slipway.tokens.encoder import Encoded
from slipway.tokens.inputs import CUT
from slipway.tokens.outputs import JOURNAL, Output

CONTENT = {"a": b"abc" * 100, "b": b"xy" * 50}


def plan() -> Plan:
    pieces = [Piece(len(text), lambda name=name, text=text: [(name, 0, text)]) for name, text in CONTENT.items()]
    return Plan({name: len(text) for name, text in CONTENT.items()}, pieces, {"c": b"{}"}, {}, ["x"])


def begun(out: Path, journal: bytes | None) -> Path:
    """Work that stopped after its folder was prepared."""
    partial = partial_of(out)
    stream._prepare(plan(), partial)
    if journal is None:
        (partial / "journal").unlink()
    else:
        (partial / "journal").write_bytes(journal)
    return partial


def made(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


JOURNALS = [
    None,
    b"",
    b"x\n",
    b"-1\n",
    b"7\n",
    b"\xff\n",
    b"0" * 5000 + b"\n",
    "²\n".encode(),
    b"0\n1\nhalf",
    b"\0" * 99,
]


@pytest.mark.parametrize("journal", JOURNALS, ids=repr)
def test_a_journal_that_is_none(tmp_path, journal):
    out = tmp_path / "out"
    partial = begun(out, journal)
    if journal == b"0\n1\nhalf":  # what it says is true
        for name, text in CONTENT.items():
            (partial / name).write_bytes(text)
    run(plan(), out, "test", 1 << 20)
    assert made(out) == {**CONTENT, "c": b"{}"} and not partial.exists()


@pytest.mark.parametrize("where", ["folder", "journal", "a", "plan.json"])
def test_links_are_not_followed(tmp_path, where):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("my own")
    out = tmp_path / "out"
    partial = begun(out, b"")
    if where == "folder":
        shutil.rmtree(partial)
        partial.symlink_to(mine)
    else:
        (partial / where).unlink()
        (partial / where).symlink_to(mine / "file")
    with pytest.raises(UsageError, match="not a folder of unfinished work"):
        run(plan(), out, "test", 1 << 20)
    assert made(mine) == {"file": b"my own"} and not out.exists()


def test_a_folder_of_a_persons_own_stays(tmp_path, arena, model):
    out = tmp_path / "out"
    own = partial_of(out)
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a folder of unfinished work"):
        run(plan(), out, "test", 1 << 20)
    assert "unfinished work" in arena.run("import", model, out).check(2)
    assert made(own) == {"thesis.txt": b"years of work"}
    (own / "thesis.txt").unlink()
    run(plan(), out, "test", 1 << 20)  # an empty folder holds nothing of anybody's


def test_a_file_in_its_place(tmp_path):
    partial_of(tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="not a folder of unfinished work"):
        run(plan(), tmp_path / "out", "test", 1 << 20)


IDENTITY = {"a": 1}
SOUND = {"cut": CUT, "identity": IDENTITY, "sizes": {"content": 0, "lengths": 0, "ends": 0}, "pieces": 0, "counts": {}}
TOKENS = [
    "", "{", "[]", "null", "3", '{"identity": {"a": 1}}', "[" * 100_000,
    *(json.dumps(SOUND | changes) for changes in (
        {"sizes": 3}, {"sizes": {"../x": 0}}, {"sizes": {"content": -1}}, {"sizes": {"content": "x"}}, {"sizes": {}},
        {"pieces": -1}, {"pieces": "x"}, {"pieces": None}, {"counts": []}, {"counts": {"x": "y"}},
        {"sizes": {"content": 9}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("journal", TOKENS, ids=lambda text: text[-60:])
def test_a_journal_of_tokens_that_is_none(tmp_path, journal):
    target = tmp_path / "out.jsonl"
    with Output(target, None, IDENTITY) as output:
        (output.folder / JOURNAL).write_text(journal)
        folder = output.folder
        kept = shutil.copytree(folder, tmp_path / "kept")
    shutil.copytree(kept, folder)
    with Output(target, None, IDENTITY) as output:
        assert output.pieces == 0 and output.counts == {}


@pytest.mark.parametrize("cut", [CUT, CUT - 1, None])
def test_unfinished_work_that_was_cut_otherwise_is_begun_again(tmp_path, cut):
    """As after an upgrade: its pieces are not those of this version, and rows would be lost or come twice."""
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), Output(target, None, IDENTITY) as output:
        output.add(Encoded({"content": b"{}\n", "lengths": b"", "ends": b""}, {"samples": 1}))
        output._commit()
        raise KeyboardInterrupt
    journal = output.folder / JOURNAL
    found = json.loads(journal.read_text()) | {"cut": cut}
    journal.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    with Output(target, None, IDENTITY) as output:
        assert output.pieces == (1 if cut == CUT else 0)


def test_a_folder_of_tokens_that_is_not_ours(tmp_path):
    target = tmp_path / "out.jsonl"
    partial_of(target).mkdir()
    (partial_of(target) / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a folder of unfinished work"), Output(target, None, IDENTITY):
        pass
    shutil.rmtree(partial_of(target))
    (tmp_path / "mine").mkdir()
    partial_of(target).symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="not a folder of unfinished work"), Output(target, None, IDENTITY):
        pass


NAMES = ["a" * 256, "a" * 250, "é" * 130, "a\nb", "a\x1b[2Jb", "a\x7f", "\udcff" * 3 + "\x01", "a/" + "b" * 300 + "/c"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:10])
def test_names(arena, model, samples, tmp_path, name):
    for words in (
        ["import", model, tmp_path / name],
        ["preprocess", samples, f"{tmp_path}/{name}.jsonl", "--tokenizer", model],
        ["inspect", tmp_path / name],
    ):
        found = arena.run(*words)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", found.check(2, 65, 73))
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl", "model"]
