"""Ranks, GPUs that are counted, and the variables that few clusters set."""

from __future__ import annotations

import os
import socket

import pytest
from slipway.errors import UsageError
from slipway.launch import launchers
from slipway.launch.launchers import Said
from slipway.launch.placement import Placement
from slipway.launch.topology import SHOW_OTHERS, Topology, count_gpus, find_topology, gpus_here


def topology(env: dict | None = None, nodes=None, rank=None, addr=None, port=None, per_node=None):
    return find_topology(Placement(nodes, rank, addr, port, per_node), env or {})


@pytest.mark.parametrize(
    "node, local, rank, writes", [(0, None, 0, True), (3, None, 24, True), (3, 0, 24, True), (3, 5, 29, False)]
)
def test_ranks(node, local, rank, writes):
    found = Topology(4, 8, node, "a", 1, "flags", local)
    assert (found.world_size, found.rank, found.writes) == (32, rank, writes)


def test_gpus_are_counted_by_their_device_files(monkeypatch):
    names = ["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia", "null", "7", "sda1", "amdgpu3"]
    monkeypatch.setattr(os, "listdir", lambda path: names if path == "/dev" else [])
    assert gpus_here({}) == count_gpus({}) == 3
    for visible, count in (("", 0), ("2", 1), ("0,1", 2), (" , ", 0), ("GPU-a,GPU-b,GPU-c", 3),
                           ("-1", 0), ("NoDevFiles", 0), ("0, 1,-1,2", 2), ("MIG-a/1/0", 1)):  # fmt: skip
        env = {"CUDA_VISIBLE_DEVICES": visible}
        assert gpus_here(env) == count and count_gpus(env) == max(1, count)


def test_one_process_for_each_gpu_where_nobody_says_how_many():
    env = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert topology(env).processes_per_node == 3
    assert topology(env, per_node=2).processes_per_node == 2
    node = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    assert topology(env | node).processes_per_node == 8


def test_one_node_may_be_numbered_but_not_otherwise():
    assert topology(nodes=1, rank=0, addr="a", port=7).master_addr == "a"
    with pytest.raises(UsageError, match="--node-rank is 1, but there is one node"):
        topology(nodes=1, rank=1)
    assert topology({"JOB_COMPLETION_INDEX": "3", "HOSTNAME": "x.y"}, nodes=1).node_rank == 0
    assert topology({"MASTER_PORT": "7"}).master_port == 7, "two jobs of one machine need two ports"


@pytest.mark.parametrize("name", SHOW_OTHERS)
def test_a_job_of_one_is_no_reason_to_refuse_and_one_of_several_never_trains_alone(name):
    assert topology({name: "1"}).nodes == topology({name: ""}).nodes == 1
    with pytest.raises(UsageError, match=f"{name} is 2"):
        topology({name: "2"})
    assert topology({name: "2"}, nodes=1).nodes == 1
    others = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a"}
    assert topology(others | {name: "8"}).node_rank == 1, "a launcher that says all is believed"


@pytest.mark.parametrize("address", ["a:29500", "10.0.0.1:29500", "a:", "[fd00::1]:29500", "[fd00::1]", "fe80::1%eth0"])
def test_an_address_of_a_variable_has_no_port_either(address):
    with pytest.raises(UsageError, match="without a port"):
        topology({"MASTER_ADDR": address}, nodes=2, rank=0)
    assert topology({"MASTER_ADDR": "fd00::1"}, nodes=2, rank=0).master_addr == "fd00::1"


def test_the_shell_of_salloc_is_no_step_that_trains():
    """As Slurm 22.05 sets them for `salloc -N2` where LaunchParameters has use_interactive_step."""
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1"}
    shell |= {"SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2"}
    with pytest.raises(UsageError, match="SLURM_JOB_NUM_NODES is 2, but this command is not a step of that job"):
        topology(shell)
    assert topology(shell, nodes=1).nodes == 1
    assert topology(shell | {"SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1"}).nodes == 1
    assert topology(shell | {"SLURM_STEP_ID": "0"}).source == "slurm", "a step on a part of the allocation is a choice"


@pytest.mark.parametrize("names", ["a[3-1],b", "a[1-2,4-3]"])
def test_a_range_that_ends_before_it_begins_is_no_range(names):
    with pytest.raises(UsageError, match="not a list of nodes"):
        launchers.expand(names)


@pytest.mark.parametrize("place", [None, "", "4"])
def test_a_task_without_its_place_is_refused(place):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": place or ""}
    if place is None:
        del env["SLURM_LOCALID"]
    with pytest.raises(UsageError, match=r"SLURM_LOCALID is .*, but SLURM_STEP_TASKS_PER_NODE is 4"):
        topology(env)


