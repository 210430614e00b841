"""`slipway doctor`: what it finds on this machine, what it calls unfit, and two nodes of it on one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import free_port
from forked import LIMIT
from slipway.commands.doctor import doctor
from slipway.launch import checks, network
from slipway.launch.checks import Check
from slipway.launch.link import meet
from slipway.launch.topology import Topology


def found(*words: object) -> tuple[int, dict[str, dict]]:
    """(exit code, what → check) of the command as a person runs it."""
    command = [sys.executable, "-m", "slipway.cli", "doctor", "--json", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {check["what"]: check for check in json.loads(done.stdout)["checks"]}


def test_this_machine_is_described(tmp_path, nemo_model):
    code, table = found("--out", tmp_path / "run", "--model", nemo_model, "--master-port", free_port())
    assert code == 0, table
    assert set(table) == {
        "GPUs", "driver", "/dev/shm", "locked memory", "RDMA", "libibverbs", "master's name", "master's ports",
        "output", "free space", "all-reduce",
    }  # fmt: skip
    assert all(check["cure"] for check in table.values() if check["state"] != "ok")
    assert table["output"]["found"] == f"{tmp_path} is writable" and not list(tmp_path.iterdir())
    assert table["GPUs"]["state"] == ("ok" if Path("/dev/nvidia0").exists() else "warn")


def test_the_table_is_for_people(slipway):
    done = slipway("doctor", "--master-port", free_port())
    header, *rows, last = done.stdout.splitlines()
    assert done.returncode == 0 and header.split() == ["check", "found"]
    assert sum(row.startswith(("ok ", "warn ")) for row in rows) == 9 and any("→ " in row for row in rows)
    assert last.startswith("doctor: fit (9 checks, ")


@pytest.mark.parametrize(
    "words, what, message",
    [
        (["--out", "/proc/run"], "output", "/proc: "),
        (["--gpus", "64"], "GPUs", ", but --gpus is 64"),
        (["--nodes=2", "--node-rank=1", "--master-addr=no.such.host.invalid"], "master's name", "no.such.host.invalid"),
        (["--nproc-per-node=2", "--master-port", "TAKEN"], "master's ports", "cannot be opened on this machine"),
        (["--nodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--timeout=1"], "nodes meet", "does not answer at"),
        (["--nodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "--timeout=1"], "nodes meet", "did not connect"),
    ],
)
def test_what_makes_it_unfit(words, what, message):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = [str(port) if word == "TAKEN" else word for word in words]
        code, table = found(*words, *([] if "--master-port" in words else ["--master-port", free_port()]))
    assert code == 78 and table[what]["state"] == "unfit", table
    assert message in table[what]["found"] and table[what]["cure"]


def test_too_little_space_is_unfit(tmp_path, nemo_model):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], check=True)
    try:
        code, table = found("--out", tmp_path, "--model", nemo_model, "--mode", "sft", "--master-port", free_port())
        heads = checks.free_space(tmp_path, None, "heads", keep=2)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert code == 78 and table["free space"]["state"] == heads.state == "unfit", table
    assert "102 kB; 3 checkpoints (sft) need up to" in table["free space"]["found"]


def test_a_small_shared_memory_counts_only_for_several_processes(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path], check=True)
    try:
        one, many = (checks.shared_memory(count, str(tmp_path)) for count in (1, 8))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert one.state == "ok" and many.state in ("warn", "unfit") and "--shm-size" in many.cure


def test_drivers_and_rdma_are_read_from_the_kernels_files(tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    old = checks.driver(version)
    assert old.state == "unfit" and old.found == "535.104.05, torch is built for CUDA 13.0"
    assert "driver 580 or newer" in old.cure and "cuda-compat-13-0" in old.cure
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert checks.driver(version).state == "ok"
    state = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("1: DOWN\n")
    assert checks.rdma(2, tmp_path / "infiniband").found == "1 devices, none active"
    state.write_text("4: ACTIVE\n")
    assert checks.rdma(2, tmp_path / "infiniband").found == "1 of 1 devices active: mlx5_0"


def test_a_gpu_that_nothing_can_use_is_unfit(tmp_path, monkeypatch):
    """An update of the driver without a restart, and a GPU that hangs: before, the machine was fit for the CPU."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(checks, "NVIDIA_SMI", 0.5)
    monkeypatch.setattr(checks, "_gpu_files", lambda: [Path("/dev/nvidia0")])
    for script, said in (("echo 'Failed to initialize NVML: Driver mismatch'; exit 18", "Failed to init"),
                         ("exec sleep 9", "no answer within 0.5 s"), ("exit 3", "exit code 3")):  # fmt: skip
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        found = checks.gpus(1, env={})
        assert found.state == "unfit" and found.found.startswith(f"nvidia-smi: {said}") and found.cure
    smi.write_text("no program\n")
    assert checks.gpus(1, env={}).state == "unfit"
    monkeypatch.setattr(checks, "_gpu_files", list)
    assert checks.gpus(1, env={}).state == "warn" and "none; nvidia-smi: " in checks.gpus(1, env={}).found


