"""What each launcher tells about the cluster: one small function per launcher, from its variables to hints.

WORLD_SIZE and RANK count processes under one launcher and pods under another. So they are read for Volcano only, which
can be recognised by its other variables.
"""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from slipway.errors import UsageError

Environment = Mapping[str, str]


class Said(NamedTuple):
    """A value, and the flag or the variable that gave it."""

    value: Any
    by: str


@dataclass(frozen=True)
class Hints:
    """What one launcher, or the flags, tell; None is unknown."""

    source: str
    nodes: Said | None = None
    node_rank: Said | None = None
    master_addr: Said | None = None
    master_port: Said | None = None
    processes_per_node: Said | None = None
    gpus: Said | None = None  # of this node: one process for each, if no number of processes is given
    local_rank: Said | None = None  # the launcher has started one process per GPU, and this is one of them


def kubeflow_trainer(env: Environment) -> Hints | None:
    """Kubeflow Trainer v2: torchrun's own variables, the master among them."""
    return _torchrun("kubeflow-trainer", env) if "PET_NNODES" in env and "PET_MASTER_ADDR" in env else None


def pytorch_job(env: Environment) -> Hints | None:
    """PyTorchJob v1: torchrun's variables, but the master in MASTER_*. Its RANK is the number of the pod."""
    return _torchrun("pytorchjob", env) if "PET_NNODES" in env and "PET_MASTER_ADDR" not in env else None


def _torchrun(source: str, env: Environment) -> Hints:
    return Hints(
        source,
        nodes=_number(env, "PET_NNODES"),
        node_rank=_number(env, "PET_NODE_RANK"),
        master_addr=_text(env, "PET_MASTER_ADDR", "MASTER_ADDR"),
        master_port=_number(env, "PET_MASTER_PORT", "MASTER_PORT"),
        processes_per_node=_number(env, "PET_NPROC_PER_NODE", besides=("auto", "gpu")),
    )


def skypilot(env: Environment) -> Hints | None:
    """SkyPilot. It gives the addresses of all nodes, one per line."""
    if "SKYPILOT_NUM_NODES" not in env:
        return None
    addresses = env.get("SKYPILOT_NODE_IPS", "").split()
    return Hints(
        "skypilot",
        nodes=_number(env, "SKYPILOT_NUM_NODES"),
        node_rank=_number(env, "SKYPILOT_NODE_RANK"),
        master_addr=Said(addresses[0], "SKYPILOT_NODE_IPS") if addresses else None,
        gpus=_number(env, "SKYPILOT_NUM_GPUS_PER_NODE"),
    )


def dstack(env: Environment) -> Hints | None:
    """dstack, for tasks of several nodes."""
    if "DSTACK_NODES_NUM" not in env:
        return None
    return Hints(
        "dstack",
        nodes=_number(env, "DSTACK_NODES_NUM"),
        node_rank=_number(env, "DSTACK_NODE_RANK"),
        master_addr=_text(env, "DSTACK_MASTER_NODE_IP"),
        gpus=_number(env, "DSTACK_GPUS_PER_NODE"),
    )


# The shell of salloc is a step of one node (slurm.h: SLURM_INTERACTIVE_STEP), however many its job has.
INTERACTIVE = str(0xFFFFFFFA)


def slurm(env: Environment) -> Hints | None:
    """A Slurm step: one task per node, or one per GPU. The first node of its list is the master."""
    if "SLURM_STEP_NODELIST" not in env or env.get("SLURM_STEP_ID") == INTERACTIVE:
        return None
    nodes, mpi = _number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES"), open_mpi(env)
    # mpirun starts its daemons as a step of the other nodes, and its processes have the variables of that step.
    if nodes and mpi and mpi.nodes and mpi.nodes.value > nodes.value:
        return None
    tasks, gpus = _tasks_per_node(env), _number(env, "SLURM_GPUS_ON_NODE")
    hints = {
        "nodes": nodes,
        "node_rank": _number(env, "SLURM_NODEID"),
        "master_addr": _first_host(env, "SLURM_STEP_NODELIST"),
        "gpus": gpus,
    }
    if tasks.value > 1:
        _check_tasks_per_gpu(env, tasks, gpus)
        hints |= {"processes_per_node": tasks, "local_rank": _place_of_task(env, tasks)}
    return Hints("slurm", **hints)


def _first_host(env: Environment, name: str) -> Said:
    hosts = [host for host in expand(env[name], name) if host]
    if not hosts:
        raise _no_list(env[name], name)
    return Said(hosts[0], name)


