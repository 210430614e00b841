"""`slipway doctor`: what it finds on this machine, what it calls unfit, and two nodes of it on one machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port
from slipway.commands.doctor import doctor
from slipway.launch import checks


def found(*words: object) -> tuple[int, dict[str, dict]]:
    """(exit code, what → check) of the command as a person runs it."""
    command = [sys.executable, "-m", "slipway.cli", "doctor", "--json", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {check["what"]: check for check in json.loads(done.stdout)["checks"]}


def test_this_machine_is_described(tmp_path, nemo_model):
    code, table = found("--out", tmp_path / "run", "--model", nemo_model, "--master-port", free_port())
    assert code == 0, table
    assert set(table) == {
        "GPUs", "driver", "/dev/shm", "locked memory", "RDMA", "master's name", "master's ports", "output",
        "free space", "all-reduce",
    }  # fmt: skip
    assert all(check["cure"] for check in table.values() if check["state"] != "ok")
    assert table["output"]["found"] == f"{tmp_path} is writable" and not list(tmp_path.iterdir())
    assert table["GPUs"]["state"] == ("ok" if Path("/dev/nvidia0").exists() else "warn")


def test_the_table_is_for_people(slipway):
    done = slipway("doctor", "--master-port", free_port())
    header, *rows, last = done.stdout.splitlines()
    assert done.returncode == 0 and header.split() == ["check", "found"]
    assert sum(row.startswith(("ok ", "warn ")) for row in rows) == 8 and any("→ " in row for row in rows)
    assert last.startswith("doctor: fit (8 checks, ")


@pytest.mark.parametrize(
    "words, what, message",
    [
        (["--out", "/proc/run"], "output", "/proc: "),
        (["--gpus", "64"], "GPUs", ", but --gpus is 64"),
        (["--nodes=2", "--node-rank=1", "--master-addr=no.such.host.invalid"], "master's name", "no.such.host.invalid"),
        (["--nproc-per-node=2", "--master-port", "TAKEN"], "master's ports", "cannot be opened on this machine"),
        (["--nodes=2", "--node-rank=1", "--master-addr=127.0.0.1", "--timeout=1"], "nodes meet", "does not answer at"),
        (["--nodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "--timeout=1"], "nodes meet", "node 1 did not connect"),
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
    assert old.state == "unfit" and old.found == "535.104.05, torch is built for CUDA 13.0" and "580" in old.cure
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert checks.driver(version).state == "ok"
    state = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("1: DOWN\n")
    assert checks.rdma(2, tmp_path / "infiniband").found == "1 devices, none active"
    state.write_text("4: ACTIVE\n")
    assert checks.rdma(2, tmp_path / "infiniband").found == "1 of 1 devices active: mlx5_0"


def pair(*outs: Path, timeout: int = 30) -> list[tuple[int, dict[str, dict]]]:
    """The command as two nodes on this machine, each with its own --out."""
    port = free_port()
    words = [
        "--nodes=2",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        "--nproc-per-node=1",
        f"--timeout={timeout}",
    ]
    slipway = [sys.executable, "-m", "slipway.cli", "doctor", "--json", *words]
    processes = [
        subprocess.Popen([*slipway, f"--node-rank={rank}", f"--out={out}"], stdout=subprocess.PIPE, text=True)
        for rank, out in enumerate(outs)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    tables = [{check["what"]: check for check in json.loads(output)["checks"]} for output in outputs]
    return [(process.returncode, table) for process, table in zip(processes, tables, strict=True)]


def test_two_nodes_meet_share_a_folder_and_add_up(tmp_path):
    for code, table in pair(tmp_path, tmp_path):
        assert code == 0 and table["shared output"]["state"] == "ok", table
        assert table["all-reduce"]["found"].endswith("GB/s") and "gloo, 2 processes" in table["all-reduce"]["found"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_unfit(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for rank, (code, table) in enumerate(pair(tmp_path / "a", tmp_path / "b", timeout=10)):
        assert code == 78 and f"the file that node {1 - rank} wrote" in table["shared output"]["found"], table


def test_it_is_a_function_as_well(tmp_path):
    diagnosis = doctor(out=str(tmp_path), master_port=free_port())
    assert diagnosis.exit_code == 0 and not diagnosis.unfit
