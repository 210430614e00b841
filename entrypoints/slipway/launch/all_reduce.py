"""One timed all-reduce: the program that `doctor` starts once per GPU, and the function that collects its results."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from slipway.launch.network import chosen_transport
from slipway.launch.topology import Topology
from slipway.launch.torchrun import environment, rank_variables

BYTES = {"gloo": 16 << 20, "nccl": 1 << 30}  # large enough that the bandwidth decides, not the latency
ROUNDS = 5
# NCCL says which network it takes in its log only. A user's own settings for the log stay.
LOG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,P2P,SHM"}


def measure(topology: Topology, timeout: float) -> str:
    """Start the processes of this node and return what the first of them printed, with the network that NCCL took.

    Args:
        timeout: seconds that a process waits for the others.

    Errors: RuntimeError with the last line of a process that failed, TimeoutExpired.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "nccl"
        own = {} if "NCCL_DEBUG" in os.environ else LOG | {"NCCL_DEBUG_FILE": str(log)}
        printed = _run(topology, timeout, own)
        transport = chosen_transport(log.read_text(errors="replace")) if log.exists() else ""
    return f"{printed}; {transport}" if transport else printed


def _run(topology: Topology, timeout: float, log: dict[str, str]) -> str:
    """What the first process of this node printed; `log`: variables for its NCCL."""
    processes: list[subprocess.Popen[str]] = []
    locals_ = range(topology.processes_per_node) if topology.local_rank is None else [topology.local_rank]
    for local_rank in locals_:
        rank = topology.node_rank * topology.processes_per_node + local_rank
        variables = rank_variables(topology) | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        words = [sys.executable, "-m", __name__, str(timeout)]
        if not processes:
            variables |= log
        # Not by torchrun, which would hide the message of a rank that fails.
        processes.append(
            subprocess.Popen(
                words, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        # More time than the processes have: they stop by themselves and say why, which is a better message.
        found = [process.communicate(timeout=2 * timeout + 60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, found, strict=True):
        if process.returncode:
            raise RuntimeError((errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return found[0][0].strip()


def main(timeout: float) -> None:
    """One rank: print the size, the time and the rate; a wrong sum is an error."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    count = dist.get_world_size()
    data = torch.ones(BYTES[backend] // 4, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(data)  # the first one also connects the ranks, so it is not timed
    if not torch.all(data == count):
        raise SystemExit(f"the sum of {count} ones is wrong: {data.min():g} to {data.max():g}")
    dist.barrier()
    started = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(data)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / ROUNDS
    # The bus bandwidth as nccl-tests define it: what each link carried.
    rate = BYTES[backend] / seconds * 2 * (count - 1) / count / 1e9
    print(f"{backend}, {count} processes, {BYTES[backend] >> 20} MiB in {seconds * 1e3:.1f} ms: {rate:.2f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(float(sys.argv[1]))
