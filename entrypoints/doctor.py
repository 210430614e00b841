"""`slipway doctor`: is this machine, and are these nodes together, fit to train?"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entrypoints.checkpoint import locate
from entrypoints.errors import PreflightError, SlipwayError, UsageError
from entrypoints.launch import checks
from entrypoints.launch.checks import Check
from entrypoints.launch.link import meet
from entrypoints.launch.topology import Topology, find_topology
from entrypoints.training.recipe import Recipe

STYLES = {"ok": "green", "warn": "yellow", "unfit": "bold red"}
WIDTH_OF_LOGS = 140


@dataclass
class Diagnosis:
    """A table of checks; unfit as a whole as soon as one of them is."""

    checks: list[Check]
    seconds: float

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
            table.add_row(Text(check.state, STYLES[check.state]), Text(check.what), Text(check.found))
            if check.cure:
                table.add_row("", "", Text(f"→ {check.cure}", "dim"))
        console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_LOGS)
        with console.capture() as shown:
            console.print(table)
        verdict = f"unfit: {', '.join(self.unfit)}" if self.unfit else "fit"
        rows = "".join(f"{row.rstrip()}\n" for row in shown.get().splitlines())
        return f"{rows}doctor: {verdict} ({len(self.checks)} checks, {self.seconds:.1f} s)"

    def as_dict(self) -> dict[str, Any]:
        return {"fit": not self.unfit, "seconds": round(self.seconds, 3), "checks": [vars(c) for c in self.checks]}


def doctor(
    *,
    out: str | None = None,
    model: str | None = None,
    mode: Literal["heads", "sft", "lora", "pretrain"] = Recipe.mode,
    keep: int = Recipe.keep,
    gpus: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    nproc_per_node: int | None = None,
    timeout: float = 60.0,
) -> Diagnosis:
    """Check the machine, the network and the disk before a training run; exit 78 when unfit.

    Run it as `train` will be run, on every node at once, and it also sees whether the nodes find each other, share OUT
    and how fast they add numbers together.

    Args:
        out: folder of the run to come: writable, shared between the nodes, large enough.
        model: NeMo checkpoint that will be trained, for the size of the checkpoints to come.
        mode: what will be trained, as `train` takes it.
        keep: newest checkpoints that will be kept.
        gpus: GPUs that this machine must have; without it, none is no more than a warning.
        nodes: number of nodes; without it, what the launcher says, else 1.
        node_rank: number of this node, from 0.
        master_addr: address of node 0.
        master_port: port on node 0 (29500); the one after it is used as well.
        nproc_per_node: processes per node; without it, one per GPU.
        timeout: seconds to wait for other nodes.
    """
    started = time.monotonic()
    topology = find_topology(nodes, node_rank, master_addr, master_port, nproc_per_node)
    weights = _weights(model) if model else None
    found = [
        checks.gpus(topology.processes_per_node, gpus),
        checks.driver(),
        checks.shared_memory(topology.processes_per_node),
        checks.locked_memory(),
        checks.rdma(topology.nodes),
        checks.master_name(topology),
        checks.master_ports(topology),
    ]
    folder = Path(out).absolute() if out is not None else None
    if folder:
        found += [checks.output_folder(folder), checks.free_space(folder, weights, mode, keep)]
    # What takes all nodes is tried only where this one is ready for it; the others then miss it and say so.
    if all(check.state != "unfit" for check in found):
        found += _together(topology, folder, timeout)
    return Diagnosis(found, time.monotonic() - started)


def _together(topology: Topology, folder: Path | None, timeout: float) -> list[Check]:
    found = []
    if topology.nodes > 1:
        try:
            link = meet(topology, {"the command": "doctor", "--out": str(bool(folder))}, timeout)
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
