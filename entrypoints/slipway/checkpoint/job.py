"""One conversion, from its plan to its summary: the common part of every command that writes a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, overload

from slipway.checkpoint import locate
from slipway.checkpoint.forecast import Forecast, forecast
from slipway.checkpoint.stream import Plan, parse_size, refuse_existing, run
from slipway.report import Summary

Planning = Callable[[], tuple[Plan, dict[str, Any]]]  # gives (plan, what the summary says besides sizes and time)


@overload
def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: Literal[False] = ...) -> Summary: ...


@overload
def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: bool) -> Summary | Forecast: ...


def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: bool = False) -> Summary | Forecast:
    """Make the plan and carry it out; with `dry_run` only say what it would need.

    Args:
        command: its name, for the progress and the summary.
        out: where it writes, as the user gave it; it must not exist yet.
        memory: most bytes for the tensors that are at work, as the user gave it.
        plan: makes the plan; it is called after the other arguments are checked, because it reads all headers.
    """
    started, target = time.monotonic(), locate.output(out)
    budget = parse_size(memory, "--memory")
    refuse_existing(target)
    made, details = plan()
    if dry_run:
        return forecast(made, target, command, budget, started)
    run(made, target, command, budget)
    return Summary(command, str(target), made.bytes, time.monotonic() - started, details)
