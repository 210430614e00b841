"""What is written to a run's folder at its start and its end, and how `train` ends: with a summary or an error."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError, LostPeer, PreflightError, SlipwayError, Stopped, UsageError, WriteError
from slipway.launch.failure import GONE, LOST_A_PEER, Failure
from slipway.launch.topology import Topology
from slipway.report import Summary
from slipway.training.agreement import kept
from slipway.training.claim import Claim
from slipway.training.preflight import NOTE_BYTES, Scanned
from slipway.training.recipe import Recipe
from slipway.training.run_folder import DONE, RunFolder, now
from slipway.training.whole import name_base
from slipway.untrusted import read_object, replace_file, tell

CONTINUE = "run the same command again to continue"
IN_VAIN = 3  # starts in a row that were stopped before they saved a new step, before it is an error


@dataclass(frozen=True)
class Run:
    """One start of `train`: what is computed, where, from which step, and when it began (time.time()).

    Args:
        damaged: checkpoints of later steps, which it passes over.
    """

    recipe: Recipe
    topology: Topology
    folder: RunFolder
    begins_at: int
    started: float
    scanned: Scanned | None = None  # where the data had to be read to know the steps
    damaged: Collection[Path] = ()
    measured: bool = False  # only the speed counts, see worker.run


def claim_folder(run: Run, inputs: dict[str, str]) -> None:
    """On rank 0: write what will be computed here, and put away what is damaged or incomplete.

    Args:
        inputs: digests of what is read, by their names (agreement.py).
    """
    try:
        run.folder.set_aside(run.damaged)
        run.folder.remove_incomplete()
        run.recipe.save(run.folder.recipe)
        begun = read_object(run.folder.inputs, NOTE_BYTES) if run.begins_at and run.folder.inputs.is_file() else {}
        replace_file(run.folder.inputs, (json.dumps(kept(begun, inputs), indent=1) + "\n").encode())
        name_base(run.folder.checkpoint(run.begins_at), Path(run.recipe.model))
        before = run.folder.read_status()
        starting = {"state": "starting", "why": "", "begun_at": run.begins_at, "in_vain": _in_vain(run, before)}
        run.folder.write_status(_until_here(run) | starting | {"started": now(), "updated": now()})
    except OSError as error:
        raise _unwritable(run, error) from None


def finish(run: Run) -> Summary:
    """The summary of a run whose newest checkpoint is at its last step, and on rank 0 the note that it is done.

    A start that was ended after that checkpoint, as in the last evaluation, could not note it. What it has recorded of
    later steps of a longer run is removed.

    Errors: PreflightError where such a start still runs.
    """
    status = run.folder.read_status()
    if status.get("state") != "done" or status.get("step") != run.begins_at:
        # A loss of another step, or how an earlier start failed, does not belong to the end.
        others = {name: value for name, value in status.items() if name not in ("loss", "eval_loss", "exit_code")}
        status = others | _until_here(run) | {"state": "done", "seconds_left": 0, "updated": now()}
        status["why"] = run.folder.why_done(run.recipe, run.begins_at)
        if run.topology.rank == 0:
            _note_the_end(run, status)
    return _summary(run, run.folder.checkpoint(run.begins_at), status)


def _note_the_end(run: Run, status: dict[str, Any]) -> None:
    try:
        with Claim(run.folder.owner):
            run.folder.set_aside(run.damaged)
            run.recipe.save(run.folder.recipe)
            run.folder.forget_from(run.begins_at)
            run.folder.write_status(status)
    except OSError as error:
        raise _unwritable(run, error) from None


def _until_here(run: Run) -> dict[str, Any]:
    """What the status has of the steps before the one that a start begins at: the number, tokens, the last losses."""
    done = [entry for entry in run.folder.read_metrics() if entry["step"] < run.begins_at]
    evaluated = [entry for entry in run.folder.read_evaluations() if entry["step"] < run.begins_at]
    counts = {"step": run.begins_at, "steps": run.recipe.steps, "tokens": sum(entry["tokens"] for entry in done)}
    losses = {"loss": done[-1:], "eval_loss": evaluated[-1:]}
    return counts | {name: entry["loss"] for name, entries in losses.items() for entry in entries}


def _unwritable(run: Run, error: OSError) -> WriteError:
    return WriteError(f"{run.folder.path} cannot be written: {error.strerror}; free some space or choose another --out")


def _in_vain(run: Run, before: Mapping[str, Any]) -> int:
    """How many starts before this one, in a row, were stopped without a new step."""
    was_stopped = before.get("state") in ("starting", "running", "stopped")
    return before.get("in_vain", 0) + 1 if was_stopped and before.get("begun_at") == run.begins_at else 0


def stopped(run: Run, said: str) -> SlipwayError:
    """What a stopped start ends with: Stopped, but an error where every start is stopped before a new step is saved.

    A scheduler starts the job again at Stopped, and would do so for ever.
    """
    status, latest = run.folder.read_status(), run.folder.latest_checkpoint()
    saved = latest[0] if latest else 0
    if saved > run.begins_at or status.get("in_vain", 0) + 1 < IN_VAIN:
        return Stopped(said)
    why = f"{IN_VAIN} starts in a row were stopped at step {saved}, before a new step was saved"
    if run.topology.rank == 0:
        note(run.folder, "stopped", why, SlipwayError.exit_code)  # `watch` ends with the same code
    return SlipwayError(
        f"train: {why}; give them more time before the stop, or make a step shorter with a smaller --global-batch-size "
        "in another --out"
    )


def note(folder: RunFolder, state: str, why: str, code: int) -> None:
    """Write into the status why the run ended, and with which exit code."""
    # A full disk has room for the status again once the checkpoint that did not fit is removed.
    with contextlib.suppress(OSError):
        folder.remove_incomplete()
    with contextlib.suppress(OSError):
        ended = {"state": state, "why": why, "exit_code": code, "updated": now()}
        folder.write_status(folder.read_status() | ended)


def result_of(run: Run, failure: Failure | None, grace_is_over: bool) -> Summary:
    """The summary of a run that has done all steps. Else an error: the errors are those of `train`."""
    status, latest = run.folder.read_status(), run.folder.latest_checkpoint()
    if not failure and (latest or run.measured) and status.get("state") == "done":
        return _summary(run, latest[1] if latest else run.folder.path, status)
    saved = latest[0] if latest else 0
    if not failure and status.get("state") == "stopped":
        raise stopped(run, f"train: stopped and saved at step {saved} of {run.recipe.steps}; {CONTINUE}")
    if grace_is_over and status.get("step", 0) == saved:
        raise stopped(run, f"train: stopped at step {saved} of {run.recipe.steps}, nothing is lost; {CONTINUE}")
    if grace_is_over:
        raise SlipwayError(
            f"train: no checkpoint was saved within --grace; the last one is at step {saved}: increase --grace"
        )
    if failure is None:
        raise SlipwayError(
            f"train: the workers ended without a result: {run.folder.status} says {status.get('state', 'nothing')}, "
            f"step {status.get('step', 0)} of {run.recipe.steps}; look at {run.folder.logs}, and {CONTINUE}"
        )
    if failure.lines:  # the traceback of a worker that did not know its error
        tell("\n".join([f"train: last lines of {failure.who}:", *failure.lines]))
    raise error_of(failure)


def _summary(run: Run, checkpoint: Path, status: dict[str, Any]) -> Summary:
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    details: dict[str, Any] = {"steps": f"{run.begins_at}→{status['step']}"}
    details |= {"loss": f"{status['loss']:.6f}"} if "loss" in status else {}
    details |= {"notes": [status["why"]]} if status.get("why") not in (None, "", DONE) else {}
    return Summary("train", str(checkpoint), size, time.time() - run.started, details, streamed=False)


def error_of(failure: Failure) -> SlipwayError:
    """The worker's own message if it knew what was wrong, else who failed and how."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, WriteError, PreflightError)}
    if failure.said and failure.code in kinds:
        return kinds[failure.code](f"{failure.said} ({failure.who})")
    if failure.blame in (GONE, LOST_A_PEER):
        return LostPeer(f"train: {failure}; {CONTINUE}")
    return SlipwayError(f"train: {failure.said or failure}")
