"""A run whose newest checkpoint is at its last step is done, however its last start ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_model
from slipway import cli
from slipway.checkpoint.locate import COMPLETE
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.tokens.lines import as_line
from slipway.training.recipe import MODES, Recipe
from slipway.training.run_folder import RunFolder
from test_claim import HOLD


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, and data for training and for evaluations."""
    root = tmp_path_factory.mktemp("finish")
    make_model(root / "hf", "llama31", quantized=False)
    import_checkpoint(str(root / "hf"), str(root / "nemo"))
    (root / "data.jsonl").write_bytes(as_line([5, 6], [7, 8, 9]) * 40)
    return root


def words(inputs: Path, out: Path, *more: str, mode: str = "sft", steps: int = 4) -> list[str]:
    given = ["--model", inputs / "nemo", "--data", inputs / "data.jsonl", "--out", out, "--mode", mode]
    given += ["--steps", steps, "--seq-length", 32, "--global-batch-size", 4, *more]
    return ["train", *map(str, given), "--eval-every", "2", "--eval-data", str(inputs / "data.jsonl")]


def ended(inputs: Path, out: Path, capsys, mode: str = "sft", steps: int = 4, done: int = 4) -> RunFolder:
    """The folder of a run of so many steps that was killed after `done` of them, with checkpoints after 2 and 4."""
    assert cli.main([*words(inputs, out, mode=mode, steps=steps), "--dry-run"]) == 0
    values = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    folder = RunFolder(out)
    for step in (2, 4):
        shutil.copytree(inputs / "nemo", folder.checkpoint(step))
        (folder.checkpoint(step) / "context" / COMPLETE).touch()
    Recipe(**values).save(folder.recipe)
    status = {"state": "running", "step": done, "steps": steps, "tokens": 10 * done, "loss": 9.0, "exit_code": 78}
    folder.write_status(status | {"why": "", "begun_at": 0})
    entry = {"lr": 1e-3, "tokens": 10, "tokens_per_second": 1.0, "seconds": 1.0}
    folder.metrics.write_text("".join(json.dumps({"step": n, "loss": 8.0 - n, **entry}) + "\n" for n in range(done)))
    folder.evaluations.write_text(json.dumps({"step": 1, "loss": 7.5}) + "\n")
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_a_run_that_ended_after_its_last_checkpoint_is_done(inputs, tmp_path, capsys, mode, state):
    """Killed, failed or stopped in the last evaluation: the same command says so, and `watch` too."""
    folder = ended(inputs, tmp_path / "run", capsys, mode)
    folder.write_status(folder.read_status() | {"state": state})
    for _ in range(2):
        assert cli.main(words(inputs, folder.path, mode=mode)) == 0
        assert "step=4" in (said := capsys.readouterr().out) and "steps 4→4, loss 5.000000" in said
        assert "train: note: all steps are done, but not the last evaluation" in said
    status = folder.read_status()
    assert (status["state"], status["step"], status["steps"], status["loss"]) == ("done", 4, 4, 5.0)
    assert status["why"] == "all steps are done, but not the last evaluation" and "exit_code" not in status
    assert cli.main(["watch", str(folder.path), "--once"]) == 0
    assert "run: done, step 4 of 4, loss 5.000000" in capsys.readouterr().out
    assert not folder.owner.exists()


@pytest.mark.parametrize("evaluated, why", [
    (False, "all steps are done, but not the last evaluation"), (True, "all steps are done"),
])  # fmt: skip
def test_a_stop_in_the_last_evaluation_is_said_at_once(inputs, tmp_path, capsys, evaluated, why):
    """By the start itself that is stopped: it has done all steps and ends with 0."""
    from slipway.training import cpu

    cpu.enable()
    from slipway.training.record import Record

    folder = ended(inputs, tmp_path / "run", capsys)
    if evaluated:
        with folder.evaluations.open("a") as file:
            file.write(json.dumps({"step": 3, "loss": 3.5}) + "\n")
    record = Record(Recipe.load(folder.recipe), folder, None, None, 0.0)
    record.on_train_end(SimpleNamespace(is_global_zero=True, global_step=4), None)
    assert (folder.read_status()["state"], folder.read_status()["why"]) == ("done", why)
    capsys.readouterr()
    assert cli.main(words(inputs, folder.path)) == 0
    assert (f"train: note: {why}" in capsys.readouterr().out) is not evaluated


def test_a_run_can_be_ended_at_its_newest_checkpoint(inputs, tmp_path, capsys):
    """What it had done beyond is forgotten, as by any start that goes on from there."""
    folder = ended(inputs, tmp_path / "run", capsys, steps=8, done=6)
    with folder.evaluations.open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 3.5}) + "\n")
    folder.write_status(folder.read_status() | {"eval_loss": 3.5})
    assert cli.main(words(inputs, folder.path)) == 0
    said = capsys.readouterr()
    assert "--steps was 8 and is 4, which is done: the run ends there" in said.err and "steps 4→4" in said.out
    status = folder.read_status()
    assert (status["state"], status["step"], status["steps"], status["tokens"]) == ("done", 4, 4, 40)
    assert status["eval_loss"] == 7.5
    assert len(folder.read_metrics()) == 4 and Recipe.load(folder.recipe).steps == 4


def test_a_run_that_still_goes_is_not_declared_done(inputs, tmp_path, capsys):
    folder = ended(inputs, tmp_path / "run", capsys)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.owner)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert cli.main(words(inputs, folder.path)) == 78
        assert "is held by a run on" in capsys.readouterr().err.splitlines()[-1]
        assert folder.read_status()["state"] == "running"
    finally:
        holder.kill()
        holder.wait()
