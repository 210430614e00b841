"""Starts the workers of this node, shows what they print, and passes on a request to stop.

A request to stop reaches the workers as a file (signals.py).

Workers and torchrun write to files, and this process repeats what the workers write. So the output of every rank is
kept in its own file, and the long message of torchrun does not hide the message of the rank that failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from slipway.errors import SlipwayError
from slipway.launch.failure import Failure, failures_of_node, rank_logs
from slipway.launch.link import Link
from slipway.launch.topology import Topology
from slipway.report import say
from slipway.signals import END, StopRequests, prepare_child
from slipway.untrusted import Harmless, harmless, note, shown_url, tell

WORKER = "slipway.training.worker"
POLL = 0.1  # seconds between looks at the processes and their logs

# Set unless the user has set them. docs/training.md says what each is for.
ENVIRONMENT_DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVTE_ASYNC_AMAX_REDUCTION": "1",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
    "NVTE_DP_AMAX_REDUCE_INTERVAL": "0",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def command(topology: Topology, worker_arguments: Sequence[str], logs: Path) -> list[str]:
    """The exact torchrun command of this node, or the worker itself if the launcher has started one command per GPU."""
    worker = ["-m", WORKER, *worker_arguments]
    if topology.local_rank is not None:
        return [sys.executable, *worker]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={topology.nodes}",
        f"--nproc-per-node={topology.processes_per_node}",
        f"--node-rank={topology.node_rank}",
        f"--master-addr={topology.master_addr}",
        f"--master-port={topology.master_port}",
        f"--signals-to-handle={END.name}",  # it ignores the others, see signals.py
        "--redirects=3",
        f"--log-dir={logs}",
        *worker,
    ]


# Beside the defaults, what decides how a run goes and holds no secret: only of these the values are shown. A list of
# what is secret would not know the next name.
SHOWN = {
    *(f"NCCL_{name}" for name in (
        "ALGO", "BUFFSIZE", "CROSS_NIC", "DEBUG", "DEBUG_SUBSYS", "IB_DISABLE", "IB_GID_INDEX", "IB_HCA",
        "IB_RETRY_CNT", "IB_SL", "IB_TC", "IB_TIMEOUT", "MAX_NCHANNELS", "MIN_NCHANNELS", "NET", "NET_GDR_LEVEL",
        "NET_PLUGIN", "NTHREADS", "P2P_DISABLE", "P2P_LEVEL", "PROTO", "SHM_DISABLE", "SOCKET_FAMILY",
        "SOCKET_IFNAME", "TOPO_FILE",
    )),
    *(f"CUDA_{name}" for name in ("DEVICE_ORDER", "LAUNCH_BLOCKING", "MODULE_LOADING", "VISIBLE_DEVICES")),
    *(f"HF_{name}" for name in ("ENDPOINT", "HOME", "HUB_CACHE", "HUB_OFFLINE", "HUB_DISABLE_XET")),
    *(f"WANDB_{name}" for name in ("BASE_URL", "DIR", "ENTITY", "MODE", "NAME", "PROJECT", "RUN_GROUP")),
    "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "NVTE_DEBUG", "SLIPWAY_VERBOSE", "TORCH_LOGS",
    "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_SHOW_CPP_STACKTRACES",
}  # fmt: skip
# Of others with these beginnings only the name is shown.
TOLD = re.compile(r"^(NCCL|NVTE|TORCH|WANDB|HF|CUDA|PYTORCH|SLIPWAY)_")


def shown_environment() -> dict[str, str]:
    """The variables of the workers that decide how they run; the values of those that are known to hold no secret."""
    variables = environment().items()
    known = {*ENVIRONMENT_DEFAULTS, *SHOWN}
    found = {key: value for key, value in variables if key in known or TOLD.match(key)}
    return {key: shown_url(value) if key in known else "***" for key, value in sorted(found.items())}


def environment() -> dict[str, str]:
    """This process's environment with the defaults filled in."""
    return {**ENVIRONMENT_DEFAULTS, **os.environ}


