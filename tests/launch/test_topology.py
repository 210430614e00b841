"""Who says how many nodes there are, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slipway.errors import UsageError
from slipway.launch import torchrun
from slipway.launch.launchers import expand, first_pod
from slipway.launch.placement import Placement
from slipway.launch.topology import find_topology


def topology(env: dict | None = None, nodes=None, rank=None, addr=None, port=None, per_node=2):
    return find_topology(Placement(nodes, rank, addr, port, per_node), env or {})


def test_alone_is_one_node():
    found = topology()
    assert (found.nodes, found.node_rank, found.world_size, found.master_addr) == (1, 0, 2, "127.0.0.1")
    assert (
        str(found)
        == "topology: 1 node × 2, this is node 0, master 127.0.0.1:29500, (single machine, no launcher found)"
    )


def test_flags_are_taken_as_given():
    found = topology(nodes=8, rank=3, addr="node0", port=1234)
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (8, 3, "node0", 1234)
    assert found.world_size == 16 and found.source == "flags"


# What each launcher sets, in a job of several nodes, on a node that is not the first.
TRAINER = {
    "PET_NNODES": "8", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "run-node-0-0.run",
    "PET_MASTER_PORT": "29500", "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "run-node-0-3",
}  # fmt: skip
PYTORCH_JOB = {
    "PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8", "MASTER_ADDR": "run-master-0",
    "MASTER_PORT": "23456", "RANK": "2", "WORLD_SIZE": "32", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
VOLCANO = {
    "MASTER_ADDR": "job-master-0.job", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "3",
    "VC_MASTER_HOSTS": "job-master-0.job", "VC_MASTER_NUM": "1",
    "VC_WORKER_HOSTS": "job-worker-0.job,job-worker-1.job", "VC_WORKER_NUM": "2",
}  # fmt: skip
LWS = {"LWS_LEADER_ADDRESS": "run-0.run.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "1"}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}  # fmt: skip
DSTACK = {
    "DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "10.0.0.7", "DSTACK_GPUS_PER_NODE": "4",
    "DSTACK_GPUS_NUM": "8", "DSTACK_NODES_IPS": "10.0.0.7\n10.0.0.8",
}  # fmt: skip
INDEXED_JOB = {"JOB_COMPLETION_INDEX": "3", "HOSTNAME": "train-3.train.team.svc.cluster.local", "NNODES": "8"}
# A pod of a JobSet with one replicated job "workers", in its headless Service.
JOBSET = {
    "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "run-workers-0-1.run.team.svc", "NNODES": "2",
    "JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "workers",
}  # fmt: skip
# Recorded from Open MPI 4.1.4: second process of `mpirun -np 2` on one machine.
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_MCA_orte_num_nodes": "1", "PMIX_RANK": "1", "PMIX_NAMESPACE": "389152769", "PMIX_HOSTNAME": "vm",
}  # fmt: skip
# As on the third of four nodes, one process on each, with `-x MASTER_ADDR`.
OPEN_MPI_NODES = OPEN_MPI | {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "node1",
}  # fmt: skip
HYDRA = {
    "PMI_SIZE": "16", "PMI_RANK": "11", "MPI_LOCALNRANKS": "8", "MPI_LOCALRANKID": "3", "PMI_FD": "9",
    "MASTER_ADDR": "node1",
}  # fmt: skip
# Recorded from Slurm 22.05.8: `srun -N2 --ntasks-per-node=1 --gres=gpu:2` on two slurmd of one machine, second task.
SLURM = {
    "CUDA_VISIBLE_DEVICES": "0,1", "SLURMD_NODENAME": "gpu-09", "SLURM_CPUS_ON_NODE": "1", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_GTIDS": "1", "SLURM_JOB_CPUS_PER_NODE": "1(x2)", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "gpu-[08-09]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
    "SLURM_NODEID": "1", "SLURM_NODELIST": "gpu-[08-09]", "SLURM_NPROCS": "2", "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "1", "SLURM_STEP_GPUS": "0,1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[08-09]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_TOPOLOGY_ADDR": "gpu-09",
}  # fmt: skip
# What the last task of `--ntasks-per-node=2` had otherwise, and what the batch script of `sbatch -N2` has no more.
SLURM_TASK_PER_GPU = SLURM | {
    "SLURM_CPUS_ON_NODE": "2", "SLURM_GTIDS": "2,3", "SLURM_JOB_CPUS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1",
    "SLURM_NPROCS": "4", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
SLURM_BATCH = {name: value for name, value in SLURM.items() if "_STEP_" not in name and "NTASKS" not in name}
ENROOT_HOOK = SLURM | {"MASTER_ADDR": "gpu-08", "MASTER_PORT": "29501", "WORLD_SIZE": "2"}

# Under `mpirun` of Open MPI 4.1.4 in a batch script of two nodes: a step of the second alone is that of its daemon.
OF_A_DAEMON = SLURM | {
    "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu-09", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "MASTER_ADDR": "node1",
}  # fmt: skip


@pytest.mark.parametrize(
    "env, line",
    [
        (TRAINER, "8 nodes × 8, this is node 3, master run-node-0-0.run:29500, from kubeflow-trainer"),
        (PYTORCH_JOB, "4 nodes × 8, this is node 2, master run-master-0:23456, from pytorchjob"),
        (VOLCANO, "3 nodes × 1, this is node 1, master job-master-0.job:23456, from volcano"),
        (LWS, "4 nodes × 1, this is node 1, master run-0.run.default:29500, from leaderworkerset"),
        (SKYPILOT, "2 nodes × 8, this is node 1, master 10.0.0.4:29500, from skypilot"),
        (DSTACK, "2 nodes × 4, this is node 1, master 10.0.0.7:29500, from dstack"),
        (SLURM, "2 nodes × 2, this is node 1, master gpu-08:29500, from slurm"),
        (ENROOT_HOOK, "2 nodes × 2, this is node 1, master gpu-08:29501, from slurm"),
        (SLURM_TASK_PER_GPU, "2 nodes × 2, this is node 1, process 1, master gpu-08:29500, from slurm"),
        (INDEXED_JOB, "8 nodes × 1, this is node 3, master train-0.train.team.svc.cluster.local:29500, from "
                      "kubernetes-job"),
        (JOBSET, "2 nodes × 1, this is node 1, master run-workers-0-0.run.team.svc:29500, from kubernetes-job"),
        (OPEN_MPI, "1 node × 2, this is node 0, process 1, master 127.0.0.1:29500, from open-mpi"),
        (OPEN_MPI_NODES, "4 nodes × 1, this is node 2, master node1:29500, from open-mpi and MASTER_ADDR"),
        (SLURM | OPEN_MPI_NODES | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
         "2 nodes × 2, this is node 1, master gpu-08:29500, from open-mpi and slurm"),
        (OF_A_DAEMON, "2 nodes × 2, this is node 1, master node1:29500, from open-mpi and MASTER_ADDR"),
        (HYDRA, "2 nodes × 8, this is node 1, process 3, master node1:29500, from mpich and MASTER_ADDR"),
        (TRAINER | {"PET_NPROC_PER_NODE": "auto", "CUDA_VISIBLE_DEVICES": "0,1,2"},
         "8 nodes × 3, this is node 3, master run-node-0-0.run:29500, from kubeflow-trainer"),
        (PYTORCH_JOB | {"PET_NNODES": "4:4"},
         "4 nodes × 8, this is node 2, master run-master-0:23456, from pytorchjob"),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
         "1 node × 8, this is node 0, master 127.0.0.1:29500, from skypilot"),
    ],
)  # fmt: skip
def test_each_launcher_is_understood(env, line):
    assert str(topology(env, per_node=None)) == f"topology: {line}"


def test_only_a_slurm_task_per_gpu_runs_the_worker_itself():
    assert topology(SLURM).local_rank is None and topology(SLURM_TASK_PER_GPU).local_rank == 1


def test_a_flag_completes_what_a_launcher_leaves_open():
    pod = {key: value for key, value in INDEXED_JOB.items() if key != "NNODES"}
    found = topology(pod, nodes=8)
    assert (found.node_rank, found.source) == (3, "flags and kubernetes-job")
    assert topology(pod, nodes=1).node_rank == 0, "an array of jobs of one node each"
    assert topology(LWS, addr="leader-ib", port=7).master_addr == "leader-ib", "an address has many names: flags win"
    assert topology(SLURM, per_node=1).processes_per_node == 1, "fewer processes than GPUs are a choice"
    assert topology(SLURM_BATCH, nodes=1).nodes == 1


@pytest.mark.parametrize(
    "names, hosts",
    [
        ("gpu-08", ["gpu-08"]),
        ("gpu-[08-10,12]", ["gpu-08", "gpu-09", "gpu-10", "gpu-12"]),
        ("a[1-2]-ib,b7,c[098-101]", ["a1-ib", "a2-ib", "b7", "c098", "c099", "c100", "c101"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("login,gpu[3]", ["login", "gpu3"]),
    ],
)
def test_slurms_node_lists_are_expanded(names, hosts):
    assert expand(names) == hosts


@pytest.mark.parametrize(
    "name, index, first",
    [
        ("train-3", 3, "train-0"),
        ("set-workers-0-12.set.team.svc", 12, "set-workers-0-0.set.team.svc"),
        ("train-13", 3, None),
        ("laptop", 0, None),
    ],
)
def test_the_first_pod_is_named_after_this_one(name, index, first):
    assert first_pod(name, index) == first


@pytest.mark.parametrize(
    "env, flags, message",
    [
        ({}, {"nodes": 2, "addr": "a"}, "2 nodes need --node-rank"),
        ({}, {"nodes": 2, "rank": 0}, "2 nodes need --master-addr"),
        ({}, {"nodes": 2, "rank": 2, "addr": "a"}, "--node-rank is 2; with 2 nodes it must be 0 to 1"),
        ({}, {"rank": 1}, "--node-rank is 1, but there is one node, number 0: give --nodes too, or leave it out"),
        (SLURM | {"SLURM_NODEID": "5"}, {}, "SLURM_NODEID is 5; with 2 nodes it must be 0 to 1"),
        (SLURM | OPEN_MPI, {}, "OMPI_COMM_WORLD_SIZE is 1 and SLURM_STEP_NUM_NODES is 2, but both are the number of"),
        (TRAINER, {"nodes": 2}, "--nodes is 2 and PET_NNODES is 8, but both are the number of nodes; remove one"),
        (TRAINER, {"per_node": 4}, "--nproc-per-node is 4 and PET_NPROC_PER_NODE is 8"),
        (SLURM, {"rank": 0}, "--node-rank is 0 and SLURM_NODEID is 1, but both are the number of this node"),
        (TRAINER | {"JOB_COMPLETION_INDEX": "5"}, {"per_node": None},
         "PET_NODE_RANK is 3 and JOB_COMPLETION_INDEX is 5"),
        (SLURM | SKYPILOT | {"SKYPILOT_NUM_NODES": "4"}, {}, "SKYPILOT_NUM_NODES is 4 and SLURM_STEP_NUM_NODES is 2"),
        (PYTORCH_JOB | {"PET_NNODES": "1:4"}, {}, "PET_NNODES is '1:4'; it must be one whole number"),
        (TRAINER | {"PET_NPROC_PER_NODE": "many"}, {}, "PET_NPROC_PER_NODE is 'many'"),
        ({"PET_NNODES": "2"}, {}, "2 nodes need --node-rank"),
        ({"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}, {}, "2 nodes need --master-addr"),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, "give --nodes, or set NNODES"),
        ({"JOB_COMPLETION_INDEX": "1", "NNODES": "2", "HOSTNAME": "a.b"}, {}, "2 nodes need --master-addr"),
        ({"WORLD_SIZE": "8", "RANK": "3"}, {}, "WORLD_SIZE is 8, but it can be a number of processes or of nodes"),
        ({"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, {}, "WORLD_SIZE is 8"),
        (SLURM_BATCH, {}, "SLURM_JOB_NUM_NODES is 2, but this command is not a step of that job; start it"),
        (SLURM_TASK_PER_GPU | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, {}, "every node needs the same number of tasks"),
        (SLURM_TASK_PER_GPU | {"SLURM_GPUS_ON_NODE": "8"}, {},
         "SLURM_STEP_TASKS_PER_NODE is 2, but SLURM_GPUS_ON_NODE is 8"),
        (OPEN_MPI_NODES | {"MASTER_ADDR": ""}, {}, "4 nodes need --master-addr"),
        ({"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "1"}, {}, "MV2_COMM_WORLD_SIZE is 4, but where its"),
        ({"JSM_NAMESPACE_SIZE": "4"}, {}, "JSM_NAMESPACE_SIZE is 4, but where its processes are is unknown"),
        ({"AWS_BATCH_JOB_NUM_NODES": "2"}, {}, "AWS_BATCH_JOB_NUM_NODES is 2, but which of them this is, is unknown"),
        (HYDRA | {"PMI_RANK": "12"}, {"per_node": None}, "with the ranks of a node in a row"),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, {},
         "run `slipway` once per node, without torchrun"),
        (SLURM_TASK_PER_GPU | {"CUDA_VISIBLE_DEVICES": "1"}, {}, "not --gpus-per-task"),
    ],
)  # fmt: skip
def test_what_is_missing_or_disagrees_is_said(env, flags, message):
    with pytest.raises(UsageError) as error:
        topology(env, **flags)
    assert message in str(error.value)


def test_one_process_runs_in_place_with_the_environment_that_workers_get(tmp_path):
    code = """
