"""Several commands as the nodes of one run, on this machine: they agree, or stop; a rank that dies ends them all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slipway
from conftest import free_port
from forked import LIMIT, POLL
from slipway.checkpoint.torch_dist import Reader
from slipway.commands.preprocess import preprocess
from slipway.training.run_folder import RunFolder

ENOUGH_STEPS = 10**6  # never reached: the run is ended before


@pytest.fixture(scope="module")
def data(nemo_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    preprocess(str(Path(slipway.__file__).parent), str(path), tokenizer=str(nemo_model), seq_length=64)
    return path


@pytest.fixture
def port() -> int:
    return free_port()


def command(model: Path, data: Path, out: Path, port: int, /, **changes: object) -> list[str]:
    chosen = {
        "model": model, "data": data, "out": out, "steps": 3, "seq_length": 64, "global_batch_size": 4, "lr": 1e-3,
        "warmup_steps": 1, "constant_steps": 1, "nproc_per_node": 1, "master_port": port, "rendezvous_timeout": LIMIT,
    }  # fmt: skip
    words = [f"--{key.replace('_', '-')}={value}" for key, value in (chosen | changes).items()]
    return [sys.executable, "-m", "slipway.cli", "train", *words]


def node(rank: int) -> dict[str, object]:
    return {"nodes": 2, "node_rank": rank, "master_addr": "127.0.0.1"}


def run_all(commands: list[list[str]], envs: list[dict] | None = None, meanwhile: Callable[[], None] | None = None):
    """[(exit code, output)] of commands that run at the same time."""
    processes = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env)
        for words, env in zip(commands, envs or [{}] * len(commands), strict=True)
    ]
    found: list[tuple[int, str]] = [(0, "")] * len(processes)

    def wait(number: int) -> None:
        output, _ = processes[number].communicate(timeout=LIMIT)
        found[number] = (processes[number].returncode, output)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    if meanwhile:
        meanwhile()
    for thread in threads:
        thread.join()
    return found


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def wait_for_a_step(run: RunFolder) -> None:
    deadline = time.monotonic() + LIMIT
    while not run.read_metrics() and time.monotonic() < deadline:
        time.sleep(POLL)


def kill_rank(rank: int, run: RunFolder) -> None:
    """SIGKILL to the worker of a rank once the first step is done."""
    wait_for_a_step(run)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        # Only workers of this run: its data and output stand in the recipe, its port in the environment.
        if b"slipway.training.worker" in words and f"RANK={rank}".encode() in variables:
            recipe = json.loads(Path(words[words.index(b"slipway.training.worker") + 1].decode()).read_text())
            if recipe["out"] == str(run.path) and b"torch.distributed.run" not in words:
                os.kill(int(folder.name), signal.SIGKILL)
                return
    raise AssertionError(f"no worker of rank {rank} was found")


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [process for child in children for process in (child, *descendants(child))]


def test_a_killed_rank_ends_the_run_everywhere_and_is_named(nemo_model, data, tmp_path, port):
    """The second node has the model and the data elsewhere: what counts is that they are the same."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(nemo_model, tmp_path / "model")
    shutil.copy(data, tmp_path / "data.jsonl")
    words = [command(nemo_model, data, run.path, port, steps=ENOUGH_STEPS, **node(0))]
    words += [command(tmp_path / "model", tmp_path / "data.jsonl", run.path, port, steps=ENOUGH_STEPS, **node(1))]
    found = run_all(words, meanwhile=lambda: kill_rank(1, run))
    for code, output in found:
        assert code == 1, output
        assert "slipway: train: rank 1 on node 1 (" in last_line(output), output
        assert "was killed by SIGKILL (out of memory?); its log: " in last_line(output)
        assert "torch.distributed.elastic" not in output and "ChildFailedError" not in output
    assert run.read_status()["state"] == "failed" and "rank 1 on node 1" in run.read_status()["why"]


