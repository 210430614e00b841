"""The folder of one training run: its files, and what they hold.

checkpoints/step=N/   NeMo checkpoints; one that has `step=N-unfinished` beside it is not complete
checkpoints/damaged-step=N/   one that was complete and is damaged, which nothing reads
recipe.json           what is computed
inputs.json           digests of the data, the model, the adapters to begin with and the tokenizer
owner.json            who runs into the folder, as long as it runs
status.json           state (starting, running, stopped, done, failed), step, loss, tokens, times, why it ended and the
                      exit code
metrics.jsonl         one object per step: step, loss, lr, tokens, seconds
evaluations.jsonl     one object per evaluation: step, loss
logs/node0/…           what each rank printed
loss.png              the curve so far, drawn again now and then
tensorboard/
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import locate
from slipway.errors import DataError
from slipway.training.recipe import Recipe
from slipway.untrusted import NotJson, harmless, parse_json, read_bytes, read_object, replace_file

CURE = "restore it, or choose another --out"
DONE = "all steps are done"  # why a run ended, in the status
WHEN = "%Y-%m-%dT%H:%M:%SZ"
# What the readers of these files rely on, where it is there. A loss that is not finite is JSON's NaN; the time left is
# null where it is not known.
NUMBER, COUNT, TEXT = (int, float), (int,), (str,)
IN_STATUS = {
    "state": TEXT, "why": TEXT, "updated": TEXT, "step": COUNT, "steps": COUNT, "tokens": COUNT, "exit_code": COUNT,
    "in_vain": COUNT, "loss": NUMBER, "eval_loss": NUMBER, "seconds_left": (*NUMBER, type(None)),
}  # fmt: skip
IN_METRICS = {"step": COUNT, "loss": NUMBER, "lr": NUMBER, "tokens_per_second": NUMBER, "seconds": NUMBER}
IN_EVALUATIONS = {"step": COUNT, "loss": NUMBER}
Shape = Mapping[str, tuple[type, ...]]
LARGEST = 1 << 53  # of a count; beyond it a number of JSON is not exact


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        """The folder that a recipe writes to."""
        return cls(Path(recipe.out))

    @property
    def checkpoints(self) -> Path:
        return self.path / locate.RUNS_CHECKPOINTS

    @property
    def recipe(self) -> Path:
        return self.path / locate.RUNS_RECIPE

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def owner(self) -> Path:
        return self.path / "owner.json"

    @property
    def status(self) -> Path:
        return self.path / locate.RUNS_STATUS

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.checkpoints / f"step={step}"

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest complete checkpoint."""
        return locate.latest_checkpoint(self.checkpoints)

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, the newest first."""
        return locate.complete_checkpoints(self.checkpoints)

    def set_aside(self, checkpoints: Iterable[Path]) -> None:
        """Give damaged checkpoints another name: the run saves these steps again, and nothing takes them for whole."""
        for folder in checkpoints:
            numbers = itertools.count(2)
            aside = self.checkpoints / f"damaged-{folder.name}"
            while aside.exists():
                aside = self.checkpoints / f"damaged-{folder.name}-{next(numbers)}"
            folder.rename(aside)

    def remove_incomplete(self) -> None:
        """Remove what a killed run was writing. NeMo would save the same step beside it under another name."""
        for folder in sorted(self.checkpoints.glob("step=*")):  # a checkpoint before the mark beside it
            if not locate.is_complete(folder):
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()

    def remove_older(self, keep: int) -> None:
        """Remove all complete checkpoints but the newest ones; one that is removed in part is not complete."""
        for _, folder in self.complete_checkpoints()[keep:]:
            unfinished = locate.unfinished(folder)
            unfinished.touch()
            shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now is removed at the next start
            if not folder.exists():
                unfinished.unlink()

    def read_status(self) -> dict[str, Any]:
        """The content of the status file, or {} if there is none; DataError for values that no run writes."""
        if not self.status.exists():
            return {}
        status = read_object(self.status, cure=CURE)
        _check(self.status, status, IN_STATUS, needed=("state",))
        if not 0 <= status.get("exit_code", 0) < 256:
            raise DataError(f"{self.status}: exit_code is not from 0 to 255; {CURE}")
        return status

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace the status file; a reader sees the old or the new one, never a part."""
        replace_file(self.status, (json.dumps(status, indent=1) + "\n").encode(), durable=False)  # it comes each step

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per step, in order."""
        return _read_lines(self.metrics, IN_METRICS)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """One dict per evaluation, in order; `step` is the number of the step before it."""
        return _read_lines(self.evaluations, IN_EVALUATIONS)

    def misses_evaluation(self, recipe: Recipe, step: int) -> bool:
        """An evaluation is due after so many steps, and none is recorded: the run was stopped or killed in it."""
        if not recipe.eval_data or not step or (step % recipe.eval_every and step < recipe.steps):
            return False
        return all(entry["step"] != step - 1 for entry in self.read_evaluations())

    def why_done(self, recipe: Recipe, step: int) -> str:
        """Why a run ended that has done all steps, for the status: a stop may have left out the last evaluation."""
        return f"{DONE}, but not the last evaluation" if self.misses_evaluation(recipe, step) else DONE

    def forget_from(self, step: int) -> None:
        """Remove the records from `step` on: a run that continues computes these steps again."""
        for file, entries in ((self.metrics, self.read_metrics()), (self.evaluations, self.read_evaluations())):
            kept = [entry for entry in entries if entry["step"] < step]
            if file == self.metrics or file.exists():
                replace_file(file, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def now() -> str:
    """The time as the status has it, in UTC: 2026-11-25T23:10:00Z."""
    return time.strftime(WHEN, time.gmtime())


def _read_lines(file: Path, shape: Shape) -> list[dict[str, Any]]:
    """The objects of a file. Half a line is ignored: the disk was full, or the line is being written."""
    if not file.exists():
        return []
    lines = read_bytes(file, cure=CURE).splitlines(True)
    try:
        found = [parse_json(line) for line in lines if line.endswith(b"\n")]
    except NotJson as error:
        raise DataError(f"{file}: a line is not JSON ({error}); {CURE}") from None
    for entry in found:
        if not isinstance(entry, dict):
            raise DataError(f"{file}: a line is not an object; {CURE}")
        _check(file, entry, shape, needed=shape)
    return found


def _check(file: Path, entry: dict[str, Any], shape: Shape, needed: Iterable[str]) -> None:
    """DataError for a value of another type or size than a run writes."""
    for name in needed:
        if name not in entry:
            raise DataError(f"{file}: {name} is missing; {CURE}")
    for name, types in shape.items():
        value = entry.get(name, None if type(None) in types else types[0]())
        if type(value) not in types or (isinstance(value, int) and abs(value) > LARGEST):
            raise DataError(f"{file}: {name} is {harmless(repr(value), 60)}; {CURE}")