def test_gpus_are_those_that_cuda_leaves(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 1 2 3 4; do echo 'NVIDIA H100, 81559 MiB'; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks.gpus(4, env={}).found == "4 × NVIDIA H100, 81559 MiB"
    few, none = (checks.gpus(4, env={"CUDA_VISIBLE_DEVICES": visible}) for visible in ("0,2", "-1"))
    assert few.state == "unfit" and "CUDA_VISIBLE_DEVICES=0,2 leaves 2, but 4 processes" in few.found
    assert none.state == "warn" and "CUDA_VISIBLE_DEVICES=-1 leaves 0" in none.found


def test_what_is_not_there_or_not_for_this_user_is_a_row(tmp_path, monkeypatch):
    missing = tmp_path / "missing"
    assert checks.shared_memory(8, str(missing)).found == "none (No such file or directory) for 8 processes"
    assert checks.driver(missing).state == "warn"

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    state = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert checks.rdma(2, tmp_path / "infiniband").found == "1 devices, none active"
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert checks.rdma(1, tmp_path / "infiniband").state == "ok"


def test_a_file_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "run").write_text("x")
    found = checks.output_folder(tmp_path / "run")
    assert found.state == "unfit" and found.found == f"{tmp_path}/run is no folder" and found.cure
    assert checks.output_folder(tmp_path / "new").state == "ok"


def _library(folder: Path, name: str, code: str) -> Path:
    """A library compiled from C."""
    (folder / f"{name}.c").write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / name, folder / f"{name}.c"], check=True)
    return folder / name


def test_a_newer_library_than_the_driver_is_cuda_compat(tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Release Build\n")
    _library(tmp_path, "libcuda.so.1", "int cuDriverGetVersion(int *v) { *v = 13000; return 0; }")
    ask = f"from slipway.launch import checks; from pathlib import Path; print(checks.driver(Path({str(version)!r})))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True)
    assert "state='ok'" in done.stdout and "cuda-compat, for CUDA 13.0, is in use" in done.stdout, done


def test_the_library_for_infiniband_is_opened_and_its_devices_counted(tmp_path):
    sees = "void *ibv_get_device_list(int *n) { *n = 1; return n; } void ibv_free_device_list(void *l) {}"
    library = str(_library(tmp_path, "libibverbs.so.1", sees))
    kernel = tmp_path / "infiniband"
    kernel.mkdir()
    assert checks.verbs(1, kernel, library).found == "sees 1 devices"
    for name in ("mlx5_0", "mlx5_1"):
        (kernel / name).mkdir()
    found = checks.verbs(2, kernel, library)
    assert found.state == "warn" and found.found == "sees 1 devices, the kernel has 2" and "providers" in found.cure
    (kernel / "mlx5_1").rmdir()
    found = checks.verbs(2, kernel, library)
    assert found.state == "warn" and found.found == "sees 1 devices, but 0 of 1 can be opened"
    missing = checks.verbs(2, kernel, str(tmp_path / "no.so"))
    assert missing.state == "warn" and "cannot open" in missing.found and "libibverbs1" in missing.cure
    (kernel / "mlx5_0").rmdir()
    assert checks.verbs(1, kernel, str(tmp_path / "no.so")).state == "ok"


# Lines in the words of NCCL 2.28, which is in the image.
@pytest.mark.parametrize(
    "log, transport, tcp",
    [
        ("h:1:2 [0] NCCL INFO Using network Socket\n", "network Socket", True),
        (
            "h:1:2 [0] NCCL INFO Using network IB\nh:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n",
            "network IB, inside a node P2P",
            False,
        ),
        ("h:1:2 [0] NCCL INFO Using network AWS Libfabric\n", "network AWS Libfabric", False),
        ("h:1:2 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct\n", "inside a node SHM", False),
        ("nothing of it\n", "", False),
    ],
)
def test_what_nccl_chose_is_read_from_its_log(log, transport, tcp):
    assert network.chosen_transport(log) == transport and network.is_tcp(transport) is tcp


def test_two_nodes_meet_share_a_folder_and_add_up(tmp_path):
    words = ["--nodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nproc-per-node=1"]
    words += [f"--out={tmp_path}", f"--timeout={LIMIT}"]
    slipway = [sys.executable, "-m", "slipway.cli", "doctor", "--json", *words]
    processes = [
        subprocess.Popen([*slipway, f"--node-rank={rank}"], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for process in processes:
        table = {check["what"]: check for check in json.loads(process.communicate(timeout=LIMIT)[0])["checks"]}
        assert process.returncode == 0 and table["shared output"]["state"] == "ok", table
        assert table["all-reduce"]["found"].endswith("GB/s") and "gloo, 2 processes" in table["all-reduce"]["found"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_unfit(tmp_path):
    port = free_port()

    def check(rank: int) -> Check:
        """As node `rank`, which looks for the other node's file in a folder of its own for half a second."""
        topology = Topology(2, 1, rank, "127.0.0.1", port, "flags")
        folder = tmp_path / str(rank)
        folder.mkdir()
        link = meet(topology, {}, LIMIT)
        found = checks.shared_folder(folder, topology, link, 0.5)
        link.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        for rank, found in enumerate(pool.map(check, (0, 1))):
            assert found.state == "unfit" and f"the file that node {1 - rank} wrote" in found.found, found
    assert not list(tmp_path.glob("*/*"))


def test_it_is_a_function_as_well(tmp_path):
    diagnosis = doctor(out=str(tmp_path), master_port=free_port())
    assert diagnosis.exit_code == 0 and not diagnosis.unfit