def rank_variables(topology: Topology) -> dict[str, str]:
    """The variables that torchrun would set for the first process of this command."""
    return {
        "RANK": str(topology.rank),
        "LOCAL_RANK": str(topology.local_rank or 0),
        "GROUP_RANK": str(topology.node_rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_WORLD_SIZE": str(topology.processes_per_node),
        "MASTER_ADDR": topology.master_addr,
        "MASTER_PORT": str(topology.master_port),
    }


def launch(
    topology: Topology, worker_arguments: Sequence[str], stop: StopRequests, logs: Path, link: Link
) -> Failure | None:
    """Run the workers of this command to their end. Returns why the run failed, here or on another node, or None.

    Args:
        topology: the place of this command in the run.
        worker_arguments: the command line of a worker.
        stop: the requests to stop that this process gets as signals.
        logs: new folder for what the workers print.
        link: to the commands on the other nodes.
    """
    words = command(topology, worker_arguments, logs)
    tell(f"train: {shlex.join(words)}")
    process = _start(topology, words, logs)
    screen = Screen(topology, logs)
    with stop.while_saving(lambda: process.send_signal(END)):
        while process.poll() is None and not link.verdict:
            screen.show()
            time.sleep(POLL)
        if process.poll() is None:
            _end(process)
    screen.show()  # what was written between the last look and the end
    say("")
    if process.returncode == 0 and not link.verdict:
        link.finish()
    elif not link.verdict:
        return link.fail(failures_of_node(topology, logs, stop.stop_file.parent, process.returncode))
    return link.verdict


def _start(topology: Topology, words: list[str], logs: Path) -> subprocess.Popen:
    """Start torchrun, or the worker itself, which then has its logs where torchrun would put them."""
    # What an operator says of the place is in the flags. The rest torchrun would take beside them: PET_MAX_RESTARTS, by
    # which workers start again on their own, or a rendezvous, which has another master.
    env = {name: value for name, value in environment().items() if not name.startswith("PET_")}
    if topology.local_rank is None:
        with (logs / "torchrun.log").open("w") as log:
            return _popen(words, env, log, log)
    folder = logs / "worker" / "attempt_0" / str(topology.local_rank)
    folder.mkdir(parents=True)
    with (folder / "stdout.log").open("w") as out, (folder / "stderr.log").open("w") as err:
        return _popen(words, env | rank_variables(topology), out, err)


def _popen(words: list[str], env: dict[str, str], out: TextIO, err: TextIO) -> subprocess.Popen:
    # In a session of its own: Ctrl-C in a terminal goes to this command only, which then lets the workers save.
    return subprocess.Popen(
        words, env=env, start_new_session=True, stdout=out, stderr=err, preexec_fn=prepare_child
    )  # fmt: skip


def _end(process: subprocess.Popen) -> None:
    """End the workers at once, because they wait for a rank on another node that is lost; then end torchrun."""
    # By SIGKILL: torchrun would give them 30 s after a SIGTERM, and they cannot save without the lost rank anyway.
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    process.send_signal(END)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Screen:
    """Repeats what the workers of this command write, line by line, up to a traceback.

    Tracebacks are not shown. Most ranks have one only because they lost another rank; the end shows the right one.
    """

    def __init__(self, topology: Topology, logs: Path) -> None:
        self._logs = logs
        self._ranks = range(topology.processes_per_node) if topology.local_rank is None else [topology.local_rank]
        self._files: dict[Path, tuple[TextIO, TextIO]] = {}

    def show(self) -> None:
        """Print what is new since the last call."""
        for rank in self._ranks:
            for log in rank_logs(self._logs, rank):
                if log not in self._files:
                    screen = sys.stdout if log.name == "stdout.log" else sys.stderr
                    self._files[log] = (log.open(errors="replace"), screen)
        for log, (file, screen) in self._files.items():
            self._copy(log, file, screen)

    def _copy(self, log: Path, file: TextIO, screen: TextIO) -> None:
        while not file.closed:
            at = file.tell()
            line = file.readline()
            if not line.endswith("\n"):
                file.seek(at)  # half a line: the worker is writing it
                return
            if "Traceback (most recent call last)" in line:
                file.close()
            elif screen is sys.stdout:
                say(harmless(line.rstrip("\n")), living=line.startswith("step "))
            else:
                tell(line.rstrip("\n"))


def run_here(topology: Topology, run: Callable[[], None], stop: StopRequests) -> None:
    """Call the only worker of a run in this process, without torchrun.

    Args:
        topology: one node with one process.
        run: the worker.
        stop: the requests to stop that this process gets as signals. At the end of the grace period the worker is
            interrupted.

    Errors: GraceIsOver.
    """
    # Port 0 is any free port: no other process has to find the store of this run.
    os.environ.update(environment() | rank_variables(topology) | {"MASTER_PORT": "0"})
    note("")  # an error from here on has nothing to do with the last file that this command has read

    def interrupt(*_: object) -> None:
        raise _Interruption

    main = threading.main_thread().ident or 0  # never 0: the thread has been started
    # Only a signal can interrupt the main thread while it computes; the timer of the grace period is another thread.
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        harmless_errors = Harmless(sys.stderr)  # Weights & Biases' client, for one, prints what its server says
        with (
            stop.while_saving(lambda: signal.pthread_kill(main, signal.SIGALRM)),
            contextlib.redirect_stderr(harmless_errors),
        ):
            run()
    except _Interruption:
        raise GraceIsOver("did not save in time") from None
    finally:
        signal.signal(signal.SIGALRM, before)


class _Interruption(BaseException):
    """An exception that no `except Exception` of a library catches."""


class GraceIsOver(SlipwayError):
    """A worker in this process did not save within the grace period."""
