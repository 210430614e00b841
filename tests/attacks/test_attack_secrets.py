"""Secrets on their way into what is printed, logged or kept.

What they are: passwords inside of URLs, variables whose names no list of secrets knows, tokens in the query of a URL.

What must happen: none of them is in what a command prints, in the folder of a run, in its logs or in a traceback.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from slipway.launch import torchrun

PLANTED = "plnt" + "9f3c"
VARIABLES = {
    "HF_ENDPOINT": f"http://user:{PLANTED}@127.0.0.1:9/path?token={PLANTED}",
    "WANDB_BASE_URL": f"https://{PLANTED}@host.invalid",
    "HF_TOKEN": PLANTED,
    "WANDB_API_KEY": PLANTED,
    "HF_PASSPHRASE": PLANTED,
    "NCCL_SOMETHING_NEW": PLANTED,
    "TORCH_COOKIE": PLANTED,
    "SLIPWAY_LOGIN": PLANTED,
    "DATABASE_URL": f"postgres://u:{PLANTED}@h/db",
    "HTTPS_PROXY": f"http://u:{PLANTED}@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": PLANTED,
}


def test_what_is_shown_is_on_a_list(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO\x1b[2J")
    shown = torchrun.shown_environment()
    assert PLANTED not in str(shown)
    assert shown["HF_ENDPOINT"] == "http://***@127.0.0.1:9/path?***" and shown["NCCL_DEBUG"] == "INFO\\x1b[2J"
    assert shown["HF_TOKEN"] == shown["NCCL_SOMETHING_NEW"] == "***" and "DATABASE_URL" not in shown


def test_commands_print_none(arena, nemo, samples, tmp_path):
    for words in (
        ["train", "--model", nemo, "--data", samples, "--out", tmp_path / "run", "--dry-run"],
        ["inspect", "hf://org/name"],
        ["import", "hf://org/name", tmp_path / "out"],
        ["preprocess", "hf://datasets/org/name", tmp_path / "x.jsonl", "--tokenizer", nemo],
        ["inspect", f"https://u:{PLANTED}@host/x"],
        ["train", "--model", f"https://u:{PLANTED}@host/x", "--data", samples, "--out", tmp_path / "run"],
    ):
        found = arena.run(*words, environment={**VARIABLES, "HF_HOME": str(tmp_path / "hf")})
        assert PLANTED not in found.out + found.err, found.err
        assert "Traceback" not in found.err


@pytest.mark.parametrize("verbose", ["", "1"])
def test_a_traceback_has_no_passwords(arena, monkeypatch, tmp_path, verbose):
    """An error that nobody foresaw, of a command whose words have a password."""
    url = f"https://u:{PLANTED}@host/x"
    found = arena.run("version", environment={"SLIPWAY_TEST": "1", "TMPDIR": str(tmp_path), "SLIPWAY_VERBOSE": verbose})
    assert found.code == 0
    from slipway import cli

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    where = re.search(r"(\S+\.traceback)", cli._kept_traceback(ValueError(url)))[1]
    assert PLANTED not in Path(where).read_text() and "ValueError" in Path(where).read_text()
    assert os.stat(where).st_mode & 0o077 == 0
    assert "\n" not in cli._defect(ValueError("a\nb"))


def test_a_real_run_keeps_none(slipway, nemo, samples, tmp_path):
    """The whole folder of a run and its logs, and everything that it printed."""
    words = ["--model", nemo, "--data", samples, "--out", tmp_path / "run", "--steps", "1", "--seq-length", "16"]
    words += ["--warmup-steps", "0", "--constant-steps", "0", "--global-batch-size", "2", "--micro-batch-size", "1"]
    done = slipway("train", *words, env=os.environ | VARIABLES | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert PLANTED not in done.stdout + done.stderr
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 10
    holding = [str(file) for file in files if PLANTED.encode() in file.read_bytes()]
    assert holding == []
