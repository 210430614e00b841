"""One `preprocess` at a time works on an output, and a lock ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sets import write_rows
from slipway.checkpoint import working
from slipway.checkpoint.working import alone
from slipway.commands.preprocess import preprocess
from slipway.errors import PreflightError, UsageError
from slipway.tokens.encoder import Encoder

ROWS = [{"text": f"a row with the number {number}"} for number in range(20)]


@pytest.mark.parametrize(
    "out, options", [("out.jsonl", {}), ("out.jsonl", {"overwrite": True}), ("out.eval.jsonl", {})]
)
def test_a_second_command_is_refused_and_the_first_goes_on(mxfp4_model, tmp_path, monkeypatch, capsys, out, options):
    data = write_rows(tmp_path / "in.jsonl", ROWS)
    refused = []

    def encode(self, piece):
        if not refused:
            capsys.readouterr()
            with pytest.raises(PreflightError) as error:
                preprocess(str(data), str(tmp_path / out), tokenizer=str(mxfp4_model), **options)
            refused.append(str(error.value))
            assert capsys.readouterr().err == "", "it is refused before any work"
        return original(self, piece)

    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", encode)
    wanted = {"tokenizer": str(mxfp4_model), "eval_split": "40%", "workers": 1}
    preprocess(str(data), str(tmp_path / "out.jsonl"), **wanted)
    assert refused == [f"another command is at work on {tmp_path / out}; wait for it, or choose another name"]
    preprocess(str(data), str(tmp_path / "other.jsonl"), **wanted)
    for end in (".jsonl", ".eval.jsonl"):
        assert (tmp_path / f"out{end}").read_bytes() == (tmp_path / f"other{end}").read_bytes()
    assert not list(tmp_path.glob(".*.lock"))


HOLDS = (
    "import sys; from pathlib import Path; from slipway.checkpoint.working import alone\n"
    "with alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_a_lock_ends_with_its_process(tmp_path):
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLDS, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(PreflightError, match="another command"), alone(out):
            pass
        os.kill(other.pid, signal.SIGKILL)
    with alone(out):
        assert [path.name for path in tmp_path.iterdir()] == [".out.jsonl.lock"], "what the killed one has left"
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_just_given_up_is_taken_anew(tmp_path, monkeypatch):
    """Its owner has removed the file between its opening and its locking here."""
    out, lock = tmp_path / "out", working._lock
    opened = []

    def slow(descriptor: int, out: Path) -> None:
        if not opened:
            (tmp_path / ".out.lock").unlink()
        opened.append(descriptor)
        lock(descriptor, out)

    monkeypatch.setattr(working, "_lock", slow)
    with alone(out), pytest.raises(PreflightError), alone(out):
        pass
    assert len(opened) == 3


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("x"), lambda path: path.write_text("x")]
)
def test_what_is_no_lock_is_left_alone(tmp_path, make):
    make(tmp_path / ".out.lock")
    with pytest.raises(UsageError, match="not a lock of Slipway's"), alone(tmp_path / "out"):
        pass
    assert os.path.lexists(tmp_path / ".out.lock")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(working.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(working.fcntl, "flock", no_locks)
    with alone(tmp_path / "out"):
        assert "has no locks" in capsys.readouterr().err
