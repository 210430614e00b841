"""How many nodes there are, how many processes each has, which node this is, and where the first one is.

Flags come first, then the variables of the launcher that started this process (launchers.py). Hints that disagree stop
the run: if each node of a job believes that it is alone, all of them train the same model and nobody notices.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slipway.errors import UsageError
from slipway.launch.launchers import LAUNCHERS, Hints, Said
from slipway.launch.placement import LAST_PORT, MOST, Placement

DEFAULT_PORT = 29500
ALONE = "(single machine, no launcher found)"  # the source if no flag and no launcher gives the topology

# What all sources must agree on. An address can be written in several ways and a port can have a default, so for these
# the first source decides.
MUST_AGREE = {
    "nodes": "the number of nodes",
    "node_rank": "the number of this node",
    "processes_per_node": "the number of processes per node",
}


# What a launcher may say; the flags have the same ranges.
RANGES = {
    "nodes": (1, MOST),
    "node_rank": (0, MOST),
    "master_port": (1, LAST_PORT),
    "processes_per_node": (1, MOST),
    "local_rank": (0, MOST),
    "gpus": (0, MOST),
}
ADDRESS = re.compile(r"[\w.:-]{1,255}")  # what torchrun takes: no fe80::1%eth0
DEVICE = re.compile(r"[0-9]+|(GPU|MIG)-.+")  # as CUDA_VISIBLE_DEVICES names one
WITH_A_PORT = re.compile(r"[^:]*:\d*")

# Variables that count nodes or processes, and do not say where they are; and what to do where no launcher says more.
# Some reach a container without the others of their launcher, or are those of a launcher that is not known.
NO_STEP = (
    "this command is not a step of that job; start it with srun --ntasks-per-node=1, or give --nodes 1 to use this "
    "node only"
)
GIVE_ALL = "give --nodes, --node-rank and --master-addr, or unset it"
SHOW_OTHERS = {
    "SLURM_JOB_NUM_NODES": NO_STEP,
    "SLURM_NNODES": NO_STEP,
    "WORLD_SIZE": f"it can be a number of processes or of nodes; {GIVE_ALL}",
    "NNODES": f"which of them this is, is unknown; {GIVE_ALL}",
    "AWS_BATCH_JOB_NUM_NODES": f"which of them this is, is unknown; {GIVE_ALL}",
    **{
        name: f"where its processes are is unknown; {GIVE_ALL}"
        for name in (
            "OMPI_COMM_WORLD_SIZE",
            "PMI_SIZE",
            "FLUX_JOB_SIZE",
            "MV2_COMM_WORLD_SIZE",
            "JSM_NAMESPACE_SIZE",
        )
    },
}


@dataclass(frozen=True)
class Topology:
    """The place of this command in the run. `source`: the flags or the launcher that told it.

    `local_rank` is None if this command starts all processes of its node. It is a number if the launcher has started
    one command for every process.
    """

    nodes: int
    processes_per_node: int
    node_rank: int
    master_addr: str
    master_port: int
    source: str
    local_rank: int | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def rank(self) -> int:
        """The first rank that this command starts."""
        return self.node_rank * self.processes_per_node + (self.local_rank or 0)

    @property
    def writes(self) -> bool:
        """Whether this command is the first one on its node."""
        return not self.local_rank

    def __str__(self) -> str:
        source = self.source if self.source == ALONE else f"from {self.source}"
        return (
            f"topology: {self.nodes} node{'s' * (self.nodes > 1)} × {self.processes_per_node}, this is node "
            f"{self.node_rank}{'' if self.local_rank is None else f', process {self.local_rank}'}, "
            f"master {self.master_addr}:{self.master_port}, {source}"
        )


def find_topology(placement: Placement, env: Mapping[str, str] = os.environ) -> Topology:
    """The topology from flags, else from the launcher's variables, else one node.

    Errors: UsageError if something is missing or out of range, or if two sources disagree.
    """
    placement.check()
    given = {
        "nodes": placement.nodes,
        "node_rank": placement.node_rank,
        "master_addr": placement.master_addr,
        "master_port": placement.master_port,
        "processes_per_node": placement.nproc_per_node,
    }
    _refuse_to_be_a_worker(env)
    # From the most to the least trusted: the first one that gives a value decides.
    flags = Hints("flags", **{name: _flag(name, value) for name, value in given.items()})
    sources = [flags, *(hints for launcher in LAUNCHERS if (hints := launcher(env)))]
    for name in MUST_AGREE:
        _refuse_disagreement(name, sources)
    if not any(hints.nodes for hints in sources):
        _refuse_to_be_alone(env)
    for name, (low, high) in RANGES.items():
        _refuse_out_of_range(name, low, high, sources)
    _refuse_addresses(sources)
    count, counted_by = _pick("nodes", sources, 1)
    if count == 1:
        return _one_node(flags, sources, counted_by or ALONE, env)

    rank, ranked_by = _pick("node_rank", sources)
    address, addressed_by = _pick("master_addr", sources)
    if rank is None or address is None:
        missing = f"--node-rank, 0 to {count - 1}" if rank is None else "--master-addr, the address of node 0"
        raise UsageError(f"{count} nodes need {missing}; give it on every node")
    _check_rank(next(hints.node_rank for hints in sources if hints.node_rank), count)
    return Topology(
        count,
        _processes(sources, env),
        rank,
        address,
        _pick("master_port", sources, DEFAULT_PORT)[0],
        " and ".join(dict.fromkeys(by for by in (counted_by, ranked_by, addressed_by) if by)),
        _pick("local_rank", sources)[0],
    )


def _one_node(flags: Hints, sources: list[Hints], source: str, env: Mapping[str, str]) -> Topology:
    """A single node is node 0 at 127.0.0.1. A launcher may give it another number: the pods of an Indexed Job have
    numbers even if each of them is a separate run."""
    rank, address = _pick("node_rank", [flags], 0)[0], _pick("master_addr", [flags], "127.0.0.1")[0]
    if rank:
        raise UsageError(f"--node-rank is {rank}, but there is one node, number 0: give --nodes too, or leave it out")
    port, local_rank = _pick("master_port", sources, DEFAULT_PORT)[0], _pick("local_rank", sources)[0]
    return Topology(1, _processes(sources, env), rank, address, port, source, local_rank)


def _flag(name: str, value: Any) -> Said | None:
    flag = {"processes_per_node": "--nproc-per-node"}.get(name, f"--{name.replace('_', '-')}")
    return None if value is None else Said(value, flag)


def _pick(name: str, sources: list[Hints], default: Any = None) -> tuple[Any, str | None]:
    """The first value that a source gives, and the source; else the default and None."""
    for hints in sources:
        if (said := getattr(hints, name)) is not None:
            return said.value, hints.source
    return default, None


def _refuse_disagreement(name: str, sources: list[Hints]) -> None:
    said = [value for hints in sources if (value := getattr(hints, name)) is not None]
    for one, other in itertools.pairwise(said):
        if one.value != other.value:
            raise UsageError(
                f"{one.by} is {one.value} and {other.by} is {other.value}, but both are {MUST_AGREE[name]}; remove one "
                "of them or make them equal"
            )


def _refuse_out_of_range(name: str, low: int, high: int, sources: list[Hints]) -> None:
    for said in (getattr(hints, name) for hints in sources):
        if said is not None and not low <= said.value <= high:
            raise UsageError(f"{said.by} is {said.value}; it must be {low} to {high}: correct it, or unset it")


def _refuse_addresses(sources: list[Hints]) -> None:
    for said in (hints.master_addr for hints in sources):
        if said is not None and (not ADDRESS.fullmatch(said.value) or WITH_A_PORT.fullmatch(said.value)):
            raise UsageError(
                f"{said.by} is {said.value[:60]!r}; it must be a host name or an IP address, without a port or %"
            )


def _refuse_to_be_a_worker(env: Mapping[str, str]) -> None:
    if "TORCHELASTIC_RUN_ID" in env:
        raise UsageError(
            "TORCHELASTIC_RUN_ID is set: torchrun started this command, but the command starts torchrun itself; run "
            "`slipway` once per node, without torchrun"
        )


def _refuse_to_be_alone(env: Mapping[str, str]) -> None:
    """UsageError if no source gives the number of nodes, but a variable shows that there is more than one."""
    if "JOB_COMPLETION_INDEX" in env:
        raise UsageError(
            "JOB_COMPLETION_INDEX is set, but the number of pods is unknown; give --nodes, or set NNODES in the pod's "
            "environment to the Job's `completions`"
        )
    for name, cure in SHOW_OTHERS.items():
        if (count := env.get(name) or "1") != "1":
            raise UsageError(f"{name} is {count[:60]}, but {cure}")


def _check_rank(rank: Said, count: int) -> None:
    if rank.value >= count:
        raise UsageError(f"{rank.by} is {rank.value}; with {count} nodes it must be 0 to {count - 1}")


def _processes(sources: list[Hints], env: Mapping[str, str]) -> int:
    return _pick("processes_per_node", sources)[0] or _pick("gpus", sources)[0] or count_gpus(env)


def gpus_here(env: Mapping[str, str] = os.environ) -> int:
    """GPUs that a process here may use, counted by the driver's device files, without torch."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA takes those before the first that is none: -1, or NoDevFiles of Slurm
        return len(list(itertools.takewhile(DEVICE.fullmatch, (one.strip() for one in visible.split(",")))))
    return len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """GPUs of this machine, or 1."""
    return max(1, gpus_here(env))