def test_a_signal_to_every_process_of_a_step_stops_and_saves(nemo_model, data, tmp_path, port):
    """As Slurm sends it: torchrun and the workers get what only the command must heed. Nobody stays behind."""
    run = RunFolder(tmp_path / "run")
    process = subprocess.Popen(
        command(nemo_model, data, run.path, port, steps=ENOUGH_STEPS, nproc_per_node=2),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_a_step(run)
    family = [process.pid, *descendants(process.pid)]
    assert len(family) >= 4, "the command, torchrun and two workers"
    send(signal.SIGUSR1, family)
    lines = iter(process.stdout.readline, "")
    before = list(itertools.takewhile(lambda line: "SIGUSR1: saving" not in line, lines))
    send(signal.SIGTERM, family)  # only now: of two at once, Python may handle either first
    rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, "".join(before) + rest
    status = run.read_status()
    assert status["state"] == "stopped" and status["why"] == "SIGUSR1", status
    assert run.latest_checkpoint()[0] == status["step"]
    wait_for_the_end_of(family)


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def test_a_request_to_stop_while_nodes_are_awaited_ends_it_at_once(nemo_model, data, tmp_path, port):
    words = command(nemo_model, data, tmp_path / "run", port, **node(0))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    assert next(line for line in lines if line.startswith("topology: 2 nodes"))
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 75 and "SIGUSR1 before the first step; run the same command again" in last_line(errors)


def test_a_rank_that_fails_is_shown_with_its_last_lines(nemo_model, data, tmp_path, port):
    model = tmp_path / "model"
    shutil.copytree(nemo_model, model)
    reader = Reader(model)
    chunk = reader._chunks["embedding.word_embeddings.weight"][0]
    with (reader.folder / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        file.write(bytes(chunk.length))  # what is checked before the start are objects that are no tensors
    ((code, output),) = run_all([command(model, data, tmp_path / "run", port, nproc_per_node=2)])
    assert code == 1 and re.search(r"train: last lines of rank [01] on node 0 \(", output), output
    assert output.count("Traceback (most recent call last)") <= 2 and "ChildFailedError" not in output
    assert re.search(r"train: rank [01] on node 0 \(.*\) ended with exit code 1; its log: ", last_line(output))


def wait_for_the_end_of(pids: list[int]) -> None:
    """The kernel ends them a moment after their parent."""
    deadline = time.monotonic() + LIMIT
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(POLL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_that_vanishes_ends_the_run_and_leaves_no_process(nemo_model, data, tmp_path, port):
    """Killed as by a machine that goes down; its torchrun and worker would hold their GPUs for ever."""
    run, family = RunFolder(tmp_path / "run"), []

    def vanish() -> None:
        wait_for_a_step(run)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"--out={run.path}".encode() in words and b"--node-rank=1" in words:
                family.extend(descendants(int(folder.name)))
                os.kill(int(folder.name), signal.SIGKILL)

    words = [command(nemo_model, data, run.path, port, steps=ENOUGH_STEPS, **node(rank)) for rank in (0, 1)]
    (code, output), (other, _) = run_all(words, meanwhile=vanish)
    assert other == -signal.SIGKILL and code == 69
    assert re.search(r"train: node 1 \(.*\) was lost: its command or its machine stopped", last_line(output)), output
    assert len(family) == 2
    wait_for_the_end_of(family)


@pytest.mark.parametrize(
    "what, message",
    [
        ({"lr": 2e-3}, "--lr is 0.001 on node 0 and 0.002 on node 1 ("),
        ({"data": "OTHER"}, "the data (bytes, usable samples, digest of their positions and of a part of the file)"),
        ({"model": "OTHER"}, "the model (digest of both ends of its files of weights) is "),
    ],
)
def test_nodes_that_would_compute_different_things_stop_before_the_first_step(
    what, message, nemo_model, data, tmp_path, port
):
    copies = {"model": tmp_path / "model", "data": tmp_path / "data.jsonl"}
    shutil.copytree(nemo_model, copies["model"])
    shutil.copy(data, copies["data"])
    if what.get("data") == "OTHER":
        copies["data"].write_bytes(b"".join(data.read_bytes().splitlines(keepends=True)[1:]))
    if what.get("model") == "OTHER":
        weights = max((copies["model"] / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    changes = {key: copies[key] if value == "OTHER" else value for key, value in what.items()}
    words = [command(nemo_model, data, tmp_path / "run", port, **node(0))]
    words += [command(nemo_model, data, tmp_path / "run", port, **node(1), **changes)]
    for code, output in run_all(words):
        assert code == 65 and message in last_line(output), output
        assert "they must be the same on all nodes" in last_line(output) and "step 1/" not in output


def test_a_master_that_is_not_there_is_one_line_in_bounded_time(nemo_model, data, tmp_path, port):
    words = command(nemo_model, data, tmp_path / "run", port, **node(1), rendezvous_timeout=2)
    ((code, output),) = run_all([words])
    assert code == 78 and f"the master does not answer at 127.0.0.1:{port + 1} within 2 s" in last_line(output)
    words = command(nemo_model, data, tmp_path / "run", port, **node(1) | {"master_addr": "a.invalid"},
                    rendezvous_timeout=2)  # fmt: skip
    ((code, output),) = run_all([words])
    assert code == 78 and "a.invalid" in last_line(output) and "check that" in last_line(output)


def test_a_node_that_does_not_come_is_named(nemo_model, data, tmp_path, port):
    ((code, output),) = run_all([command(nemo_model, data, tmp_path / "run", port, **node(0), rendezvous_timeout=2)])
    assert code == 78 and f"node 1 did not connect to port {port + 1} of this machine within 2 s" in last_line(output)


def test_a_port_that_is_taken_is_said(nemo_model, data, tmp_path, port):
    with socket.create_server(("", port)):
        ((code, output),) = run_all([command(nemo_model, data, tmp_path / "run", port, nproc_per_node=2)])
    assert code == 78 and f"port {port} cannot be opened" in last_line(output) and "--master-port" in last_line(output)


def test_one_task_per_gpu_of_slurm_runs_the_workers_without_torchrun(nemo_model, data, tmp_path, port):
    """The variables that Slurm sets; the steps are then the same as with two nodes under torchrun."""
    task = {
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip
    envs = [task | {"SLURM_LOCALID": str(rank), "SLURM_PROCID": str(rank)} for rank in (0, 1)]
    words = [word for word in command(nemo_model, data, tmp_path / "run", port) if "--nproc-per-node" not in word]
    for code, output in run_all([words, words], envs):
        assert code == 0 and "torch.distributed.run" not in output, output
    assert len(RunFolder(tmp_path / "run").read_metrics()) == 3
