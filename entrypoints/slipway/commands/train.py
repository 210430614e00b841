"""`slipway train`: from a NeMo checkpoint and token data to trained heads, adapters or weights."""

from __future__ import annotations

from typing import Any, Literal

from slipway.launch.placement import Patience, Placement
from slipway.options import parameters_of, take, with_options
from slipway.report import Summary
from slipway.training.recipe import Recipe
from slipway.training.recipes import Choice


@with_options(Choice, Recipe, Placement, Patience)
def train(*, resume: Literal["auto", "never"] = "auto", dry_run: bool = False, **options: Any) -> Summary | str:
    """Train with NeMo, in this process or under torchrun, on one node or many.

    On SIGTERM, SIGINT or SIGUSR1, or when its terminal is closed, it saves after the current step and exits with 75.
    The same command continues from there, with the same order of the data. Run it on every node with the same flags
    except --node-rank.

    Args:
        resume: auto = continue from the newest checkpoint in OUT; never = stop if there is one.
        dry_run: print the recipe, the topology, the memory needed and the torchrun command, and do nothing.
    """
    from slipway.training import start

    request = start.Request(
        given={name: value for name, value in options.items() if name in parameters_of(Recipe)},
        choice=take(Choice, options),
        placement=take(Placement, options),
        patience=take(Patience, options),
        resume=resume,
    )
    return start.plan(request) if dry_run else start.run(request)
