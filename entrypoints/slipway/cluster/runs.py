"""A run on a cluster as a person sees it: its steps, what each does now, and how far `train` is."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slipway.errors import Stopped
from slipway.training.run_folder import RunFolder
from slipway.training.watching import Look
from slipway.untrusted import NotJson, harmless, parse_json

# By USR1 and by TERM: a step that does not save, before its time limit, at `submit stop` or at scancel.
BY_A_SIGNAL = (138, 143)
WAITING, GOING, UNKNOWN, DONE, STOPPED, FAILED, CANCELLED, SKIPPED = (
    "waiting", "running", "not known", "done", "stopped", "failed", "cancelled", "not started",
)  # fmt: skip
ENDED = (DONE, STOPPED, FAILED, CANCELLED, SKIPPED)
GOOD = ("COMPLETED",)
AT_WORK = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")
IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "PREEMPTED")
FORGOTTEN = "Slurm has forgotten it"
# What a person can do about the reason why a job waits.
REASONS = {
    "Dependency": "for the step before",
    "DependencyNeverSatisfied": "for a step that failed",
    "BeginTime": "Slurm starts it again after two minutes",
    "Resources": "for free nodes",
    "Priority": "for jobs before it",
    "JobHeldUser": "it is held; `scontrol release` of the job lets it begin",
    "JobHeldAdmin": "an administrator holds it",
    "launch failed requeued held": "Slurm could not start it, and holds it; `scontrol release` of the job tries again",
    "None": "",
}


@dataclass(frozen=True)
class StepState:
    """One step, as it is now.

    Args:
        name: number and verb.
        job: its id in the cluster.
        state: one of ENDED, or waiting or running, or not known.
        said: why, where and how long, for people.
        code: its exit code, where it has ended and left one.
        starts: how often it began.
        progress: of the run's folder, where the step has one; "" where not.
    """

    name: str
    job: str
    state: str
    said: str = ""
    code: int | None = None
    starts: int = 0
    progress: str = ""
    status: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        again = f", start {self.starts}" if self.starts > 1 else ""
        line = f"{self.name:16} job {self.job:10} {self.state}{again}" + (f": {self.said}" if self.said else "")
        return f"{line}\n{'':16} {self.progress}" if self.progress else line


@dataclass(frozen=True)
class Overview:
    """A run: its steps in order.

    Args:
        warning: what could not be asked.
    """

    run: str
    steps: list[StepState]
    warning: str = ""

    @property
    def has_ended(self) -> bool:
        return all(step.state in ENDED for step in self.steps)

    @property
    def exit_code(self) -> int:
        """0 while it goes and when it is done; else that of the step that ended it."""
        if not self.has_ended:
            return 0
        for step in self.steps:
            if step.state == STOPPED:
                return Stopped.exit_code
            if step.state != DONE:
                return step.code or 1
        return 0

    def __str__(self) -> str:
        lines = [f"run {self.run}", *map(str, self.steps)]
        return "\n".join([*lines, f"submit: note: {self.warning}"] if self.warning else lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as one JSON-ready object."""
        steps = [{**vars(step), "status": step.status or None} for step in self.steps]
        found = {"command": "submit", "run": self.run, "ended": self.has_ended, "steps": steps}
        return found | ({"warning": self.warning} if self.warning else {})


def overview(records: Sequence[Sequence[str]]) -> Overview:
    """What the records of `status` in remote.sh say."""
    one = {record[0]: record for record in records if record[0] in ("run", "now", "meta", "silent")}
    named: dict[str, dict[str, Sequence[str]]] = {}
    silent = "silent" in one
    gone = {record[1]: record[2] for record in records if record[0] == "sacct"}
    for record in records:
        if record[0] in ("step", "queue", "progress"):
            named.setdefault(record[1], {})[record[0]] = record
    now = int(one["now"][1]) if one["now"][1].isdecimal() else 0
    steps: list[StepState] = []
    for name, found in sorted(named.items(), key=lambda one: _number(one[0])):
        steps.append(_step(name, found, gone, steps, now, silent))
    warning = _lost_by_slurm(named, steps)
    if silent:
        warning = f"Slurm does not answer ({one['silent'][1]}); the states are those that jobs left"
    if len(one.get("meta", "")) < 2 or not one["meta"][1]:
        warning = "this run was not submitted whole, and its jobs are held; remove them with `slipway submit cancel`"
    return Overview(one["run"][1], steps, warning)


def _number(name: str) -> int:
    """The number of a step: 10-export comes after 2-train."""
    return int(name.partition("-")[0])