import json, os, pathlib, sys
from slipway import untrusted
from slipway.launch import torchrun
from slipway.signals import StopRequests
from slipway.launch.placement import Placement
from slipway.launch.topology import find_topology
here = os.getpid()
untrusted.note("recipe.json")
with StopRequests(pathlib.Path(sys.argv[1]), 1.0) as stop:
    show = lambda: print(json.dumps({**os.environ, "same": os.getpid() == here, "reading": untrusted.reading}))
    torchrun.run_here(find_topology(Placement(nodes=1, nproc_per_node=1), {}), show, stop)
"""
    env = {"PYTHONPATH": str(Path(torchrun.__file__).parents[2]), "NCCL_NVLS_ENABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "stop"], env=env, capture_output=True, check=True)
    seen = json.loads(done.stdout)
    wanted = torchrun.ENVIRONMENT_DEFAULTS | {"NCCL_NVLS_ENABLE": "1", "WORLD_SIZE": "1", "RANK": "0", "same": True}
    assert {name: seen.get(name) for name in wanted} == wanted
    assert seen["reading"] == "", "an error of the worker would name the last file that the command had read"
    facts = {"CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FWD_LAYERNORM_SM_MARGIN", "TORCH_NCCL_AVOID_RECORD_STREAMS"}
    assert facts <= torchrun.ENVIRONMENT_DEFAULTS.keys()


def test_the_command_names_every_part_of_the_topology():
    words = torchrun.command(topology(nodes=2, rank=1, addr="node0", port=7), ["recipe.json"], Path("logs"))
    for word in ("--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--master-addr=node0", "--master-port=7"):
        assert word in words


def test_torchrun_has_its_flags_alone_whatever_the_operator_sets(tmp_path, monkeypatch):
    """PyTorchJob's elasticPolicy sets PET_MAX_RESTARTS and a rendezvous: torchrun would start lost workers again."""
    for name, value in {"PET_MAX_RESTARTS": "3", "PET_RDZV_BACKEND": "c10d", "PET_STANDALONE": "1"}.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-c", "import os; print([name for name in os.environ if name[:4] == 'PET_'])"]
    assert torchrun._start(topology(nodes=2, rank=0, addr="node0"), words, tmp_path).wait(60) == 0
    assert (tmp_path / "torchrun.log").read_text().strip() == "[]"
