"""`slipway watch`: how far a training run is, from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipway.options import option, take, with_options
from slipway.training import watching


@dataclass(frozen=True)
class Watched:
    """How often one looks."""

    every: float = option(2.0, "time between two looks", unit="seconds", low=0.05, high=86_400)
    once: bool = option(False, "look once and end; the exit code is 0 while the run goes on")


@with_options(Watched)
def watch(run: str, **options: object) -> watching.Look:
    """Show the state, the curve and the time left of a run until it ends, and exit as it did.

    It only reads the folder, so that it works on every machine that sees the folder, whoever runs the training.

    Args:
        run: the --out of `slipway train`.
    """
    wanted = take(Watched, options)
    return watching.look(Path(run)) if wanted.once else watching.follow(Path(run), wanted.every)