def _lost_by_slurm(named: dict[str, dict[str, Sequence[str]]], steps: Sequence[StepState]) -> str:
    """What a controller that was killed has forgotten: it writes to disk some seconds after it has answered."""
    waits = [step.job for step in steps if named[step.name].get("queue", [""] * 3)[2] in IN_QUEUE]
    if not waits or not any(step.said.startswith(FORGOTTEN) for step in steps):
        return ""
    return (
        f"Slurm has forgotten a part of this run, and job {waits[0]} is still in its queue; take it away with "
        "`slipway submit cancel`, and submit the same chain again to go on"
    )


def _step(
    name: str,
    found: dict[str, Sequence[str]],
    gone: dict[str, str],
    before: Sequence[StepState],
    now: int,
    silent: bool,
) -> StepState:
    _, _, job, ended, marks, last, starts = [*found["step"], *[""] * 7][:7]
    progress, status = _progress(found.get("progress"), now)
    count = int(starts) if starts.strip().isdigit() else 0

    def state(kind: str, said: str = "", code: int | None = None) -> StepState:
        return StepState(name, job, kind, said, code, count, progress, status)

    queue = found.get("queue")
    slurm = queue[2] if queue else gone.get(job, "")
    if slurm in IN_QUEUE and queue:  # whatever it has left: Slurm starts it again
        return state(WAITING, _waits(queue, count))
    if ended:
        return state(*_ended(_code(ended), "cancelled" in marks))
    if slurm in AT_WORK and queue:
        return state(GOING, f"on {queue[4]} for {queue[5]} of {queue[6]}")
    if "cancelled" in marks:
        return state(CANCELLED)
    if not count and any(one.state in (FAILED, CANCELLED, STOPPED, SKIPPED) for one in before):
        return state(SKIPPED, "the step before did not end well")
    if silent:  # a job that is queued again has left a code too
        return state(UNKNOWN, "Slurm does not answer")
    if slurm in GOOD:
        return state(DONE, code=0)
    if "stop" in marks:
        return state(STOPPED if count else SKIPPED, "on request")
    if slurm.startswith("CANCELLED"):
        return state(CANCELLED, "not by `slipway submit`; submit the same chain again to go on")
    if last:  # srun's code; the script that would have noted it for good was killed, or waited to be queued again
        kind, said, code = _ended(_code(last), False)
        return state(kind, said if slurm or kind == DONE else f"{FORGOTTEN}; {said}", code)
    if slurm:
        return state(FAILED, f"Slurm ended it ({slurm.lower()})")
    return state(FAILED, f"{FORGOTTEN}, and it left no exit code; submit the same chain again to go on")


def _code(note: str) -> int:
    """The exit code that a job has noted: "75 1795661678"; 1 for what is none, such as a note that a full disk cut."""
    word = note.split(maxsplit=1)[0] if note.split() else ""
    return int(word) if word.isdecimal() and len(word) < 4 else 1


def _ended(code: int, cancelled: bool) -> tuple[str, str, int]:
    """(state, what is said, code) of a step that left its exit code."""
    if code == 0:
        return DONE, "", code
    if cancelled:
        return CANCELLED, "", code
    if code in (Stopped.exit_code, *BY_A_SIGNAL):
        return STOPPED, "submit the same chain again to go on", code
    return FAILED, f"exit code {code}; see `slipway submit logs`", code


def _waits(queue: Sequence[str], starts: int) -> str:
    reason = REASONS.get(queue[3], queue[3])
    if starts and queue[3] in ("None", "BeginTime"):
        return f"queued again, {REASONS['BeginTime']}"
    begins = f", expected to begin {queue[7]}" if queue[7] not in ("", "N/A") and queue[3] != "BeginTime" else ""
    return f"{reason}{begins}"


def _progress(record: Sequence[str] | None, now: int | None) -> tuple[str, dict[str, Any]]:
    """(a line on how far a run is, its status.json), from a record of remote.sh."""
    if record is None:
        return "", {}
    try:
        return told(parse_json(base64.b64decode(record[3])), record[2], now)
    except (NotJson, binascii.Error):
        return f"{record[2]}/status.json cannot be read", {}


def told(status: Any, out: str, now: int | None) -> tuple[str, dict[str, Any]]:
    """(a line on how far a run is, its status.json) of what a status.json holds.

    Args:
        out: the folder of the run.
        now: the time there; None where nobody knows how old the status is.
    """
    try:
        updated = datetime.strptime(status["updated"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        silent = max(0.0, now - updated) if now is not None else 0.0
        return harmless(Look(RunFolder(Path(out)), status, [], silent).line()), status
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{out}/status.json cannot be read", {}


def progress_line(record: Sequence[str]) -> str:
    """How far a run is, while its log is followed."""
    return _progress(record, None)[0]