def test_what_is_missing_or_empty_is_unknown():
    env = {"EMPTY": "", "A": "1", "B": "2", "RANGE": "4:4", "AUTO": "auto"}
    assert launchers._text(env, "NONE", "EMPTY", "B", "A") == Said("2", "B") and launchers._text(env, "EMPTY") is None
    assert launchers._number(env, "NONE", "A") == Said(1, "A") and launchers._number(env, "NONE") is None
    assert launchers._number(env, "RANGE") == Said(4, "RANGE")
    assert launchers._number(env, "AUTO", besides=("auto",)) is None
    for wrong in ("4:8", "4:", "-1", "x", "1.5", ":4"):
        with pytest.raises(UsageError, match="N is "):
            launchers._number({"N": wrong}, "N")


def test_skypilot_without_addresses_leaves_the_master_open():
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    assert launchers.skypilot(env).master_addr is None and launchers.skypilot({}) is None
    assert launchers.skypilot(env | {"SKYPILOT_NODE_IPS": "a\nb"}).master_addr == Said("a", "SKYPILOT_NODE_IPS")


SLURM = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize("tasks, count", [("1", 1), ("1(x2)", 1), ("4(x2)", 4), ("16", 16), (None, 1)])
def test_slurms_tasks_of_a_node(tasks, count):
    env = SLURM if tasks is None else SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}
    found = launchers.slurm(env)
    assert (found.nodes.value, found.node_rank.value, found.master_addr.value) == (2, 1, "a1")
    assert (found.processes_per_node and found.processes_per_node.value) == (count if count > 1 else None)
    assert (found.local_rank and found.local_rank.value) == (1 if count > 1 else None)


@pytest.mark.parametrize("tasks", ["2,1", "2(x2),1", "x", "", "2(2)"])
def test_slurms_tasks_that_differ(tasks):
    with pytest.raises(UsageError, match="every node needs the same number of tasks"):
        launchers.slurm(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks})


def mpi(size: int, rank: int, local_size: int, local_rank: int):
    names = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")
    return launchers.hydra(dict(zip(names, map(str, (size, rank, local_size, local_rank)), strict=True)))


def test_mpis_processes_of_a_node():
    found = mpi(16, 11, 8, 3)
    assert (found.nodes.value, found.node_rank.value) == (2, 1)
    assert (found.processes_per_node.value, found.local_rank.value) == (8, 3)
    found = mpi(4, 2, 1, 0)
    assert (found.nodes.value, found.node_rank.value, found.processes_per_node, found.local_rank) == (4, 2, None, None)
    assert launchers.hydra({"PMI_SIZE": "2", "PMI_RANK": "0"}) is None


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((16, 11, 0, 3), "MPI_LOCALNRANKS is '0'"), ((0, 0, 1, 0), "PMI_SIZE is '0'"),
        ((0, 0, 0, 0), "MPI_LOCALNRANKS is '0'"), ((15, 11, 8, 3), "ranks of a node in a row"),
        ((16, 11, 8, 4), "ranks of a node in a row"),
    ],
)  # fmt: skip
def test_mpis_numbers_that_cannot_be(numbers, message):
    with pytest.raises(UsageError, match=message):
        mpi(*numbers)


def test_volcano_is_known_by_its_hosts():
    env = {"MASTER_ADDR": "a", "MASTER_PORT": "7", "WORLD_SIZE": "3", "RANK": "1"}
    assert launchers.volcano(env) is None and launchers.volcano({"VC_WORKER_HOSTS": "b"}) is None
    for other in ("VC_HOSTS", "XVC_WORKER_HOSTS", "VC_WORKER_HOSTSX"):
        assert launchers.volcano(env | {other: "b"}) is None
    found = launchers.volcano(env | {"VC_WORKER_HOSTS": "b"})
    assert (found.nodes.value, found.node_rank.value, found.master_addr.value, found.master_port.value) == (
        3,
        1,
        "a",
        7,
    )


def test_a_pod_whose_name_is_short_is_asked_for_the_rest(monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda name: f"{name}.svc.team")
    env = {"JOB_COMPLETION_INDEX": "2", "NNODES": "4"}
    assert launchers.kubernetes_job(env | {"HOSTNAME": "train-2"}).master_addr.value == "train-0.svc.team"
    assert launchers.kubernetes_job(env | {"HOSTNAME": "train-2.other"}).master_addr.value == "train-0.other"
    assert launchers.kubernetes_job(env | {"HOSTNAME": "laptop"}).master_addr is None


def test_the_master_variables_complete_the_others():
    found = launchers.master_variables({"MASTER_ADDR": "a", "MASTER_PORT": "7"})
    assert (found.source, found.master_addr, found.master_port) == (
        "MASTER_ADDR", Said("a", "MASTER_ADDR"), Said(7, "MASTER_PORT")
    )  # fmt: skip
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "m"}
    assert launchers.pytorch_job(pod) is None and launchers.kubeflow_trainer(pod).master_addr.value == "m"
    assert launchers.kubeflow_trainer({"PET_MASTER_ADDR": "m"}) is None
