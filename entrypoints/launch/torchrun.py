"""Starting the workers of this node and passing on the request to stop.

torchrun gives its children 30 seconds after SIGTERM, too little to save a large model. So a signal to this process
only makes the stop file: every worker sees it after its step, saves and ends by itself. Only when the grace period
is over does the signal itself go to torchrun.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from entrypoints.launch.topology import Topology

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WORKER = "entrypoints.training.worker"

# Set unless the user has set them; what each is for: docs/training.md.
ENVIRONMENT_DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVTE_ASYNC_AMAX_REDUCTION": "1",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
    "NVTE_DP_AMAX_REDUCE_INTERVAL": "0",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}


def command(topology: Topology, worker_arguments: Sequence[str]) -> list[str]:
    """The exact torchrun command of this node."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={topology.nodes}",
        f"--nproc-per-node={topology.processes_per_node}",
        f"--node-rank={topology.node_rank}",
        f"--master-addr={topology.master_addr}",
        f"--master-port={topology.master_port}",
        "-m",
        WORKER,
        *worker_arguments,
    ]


def environment() -> dict[str, str]:
    """This process's environment with the defaults filled in."""
    return {**ENVIRONMENT_DEFAULTS, **os.environ}


def launch(topology: Topology, worker_arguments: Sequence[str], stop_file: Path, grace: float) -> int:
    """Run the workers of this node to their end and return torchrun's exit code.

    Args:
        stop_file: made when this process is asked to stop.
        grace: seconds the workers then have, before torchrun is told to end them.
    """
    words = command(topology, worker_arguments)
    print(f"train: {shlex.join(words)}", file=sys.stderr, flush=True)
    process = subprocess.Popen(words, env=environment(), start_new_session=True)
    timers: list[threading.Timer] = []

    def stop(number: int, _: object) -> None:
        if timers:
            return
        name = signal.Signals(number).name
        print(f"train: {name}: saving and stopping within {grace:.0f} s", file=sys.stderr, flush=True)
        stop_file.touch()
        timers.append(threading.Timer(grace, process.terminate))
        timers[0].daemon = True
        timers[0].start()

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        return process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
