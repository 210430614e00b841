"""One run at a time writes into a folder: the second is refused, and a claim of what is gone does not hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slipway.errors import PreflightError
from slipway.training import claim
from slipway.training.claim import Claim

HOLD = """
import sys, time
from pathlib import Path
from slipway.training.claim import Claim
with Claim(Path(sys.argv[1]), beat=0.1):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "owner.json"


@pytest.fixture
def holder(file):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(file: Path, **changes: str) -> None:
    """As if the claim were from another machine: its process cannot be seen."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boot": "another", "host": "node7"} | changes))


def test_a_claim_is_there_as_long_as_it_is_held(file):
    with Claim(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_a_second_start_says_who_holds_the_folder(file, holder):
    with (
        pytest.raises(PreflightError, match=rf"is held by a run on .*, process {holder.pid}, .*since 20.*stop it"),
        Claim(file),
    ):
        pass
    assert file.exists()


def test_the_claim_of_a_process_that_was_killed_does_not_hold(file, holder):
    holder.kill()
    holder.wait()
    with Claim(file, silent=3600):  # it is known at once
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_another_process_with_the_same_number_is_not_the_owner(file, holder):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"begun": "1"}))
    with Claim(file, silent=3600):
        pass


def test_a_run_on_another_machine_is_seen_by_its_signs_of_life(file, holder):
    elsewhere(file)
    with pytest.raises(PreflightError, match="is held by a run on node7"), Claim(file, beat=0.1, silent=3600):
        pass


def test_a_run_on_another_machine_without_a_sign_of_life_is_gone(file, holder, capsys):
    elsewhere(file)
    holder.kill()
    with Claim(file, beat=0.05, silent=0.2):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert "is held by a run on node7" in capsys.readouterr().err


def test_the_same_job_that_is_started_again_goes_on_at_once(file, holder, monkeypatch):
    elsewhere(file, job="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(PreflightError, match="job 7"), Claim(file, beat=0.1, silent=3600):
        pass  # another step of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Claim(file, silent=3600):
        pass


def test_a_run_that_ends_meanwhile_lets_the_next_one_in(file, monkeypatch):
    file.write_text(json.dumps({"host": "node7"}))
    sleeps = []
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: (sleeps.append(seconds), file.unlink())[0])
    with Claim(file, silent=3600):
        pass
    assert len(sleeps) == 1


def test_a_claim_that_was_cut_off_is_waited_for_like_any_other(file):
    file.write_text('{"host": "no')
    begun = time.monotonic()
    with Claim(file, beat=0.05, silent=0.2):
        pass
    assert time.monotonic() - begun >= 0.15