def _tasks_per_node(env: Environment) -> Said:
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = env.get(name, "1")
    if not (match := re.fullmatch(r"([1-9][0-9]{0,5})(\(x[0-9]+\))?", text)):
        raise UsageError(
            f"{name} is {text[:SHOWN]!r}; every node needs the same number of tasks: set srun --ntasks-per-node"
        )
    return Said(int(match.group(1)), name)


def _place_of_task(env: Environment, tasks: Said) -> Said:
    """Which of the tasks of its node this one is."""
    name = "SLURM_LOCALID"
    place = _number(env, name)
    if place is None or place.value >= tasks.value:
        raise UsageError(
            f"{name} is {env.get(name, 'not set')[:SHOWN]!r}, but {tasks.by} is {tasks.value}; start the command with "
            "srun, and let a container have all variables of SLURM"
        )
    return place


def _check_tasks_per_gpu(env: Environment, tasks: Said, gpus: Said | None) -> None:
    if gpus and gpus.value != tasks.value:
        raise UsageError(
            f"{tasks.by} is {tasks.value}, but {gpus.by} is {gpus.value}; start one task per node (srun "
            "--ntasks-per-node=1) or one per GPU"
        )
    # The worker takes the GPU with its own local rank, and NCCL needs to see the others of the node.
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len(visible.split(",")) != tasks.value:
        raise UsageError(
            f"{tasks.by} is {tasks.value}, but this task sees only CUDA_VISIBLE_DEVICES={visible[:SHOWN]}; every task "
            "must see all GPUs of its node: use srun --gpus-per-node, not --gpus-per-task"
        )


def expand(names: str, by: str = "the node list") -> list[str]:
    """The hosts of a Slurm node list: "a[08-10,12]-ib,b1" → a08-ib, a09-ib, a10-ib, a12-ib, b1.

    Args:
        by: the variable that it is from, for the message of the UsageError where it is no node list.
    """
    hosts: list[str] = []
    if not re.fullmatch(rf"{GROUP}(,{GROUP})*", names):
        raise _no_list(names, by)
    for group in filter(None, re.findall(GROUP, names)):
        parts = [(literal, ranges) for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", group)]
        if len(hosts) + math.prod(_count(ranges, names, by) for _, ranges in parts if ranges) > MOST_HOSTS:
            raise UsageError(f"{by} is {names[:SHOWN]!r}: it names more than {MOST_HOSTS:,} hosts; give --master-addr")
        expanded = [""]
        for literal, ranges in parts:
            expanded = [host + part for host in expanded for part in ([literal] if literal else _numbers(ranges))]
        hosts += expanded
    return hosts


# A name with numbers in brackets; a pattern without choices that overlap, so that matching takes no time.
GROUP = r"[^,\[\]\s]*(?:\[[0-9,-]+\][^,\[\]\s]*)*"
MOST_HOSTS = 100_000
SHOWN = 60  # characters of a value in a message


def _no_list(names: str, by: str) -> UsageError:
    return UsageError(f"{by} is {names[:SHOWN]!r}, not a list of nodes such as a[08-10,12]; give --master-addr")


def _count(ranges: str, names: str, by: str) -> int:
    """How many numbers "08-10,12" has; UsageError for what is no list of ranges."""
    parts = [re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part) for part in ranges.split(",")]
    counts = [int(match[2] or match[1]) - int(match[1]) + 1 for match in parts if match]
    if len(counts) < len(parts) or min(counts) < 1:
        raise _no_list(names, by)
    return sum(counts)


