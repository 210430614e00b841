"""What one sees of a run: its line, its curve and its end, from its folder and from another process."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, tensor_of
from forked import Gate
from safetensors.torch import load_file, save_file
from slipway import cli
from slipway.checkpoint.torch_dist import Reader
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import DataError, SlipwayError
from slipway.training import watching
from slipway.training.curve import sparkline
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder, now
from test_claim import HOLD
from test_parallel import write_data
from test_train import train

STEPS = 8


def written(path: Path, state: str, steps: int = 3, **more: object) -> RunFolder:
    """A run's folder as it is after some steps."""
    folder = RunFolder(path)
    path.mkdir()
    Recipe("m", "d", str(path), steps=STEPS).save(folder.recipe)
    entries = [
        {"step": n, "loss": 5.0 - n, "lr": 1e-4, "seconds": 2.0, "tokens_per_second": 1234.0} for n in range(steps)
    ]
    folder.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    status = {
        "state": state,
        "step": steps,
        "steps": STEPS,
        "loss": 5.0 - steps,
        "seconds_left": 90.0,
        "updated": now(),
    }
    folder.write_status(status | more)
    return folder


@pytest.mark.parametrize(
    "state, more, code, said",
    [
        ("running", {}, 0, "run: running, step 3 of 8, loss 2.000000, lr 0.0001, 1234 tokens/s, "),
        ("done", {"why": "all steps are done"}, 0, "run: done, step 3 of 8, loss 2.000000: all steps are done"),
        ("stopped", {"why": "SIGTERM"}, 75, "run: stopped, step 3 of 8, loss 2.000000: SIGTERM"),
        ("failed", {"why": "no space", "exit_code": 73}, 73, "run: failed, step 3 of 8, loss 2.000000: no space"),
        ("failed", {"why": "killed"}, 1, "run: failed"),
        ("running", {"updated": "2026-01-01T00:00:00Z"}, 0, "h: look at "),
        ("running", {"eval_loss": 1.5}, 0, "(evaluation 1.500000)"),
    ],
)
def test_a_look_says_the_state_and_has_the_exit_code_of_the_run(tmp_path, capsys, state, more, code, said):
    written(tmp_path / "run", state, **more)
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == code
    shown = capsys.readouterr().out
    assert said in shown and "█▅▁ loss 5.0000 → 3.0000" in shown
    assert cli.main(["watch", str(tmp_path / "run"), "--once", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["state"] == state


@pytest.mark.parametrize("state", ["starting", "running"])
def test_a_run_that_was_killed_on_this_machine_has_ended(tmp_path, capsys, state):
    """`watch` sees it at once, and ends; a run that lives goes on, and one that said its end keeps it."""
    folder = written(tmp_path / "run", state)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.owner)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert cli.main(["watch", str(folder.path), "--once"]) == 0
    assert f"run: {state}, step 3 of 8" in capsys.readouterr().out
    holder.kill()
    holder.wait()
    assert cli.main(["watch", str(folder.path)]) == 1
    assert "run: failed, step 3 of 8, loss 2.000000: it was killed, its process is gone" in capsys.readouterr().out
    assert folder.read_status()["state"] == state  # it only reads
    folder.write_status(folder.read_status() | {"state": "stopped", "why": "SIGTERM"})
    assert cli.main(["watch", str(folder.path)]) == 75


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert "is not the folder of a run: it has no status.json" in capsys.readouterr().err


def test_a_run_without_a_step_has_no_curve(tmp_path, capsys):
    written(tmp_path / "run", "starting", steps=0)
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_curve_is_a_row_of_means():
    assert sparkline([{"loss": float(n)} for n in range(8)], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([{"loss": float(n // 100)} for n in range(200)], 2) == "▁█"
    assert sparkline([{"loss": 1.0}] * 3, 60) == "▁▁▁"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("watch")
    make_model(root / "hf", "llama31", quantized=False)
    import_checkpoint(str(root / "hf"), str(root / "nemo"))
    write_data(root)
    return root


def words(folder: Path, out: Path, **flags: object) -> list[str]:
    chosen = {
        "model": folder / "nemo", "data": folder / "data.jsonl", "out": out, "mode": "sft", "seq_length": 32,
        "steps": STEPS, "global_batch_size": 4, "lr": 1e-3,
    }  # fmt: skip
    return ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in (chosen | flags).items())]


@pytest.mark.parametrize("width", [20, 80, 200])
def test_on_a_terminal_every_look_takes_the_place_of_the_one_before(tmp_path, width):
    """Lines that are wider than the terminal take several rows, and all of these are replaced."""
    folder = written(tmp_path / "run", "running", steps=70)
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    command = [sys.executable, "-m", "slipway.cli", "watch", folder.path, "--every", "0.05"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdout=other, env=environment) as process:
        shown = ""
        while shown.count("\x1b[J") < 2:
            shown += os.read(main, 65536).decode(errors="replace")
        process.kill()
    os.close(other)
    first = shown.replace("\r\n", "\n").split("\x1b[J")[0]
    back = int(first.rpartition("\x1b[")[2].rstrip("A"))
    lines = first.rpartition("\x1b[")[0].rstrip("\n").split("\n")
    assert back == sum(-(-len(line) // width) for line in lines) and (back > 2) == (width < 100)


def test_wide_characters_take_two_columns():
    assert [watching.rows(text, 10) for text in ("", "a" * 10, "a" * 11, "学" * 5, "学" * 6, "a\n\nb")] == [
        1,
        1,
        2,
        1,
        2,
        3,
    ]


def test_a_real_run_is_followed_to_its_end(folder, tmp_path, warm):
    """Also what a step's line, the metrics and the status have."""
    run, seen = RunFolder(tmp_path / "run"), []

    def watch() -> None:
        while not run.status.exists():
            time.sleep(0.02)
        command = [sys.executable, "-m", "slipway.cli", "watch", str(run.path), "--every", "0.05"]
        seen.append(subprocess.run(command, capture_output=True, text=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code, output = train(words(folder, run.path), commands=warm)
    watcher.join()
    assert code == 0, output
    assert seen[0].returncode == 0 and f"run: done, step {STEPS} of {STEPS}" in seen[0].stdout.splitlines()[-2]
    line = next(line for line in output.splitlines() if line.startswith(f"step 2/{STEPS} "))
    assert all(part in line for part in (" loss ", " lr ", " tokens/s ", " left, grad norm ", " s, ")), line
    assert all(entry["grad_norm"] > 0 for entry in run.read_metrics())
    status = run.read_status()
    assert status["seconds_left"] == 0 and status["started"] <= status["updated"] <= now()


def test_a_terminal_has_one_living_line(folder, tmp_path, warm):
    """Seen through a pseudo-terminal: each step's line takes the place of the one before."""
    main, other = pty.openpty()
    process = warm.start(words(folder, tmp_path / "run"), tmp_path / "errors", screen=os.ttyname(other))
    shown, waiting = b"", select.poll()
    waiting.register(main, select.POLLIN)
    while not shown and process.poll() is None:  # once it has written, the command has the terminal open
        shown = os.read(main, 65536) if waiting.poll(100) else b""
    os.close(other)
    while True:
        try:
            shown += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    code, errors = process.finish()
    assert code == 0, errors
    text = shown.decode()
    lines = text.split("\r\x1b[2K")
    assert len(lines) == STEPS + 1 and all(line.startswith(f"step {n}/{STEPS}") for n, line in enumerate(lines[1:], 1))
    assert not any("\n" in line for line in lines[1:-1]) and "\ntrain: wrote " in text


def test_a_base_that_is_no_numbers_ends_with_the_tensor(folder, tmp_path, warm):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.safetensors"):
        weights = load_file(file)
        if (name := "model.layers.1.mlp.down_proj.weight") in weights:
            weights[name][3, 5] = float("nan")
            save_file(weights, file, {"format": "pt"})
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "nemo"))
    assert torch.isnan(tensor_of(Reader(tmp_path / "nemo"), "decoder.layers.mlp.linear_fc2.weight")).any()
    run = RunFolder(tmp_path / "run")
    code, output = train(words(folder, run.path, model=tmp_path / "nemo"), commands=warm)
    assert code == 65 and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert (
        "decoder.layers.1.mlp.linear_fc2.weight has values that are no numbers (NaN or infinite) before the first"
        in last
    )
    assert run.read_status()["state"] == "failed" and run.read_status()["exit_code"] == 65


def test_a_loss_that_is_no_number_ends_the_run_with_a_cure():
    from slipway.training import cpu

    cpu.enable()
    from slipway.training.callbacks import Finite

    recipe = Recipe("m", "d", "o", lr=0.5)
    trainer = SimpleNamespace(global_step=7, callback_metrics={"reduced_train_loss": torch.tensor(float("nan"))})
    module = torch.nn.Linear(2, 2)
    with pytest.raises(
        SlipwayError, match=r"the loss of step 7 is nan, and every weight is still a number; lower --lr"
    ):
        Finite(recipe).on_train_batch_end(trainer, module)
    module.weight.data[0, 0] = float("inf")
    with pytest.raises(SlipwayError, match=r"and weight has values that are no numbers; lower --lr, which is 0\.5"):
        Finite(recipe).on_train_batch_end(trainer, module)
    with pytest.raises(DataError, match="before the first step; import the model again"):
        Finite(recipe).on_train_batch_start(trainer, module)
    trainer.callback_metrics["reduced_train_loss"] = torch.tensor(1.0)
    Finite(recipe).on_train_batch_end(trainer, module)


@pytest.mark.parametrize(
    "seen, why", [("SIGTERM", "SIGTERM"), (None, "a request to stop on another node"), (False, "")]
)
def test_why_a_run_stops_is_known_to_the_rank_that_looked_before_the_request_came(tmp_path, monkeypatch, seen, why):
    """Another rank of this node sees the file, or one of another node; or nobody does."""
    from slipway.training import cpu

    cpu.enable()
    from slipway.training import callbacks

    file, record = tmp_path / "stop", SimpleNamespace(status={"why": ""})

    def agree(asked: bool) -> bool:
        assert not asked
        if seen:
            file.write_text(seen)
        return seen is not False

    monkeypatch.setattr(callbacks, "agree", agree)
    trainer = SimpleNamespace(global_step=1, should_stop=False)
    callbacks.StopOnRequest(file, record).on_train_batch_end(trainer, None)
    assert record.status["why"] == why and trainer.should_stop == bool(why)


def test_two_runs_do_not_go_into_one_folder(folder, tmp_path, warm):
    run = RunFolder(tmp_path / "run")
    first = warm.start(words(folder, run.path, steps=10**6, save_every=10**6), tmp_path / "first")
    while not run.metrics.exists():
        assert first.poll() is None, first.output.read_text()
        time.sleep(0.05)
    code, output = train(words(folder, run.path, steps=10**6, save_every=10**6), commands=warm)
    assert code == 78 and "is held by a run on" in output.splitlines()[-1] and "Traceback" not in output, output
    first.send_signal(signal.SIGTERM)
    assert first.finish()[0] == 75 and not run.owner.exists()


def test_starts_that_are_stopped_before_a_step_do_not_go_on_for_ever(folder, tmp_path, warm, capsys):
    """Twice it may happen; the third time a scheduler must not queue the run again."""
    run, codes = RunFolder(tmp_path / "run"), []
    for number in range(3):
        gate = Gate(tmp_path / f"gate{number}")
        code, output = train(words(folder, run.path), commands=warm, gate=gate)
        codes.append(code)
    assert codes == [75, 75, 1], output
    assert "3 starts in a row were stopped at step 0, before a new step was saved" in output.splitlines()[-1]
    assert cli.main(["watch", str(run.path)]) == 1  # as the last start
    assert "run: stopped, step 0 of 8: 3 starts in a row were stopped at step 0" in capsys.readouterr().out
    code, output = train(words(folder, run.path), commands=warm)
    assert code == 0, output
    assert run.read_status()["in_vain"] == 0 or run.read_status()["state"] == "done"
