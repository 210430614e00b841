"""How many nodes, how many processes on each, which node is this, and where is the first one?

Flags go first, then what the launcher that started this process says. Hints that disagree stop the run, because a
job whose nodes each believe they are alone trains the same model many times over and nobody notices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from entrypoints.errors import UsageError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Topology:
    """Where this process stands. `source` names the flags or the launcher that it was read from."""

    nodes: int
    processes_per_node: int
    node_rank: int
    master_addr: str
    master_port: int
    source: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    def __str__(self) -> str:
        return (
            f"topology: {self.nodes} node{'s' * (self.nodes > 1)} × {self.processes_per_node}, this is node "
            f"{self.node_rank}, master {self.master_addr}:{self.master_port}, from {self.source}"
        )


@dataclass(frozen=True)
class Hints:
    """What one launcher says; None where it says nothing."""

    source: str
    nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    processes_per_node: int | None = None


def torchrun_variables(env: Mapping[str, str]) -> Hints | None:
    """PET_*: torchrun's own variables, set by Kubeflow Trainer v2 and PyTorchJob."""
    if "PET_NNODES" not in env:
        return None
    per_node = env.get("PET_NPROC_PER_NODE", "")
    return Hints(
        "torchrun's PET_ variables",
        _number(env, "PET_NNODES"),
        _number(env, "PET_NODE_RANK"),
        env.get("PET_MASTER_ADDR"),
        _number(env, "PET_MASTER_PORT"),
        int(per_node) if per_node.isdigit() else None,
    )


LAUNCHERS: tuple[Callable[[Mapping[str, str]], Hints | None], ...] = (torchrun_variables,)


def find_topology(
    nodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    processes_per_node: int | None,
    env: Mapping[str, str] = os.environ,
) -> Topology:
    """The topology from flags (None where not given), else from the launcher's variables, else one node.

    Errors: UsageError where something needed is missing or two sources disagree.
    """
    flags = Hints("flags", nodes, node_rank, master_addr, master_port, processes_per_node)
    launcher = next((hints for launcher in LAUNCHERS if (hints := launcher(env))), None)
    if launcher and flags.nodes and launcher.nodes and flags.nodes != launcher.nodes:
        raise UsageError(f"--nodes says {flags.nodes}, {launcher.source} say {launcher.nodes}; drop one of the two")

    def pick(name: str, default: object) -> object:
        for hints in (flags, launcher):
            if hints and getattr(hints, name) is not None:
                return getattr(hints, name)
        return default

    count = pick("nodes", 1)
    rank = pick("node_rank", 0 if count == 1 else None)
    address = pick("master_addr", "127.0.0.1" if count == 1 else None)
    if rank is None or address is None:
        missing = "--node-rank" if rank is None else "--master-addr"
        raise UsageError(f"{count} nodes need {missing}: the same command with it on each node")
    if not 0 <= rank < count:
        raise UsageError(f"--node-rank is {rank}; with {count} nodes it goes from 0 to {count - 1}")
    source = "flags" if nodes is not None else launcher.source if launcher else "nothing but this machine"
    return Topology(
        count,
        pick("processes_per_node", None) or _devices(),
        rank,
        address,
        pick("master_port", DEFAULT_PORT),
        source,
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r}; only a fixed number works here: set it, or give the flag")
    return int(text)


def _devices() -> int:
    """GPUs of this machine, or 1: counted by the driver's device files, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    return max(1, len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()]))
