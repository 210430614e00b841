"""One conversion from its plan to its summary: what every command that writes a checkpoint has in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, overload

from slipway.checkpoint import locate
from slipway.checkpoint.forecast import Forecast, forecast
from slipway.checkpoint.stream import Plan, parse_size, refuse_existing, run
from slipway.report import Summary

Planning = Callable[[], tuple[Plan, dict[str, Any]]]  # (plan, what the summary says beside sizes and time)


@overload
def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: Literal[False] = ...) -> Summary: ...


@overload
def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: bool) -> Summary | Forecast: ...


def carry_out(command: str, out: str, memory: str, plan: Planning, *, dry_run: bool = False) -> Summary | Forecast:
    """Make the plan and carry it out, or with `dry_run` say what it would take.

    Args:
        command: its name, for progress and summary.
        out: where it writes, as the user gave it; it must not exist yet.
        memory: bytes that tensors at work may take, as the user gave them.
        plan: makes the plan; called once the arguments are known to be right.
    """
    started, target = time.monotonic(), locate.output(out)
    budget = parse_size(memory, "--memory")
    refuse_existing(target)
    made, details = plan()
    if dry_run:
        return forecast(made, target, command, budget, started)
    run(made, target, command, budget)
    return Summary(command, str(target), made.bytes, time.monotonic() - started, details)
