"""A home and a user name for a process without them, as every Python of an image gets them at its start."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import pytest
from slipway.launch import home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder for temporary files, and an environment that the test may change."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "")
    return tmp_path


def test_a_home_that_can_be_written_stays(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.setenv("USER", "someone")
    home.prepare()
    assert os.environ["HOME"] == str(elsewhere) and os.environ["USER"] == "someone"


@pytest.mark.parametrize("given", ["", "/nonexistent"])
def test_a_home_that_cannot_is_replaced_by_one_of_the_users_own(elsewhere, monkeypatch, given):
    monkeypatch.setenv("HOME", given)
    home.prepare()
    made = Path(os.environ["HOME"])
    assert made == elsewhere / f"home-{os.getuid()}" and made.stat().st_mode & 0o777 == 0o700
    assert getpass.getuser() == f"user{os.getuid()}"
    home.prepare()
    assert Path(os.environ["HOME"]) == made


def test_a_home_that_another_user_made_before_is_not_taken(elsewhere):
    trap = elsewhere / f"home-{os.getuid()}"
    trap.mkdir(mode=0o777)
    trap.chmod(0o777)
    home.prepare()
    first = Path(os.environ["HOME"])
    os.environ["HOME"] = ""
    trap.rmdir()
    trap.symlink_to("/etc")
    home.prepare()
    assert trap not in (first, Path(os.environ["HOME"])) and first.is_relative_to(elsewhere)


def test_a_process_that_can_write_nothing_still_starts(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    home.prepare()
    assert os.environ["HOME"] == "" and os.environ["USER"]
