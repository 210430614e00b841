"""`slipway doctor`: is this machine, and are these nodes together, fit to train?"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slipway.checkpoint import locate
from slipway.errors import PreflightError, SlipwayError, UsageError
from slipway.launch import checks
from slipway.launch.checks import Check
from slipway.launch.link import meet
from slipway.launch.placement import Placement
from slipway.launch.token import Token
from slipway.launch.topology import Topology, find_topology
from slipway.options import LARGEST, option, take, with_options
from slipway.training.recipe import MODES, Recipe
from slipway.untrusted import harmless

STYLES = {"ok": "green", "warn": "yellow", "unfit": "bold red"}
WIDTH_OF_LOGS = 140


@dataclass
class Diagnosis:
    """A table of checks; unfit as a whole as soon as one of them is."""

    checks: list[Check]
    seconds: float
    coloured: ClassVar[bool] = True

    @property
    def exit_code(self) -> int:
        return PreflightError.exit_code if self.unfit else 0

    @property
    def unfit(self) -> list[str]:
        return [check.what for check in self.checks if check.state == "unfit"]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("", "check", "found", box=None, pad_edge=False)
        for check in self.checks:
            found, cure = harmless(check.found), harmless(check.cure)
            table.add_row(Text(check.state, STYLES[check.state]), Text(check.what), Text(found))
            if cure:
                table.add_row("", "", Text(f"→ {cure}", "dim"))
        console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)
        with console.capture() as shown:
            console.print(table)
        verdict = f"unfit: {', '.join(self.unfit)}" if self.unfit else "fit"
        rows = "".join(f"{row.rstrip()}\n" for row in shown.get().splitlines())
        return f"{rows}doctor: {verdict} ({len(self.checks)} checks, {self.seconds:.1f} s)"

    def as_dict(self) -> dict[str, Any]:
        return {"fit": not self.unfit, "seconds": round(self.seconds, 3), "checks": [vars(c) for c in self.checks]}


@dataclass(frozen=True)
class Planned:
    """The run that the machine is checked for."""

    out: str | None = option(None, "folder of the planned run: it must be writable, shared and large enough")
    model: str | None = option(None, "NeMo checkpoint that will be trained, for the size of its checkpoints")
    mode: str = option("heads", "what will be trained, as `train` takes it", choices=MODES)
    keep: int = option(Recipe.keep, "number of checkpoints that will be kept", low=1, high=LARGEST)
    gpus: int | None = option(
        None, "GPUs that this machine must have", low=0, high=1024, otherwise="any number; none is only a warning"
    )
    timeout: float = option(60.0, "time to wait for other nodes", unit="seconds", above=0, high=10**7)


@with_options(Planned, Placement)
def doctor(**options: Any) -> Diagnosis:
    """Check the machine, the network and the disk before a training run; exit 78 when unfit.

    Run it like `train`, on every node at once: then it also checks whether the nodes find each other, whether they
    share OUT, and how fast an all-reduce over all of them is.
    """
    started = time.monotonic()
    planned, placement = take(Planned, options), take(Placement, options)
    topology = find_topology(placement)
    weights = _weights(planned.model) if planned.model else None
    found = [
        checks.gpus(topology.processes_per_node, planned.gpus),
        checks.driver(),
        checks.shared_memory(topology.processes_per_node),
        checks.locked_memory(),
        checks.rdma(topology.nodes),
        checks.verbs(topology.nodes),
        checks.master_name(topology),
        checks.master_ports(topology),
    ]
    folder = Path(planned.out).absolute() if planned.out is not None else None
    if folder:
        found += [checks.output_folder(folder), checks.free_space(folder, weights, planned.mode, planned.keep)]
    # What takes all nodes is tried only where this one is ready for it; the others then miss it and say so.
    if all(check.state != "unfit" for check in found):
        found += _together(topology, folder, planned.timeout, placement.run_token_file)
    return Diagnosis(found, time.monotonic() - started)


def _together(topology: Topology, folder: Path | None, timeout: float, token_file: str | None) -> list[Check]:
    found = []
    if topology.nodes > 1:
        # Without a folder there is nothing to agree on a secret by: then anybody could take part in this check.
        token = Token.of(checks.existing(folder) if folder else None, token_file)
        try:
            link = meet(topology, {"the command": "doctor", "--out": str(bool(folder))}, timeout, token)
        except SlipwayError as error:
            return [Check("nodes meet", "unfit", str(error), "run it on all nodes at once, with the same flags")]
        found.append(Check("nodes meet", "ok", f"{topology.nodes} of {topology.nodes} are there"))
        if folder and topology.writes:
            found.append(checks.shared_folder(folder, topology, link, timeout))
        else:
            link.finish()
        link.close()
    return [*found, checks.all_reduce(topology, timeout)]


def _weights(model: str) -> Path:
    weights = locate.nemo_path(model) / "weights"
    if not weights.is_dir():
        raise UsageError(f"--model {model} is no NeMo checkpoint; `slipway import` makes it from a Hugging Face model")
    return weights
