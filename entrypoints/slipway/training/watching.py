"""A run as its folder shows it, from any machine that sees the folder: state, curve, time left."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from slipway.errors import DataError, SlipwayError, Stopped, UsageError
from slipway.report import human_seconds
from slipway.training import claim
from slipway.training.curve import BARS, sparkline
from slipway.training.run_folder import CURE, WHEN, RunFolder, now
from slipway.untrusted import harmless_lines

ENDED = ("done", "stopped", "failed")
# Seen where the run was on this machine; elsewhere only its silence shows.
KILLED = "it was killed, its process is gone; run the same command again to continue"
WIDTH = 60  # bars of the curve
SILENT = 10  # times as long as a step takes, and SILENT_SECONDS at least, before a run counts as silent
SILENT_SECONDS = 120.0


@dataclass(frozen=True)
class Look:
    """What a run's folder shows at one time.

    Args:
        status: status.json.
        metrics: an entry per step.
        silent: seconds since something was written.
    """

    folder: RunFolder
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    silent: float

    @property
    def has_ended(self) -> bool:
        return self.status["state"] in ENDED

    @property
    def exit_code(self) -> int:
        """The one that `train` ended with; 0 while it goes."""
        if self.status["state"] == "stopped":
            return self.status.get("exit_code", Stopped.exit_code)
        return self.status.get("exit_code", SlipwayError.exit_code) if self.status["state"] == "failed" else 0

    def line(self) -> str:
        """State, progress and time left in one line."""
        state, step, steps = self.status["state"], self.status.get("step", 0), self.status.get("steps", 0)
        said = f"{self.folder.path.name}: {state}, step {step} of {steps}"
        said += f", loss {self.status['loss']:.6f}" if "loss" in self.status else ""
        if "eval_loss" in self.status:
            said += f" (evaluation {self.status['eval_loss']:.6f})"
        if self.metrics and not self.has_ended:
            last = self.metrics[-1]
            said += f", lr {last['lr']:.3g}, {last['tokens_per_second']:.0f} tokens/s"
        if not self.has_ended and (left := self.status.get("seconds_left")):
            said += f", {human_seconds(max(0.0, left - self.silent))} left"
        if self.has_ended and self.status.get("why"):
            said += f": {self.status['why']}"
        if self._is_silent:
            said += f"; nothing was written for {human_seconds(self.silent)}: look at {self.folder.logs}"
        return said

    @property
    def _is_silent(self) -> bool:
        step = self.metrics[-1]["seconds"] if self.metrics else 0.0
        return not self.has_ended and self.silent > max(SILENT_SECONDS, SILENT * step)

    def __str__(self) -> str:
        if not self.metrics or not _is_shown(BARS):
            return self.line()
        losses = [entry["loss"] for entry in self.metrics]
        return f"{self.line()}\n{sparkline(self.metrics, WIDTH)} loss {losses[0]:.4f} → {losses[-1]:.4f}"

    def as_dict(self) -> dict[str, Any]:
        """The status as JSON-ready object."""
        return {
            "command": "watch",
            "run": str(self.folder.path),
            "silent_seconds": round(self.silent, 1),
            **self.status,
        }


def rows(text: str, width: int) -> int:
    """The rows that a text takes on a terminal of so many columns, which breaks lines that are longer."""
    columns = [sum(1 + (east_asian_width(one) in "WF") for one in line) for line in text.split("\n")]
    return sum(max(1, -(-count // width)) for count in columns)


def _is_shown(characters: str) -> bool:
    """Whether standard output can show these characters in its encoding."""
    try:
        characters.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def look(run: Path) -> Look:
    """What the folder of a run shows now; UsageError where it is none."""
    folder = RunFolder(run)
    is_gone = claim.is_gone(folder.owner)  # before the status, which is then the last that it has written
    if not (status := folder.read_status()):
        raise UsageError(f"{run} is not the folder of a run: it has no status.json; give the --out of `slipway train`")
    updated = status.get("updated")
    try:
        then = datetime.strptime(updated, WHEN).replace(tzinfo=UTC).timestamp() if updated else 0
    except ValueError:
        raise DataError(f"{folder.status}: updated is not a time such as {now()}; {CURE}") from None
    if is_gone and status["state"] not in ENDED:
        status |= {"state": "failed", "why": KILLED, "exit_code": SlipwayError.exit_code}
    silent = max(0.0, time.time() - (then or folder.status.stat().st_mtime))
    return Look(folder, status, folder.read_metrics(), silent)


def follow(run: Path, every: float) -> Look:
    """Show the run until it ends: on a terminal the same lines again, in a log a line when something has changed.

    Args:
        every: seconds between two looks.
    """
    shown, height = "", 0
    while True:
        found = look(run)
        if sys.stdout.isatty():
            shown_now = harmless_lines(str(found))
            print(f"\x1b[{height}A\x1b[J" if height else "", shown_now, sep="", flush=True)
            height = rows(shown_now, shutil.get_terminal_size().columns)
        elif (step := f"{found.status['state']} {found.status.get('step')}") != shown and not found.has_ended:
            print(harmless_lines(found.line()), flush=True)
            shown = step
        if found.has_ended:
            if height:
                print(f"\x1b[{height}A\x1b[J", end="")  # the caller shows it once more
            return found
        time.sleep(every)
