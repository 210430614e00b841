"""One conversion, from its plan to its summary: the common part of every command that writes a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, overload

from slipway.checkpoint import finished, locate
from slipway.checkpoint.forecast import Forecast, forecast
from slipway.checkpoint.stream import Plan, check_name, parse_size, refuse_existing, run
from slipway.checkpoint.working import alone
from slipway.errors import UsageError
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

    Errors: UsageError for an output that is there and was made from something else; PreflightError where another
    command is at work on it.
    """
    started, target = time.monotonic(), locate.output(out)
    budget = parse_size(memory, "--memory")
    check_name(target)
    with ExitStack() as held:
        settled = finished.is_settled(target) and not overwrite  # then nothing is written, nor need it be possible
        is_alone = not (dry_run or settled) and target.absolute().parent.is_dir()
        if is_alone:
            held.enter_context(alone(target))
            finished.recover(target)
        replaced = overwrite and os.path.lexists(target)
        before = None if replaced else finished.noted(target)
        if replaced:
            finished.check_replaceable(target)
        elif before is None:
            refuse_existing(target)
        made, details = plan()
        check_apart(target, made.reads)
        if dry_run:
            return forecast(made, target, command, budget, started)
        if before is None and not is_alone:  # its folder is made only now, when there is work to do
            held.enter_context(alone(target))
            if (before := finished.noted(target)) is None:  # another command may have ended since
                refuse_existing(target)
        if before is not None:
            finished.check_same(before, made.digest, target)
            return _done_already(command, target, made, started)
        publish = finished.replace if replaced else finished.name
        run(made, target, command, budget, lambda new, out: publish(new, out, made.digest))
    return Summary(command, str(target), made.bytes, time.monotonic() - started, details)


def check_apart(out: Path, reads: Iterable[Path]) -> None:
    """UsageError where a command would write into what it reads, or replace it."""
    place = Path(os.path.realpath(out))
    for source in reads:
        read = Path(os.path.realpath(source))
        if place == read or place in read.parents or read in place.parents:
            how = "is" if place == read else "contains" if place in read.parents else "lies in"
            raise UsageError(f"{out} {how} {source}, which the command reads; choose another name for the output")


def _done_already(command: str, target: Path, made: Plan, started: float) -> Summary:
    notes = {"notes": ["it is there already, made from the same source with the same flags: nothing was written"]}
    return Summary(command, str(target), made.bytes, time.monotonic() - started, notes, streamed=False)
