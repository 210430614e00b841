"""One conversion, from its plan to its summary: the common part of every command that writes a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

from slipway.checkpoint import finished, locate
from slipway.checkpoint.forecast import Forecast, forecast
from slipway.checkpoint.stream import Plan, parse_size, refuse_existing, run
from slipway.report import Summary

Planning = Callable[[], tuple[Plan, dict[str, Any]]]  # gives (plan, what the summary says besides sizes and time)


@overload
def carry_out(
    command: str, out: str, memory: str, plan: Planning, *, overwrite: bool = ..., dry_run: Literal[False] = ...
) -> Summary: ...


@overload
def carry_out(
    command: str, out: str, memory: str, plan: Planning, *, overwrite: bool = ..., dry_run: bool
) -> Summary | Forecast: ...


def carry_out(
    command: str, out: str, memory: str, plan: Planning, *, overwrite: bool = False, dry_run: bool = False
) -> Summary | Forecast:
    """Make the plan and carry it out; with `dry_run` only say what it would need.

    Args:
        command: its name, for the progress and the summary.
        out: where it writes, as the user gave it. If it is there, made from the same source with the same flags, there
            is nothing to do.
        memory: most bytes for the tensors that are at work, as the user gave it.
        plan: makes the plan; it is called after the other arguments are checked, because it reads all headers.
        overwrite: replace what is at `out`, once the new output is whole.

    Errors: UsageError for an output that is there and was made from something else.
    """
    started, target = time.monotonic(), locate.output(out)
    budget = parse_size(memory, "--memory")
    there = os.path.lexists(target)
    if there and overwrite:
        finished.check_replaceable(target)
        place = finished.new_beside(target)
    else:
        before = finished.noted(target) if there else None
        if before is None:
            refuse_existing(target)
        place = target
    made, details = plan()
    identity = [made.identity, dict(made.sizes)]
    if dry_run:
        return forecast(made, place, command, budget, started)
    if place == target and there and before is not None:
        finished.check_same(before, identity, target)
        return _done_already(command, target, made, started)

    def note(folder: Path) -> None:
        finished.write_note(target, identity, finished.files_of(folder))

    run(made, place, command, budget, before_naming=note)
    if place != target:
        finished.put_in_place(place, target)
    return Summary(command, str(target), made.bytes, time.monotonic() - started, details)


def _done_already(command: str, target: Path, made: Plan, started: float) -> Summary:
    notes = {"notes": ["it is there already, made from the same source with the same flags: nothing was written"]}
    return Summary(command, str(target), made.bytes, time.monotonic() - started, notes, streamed=False)