def _numbers(ranges: str) -> list[str]:
    """ "08-10,12" → 08, 09, 10, 12: as wide as the first number of each range."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def open_mpi(env: Environment) -> Hints | None:
    """A process of Open MPI's mpirun, which Kubeflow's MPIJob uses too. It gives no address of a master."""
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    return _mpi("open-mpi", env, *(f"OMPI_COMM_WORLD_{name}" for name in names))


def hydra(env: Environment) -> Hints | None:
    """A process of the mpirun of MPICH or of Intel MPI."""
    return _mpi("mpich", env, "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")


def _mpi(source: str, env: Environment, *names: str) -> Hints | None:
    """One process per node, or one per GPU with the ranks of a node in a row."""
    if not all(name in env for name in names):
        return None
    size, rank, local_size, local_rank = (_number(env, name) or Said(0, name) for name in names)
    if local_size.value < 1 or size.value < 1:
        none = local_size if local_size.value < 1 else size
        raise UsageError(f"{none.by} is {env[none.by]!r}; it must be 1 or more: start the command with mpirun again")
    node_rank, place = divmod(rank.value, local_size.value)
    if size.value % local_size.value or place != local_rank.value:
        raise UsageError(
            f"{rank.by} is {rank.value} of {size.value}, {local_rank.by} is {local_rank.value} of {local_size.value}; "
            "start one process per node (mpirun --map-by ppr:1:node), or one per GPU with the ranks of a node in a row"
        )
    hints = {"nodes": Said(size.value // local_size.value, size.by), "node_rank": Said(node_rank, rank.by)}
    if local_size.value > 1:
        hints |= {"processes_per_node": local_size, "local_rank": local_rank}
    return Hints(source, **hints)


def leader_worker_set(env: Environment) -> Hints | None:
    """LeaderWorkerSet: the leader and the workers of a group. It gives no port."""
    if "LWS_GROUP_SIZE" not in env:
        return None
    return Hints(
        "leaderworkerset",
        nodes=_number(env, "LWS_GROUP_SIZE"),
        node_rank=_number(env, "LWS_WORKER_INDEX"),
        master_addr=_text(env, "LWS_LEADER_ADDRESS"),
    )


def volcano(env: Environment) -> Hints | None:
    """Volcano's pytorch plugin, where WORLD_SIZE and RANK count pods. VC_<TASK>_HOSTS show that it is Volcano."""
    if "MASTER_ADDR" not in env or not any(re.fullmatch(r"VC_\w+_HOSTS", name) for name in env):
        return None
    return Hints(
        "volcano",
        nodes=_number(env, "WORLD_SIZE"),
        node_rank=_number(env, "RANK"),
        master_addr=_text(env, "MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT"),
    )


def kubernetes_job(env: Environment) -> Hints | None:
    """A pod of an Indexed Job or a JobSet. Kubernetes gives no number of pods, so the manifest must set NNODES."""
    index = _number(env, "JOB_COMPLETION_INDEX")
    if index is None:
        return None
    # The name of pod 0 can be resolved only with its domain, which HOSTNAME lacks unless setHostnameAsFQDN is set.
    hostname = env.get("HOSTNAME", "")
    first = first_pod(hostname if "." in hostname else socket.getfqdn(hostname), index.value)
    return Hints(
        "kubernetes-job",
        nodes=_number(env, "NNODES"),
        node_rank=index,
        master_addr=Said(first, "the pod's host name") if first else None,
    )


def first_pod(hostname: str, index: int) -> str | None:
    """The name of pod 0 from the name of pod `index`: train-3.svc.team → train-0.svc.team; None for other names."""
    match = re.fullmatch(rf"(.+)-{index}(\..*)?", hostname)
    return f"{match.group(1)}-0{match.group(2) or ''}" if match else None


def master_variables(env: Environment) -> Hints | None:
    """MASTER_ADDR and MASTER_PORT, whoever set them. They are used if no launcher gives an address or a port."""
    return Hints("MASTER_ADDR", master_addr=_text(env, "MASTER_ADDR"), master_port=_number(env, "MASTER_PORT"))


# The first one that gives a value decides. A launcher that runs inside another one comes first: mpirun inside a Slurm
# step, Kubeflow on an Indexed Job.
LAUNCHERS: tuple[Callable[[Environment], Hints | None], ...] = (
    kubeflow_trainer,
    pytorch_job,
    skypilot,
    dstack,
    open_mpi,
    hydra,
    slurm,
    leader_worker_set,
    volcano,
    kubernetes_job,
    master_variables,
)


def _text(env: Environment, *names: str) -> Said | None:
    """The first of these variables that is set and not empty."""
    return next((Said(env[name], name) for name in names if env.get(name)), None)


def _number(env: Environment, *names: str, besides: tuple[str, ...] = ()) -> Said | None:
    """The same as a number; None for a word in `besides`. A range is a number if both ends are equal ("4:4")."""
    said = _text(env, *names)
    if said is None or said.value in besides:
        return None
    low, colon, high = said.value.partition(":")
    # Not isdigit(), which takes ² too; and int() takes some thousand digits at most.
    if not re.fullmatch(r"[0-9]{1,9}", low) or (colon and high != low):
        raise UsageError(f"{said.by} is {said.value[:SHOWN]!r}; it must be one whole number: set one, or unset it")
    return Said(int(low), said.by)
