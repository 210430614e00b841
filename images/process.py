"""Programs that leave something behind when they are killed: where we are interrupted, they are told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOPS = {signal.SIGINT, signal.SIGTERM}
STOP_SECONDS = 60


def run(command: list[str], capture_output: bool = False, **options) -> subprocess.CompletedProcess:
    """Run a program as subprocess.run does, but end it gently.

    Where we are interrupted it gets SIGTERM, and STOP_SECONDS for what it has to undo: mmdebstrap its mounts, docker
    its plugin, which outlives a client that is killed, reads folders that we remove and prints after our last line.
    An interrupt while the program is being started counts as one after that.

    Args:
        command: the program and its words.
        capture_output: put what it prints into the answer.
        options: subprocess.Popen's.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    process = None
    try:
        with held() as usual:
            process = subprocess.Popen(
                command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, usual), **pipes, **options
            )
        output = process.communicate()
    except KeyboardInterrupt:
        if process:
            _end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, *output)


@contextmanager
def held() -> Iterator[set[signal.Signals]]:
    """Hear SIGINT and SIGTERM only when the block is left; yields the signals that are held back elsewhere."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield usual
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def _end(process: subprocess.Popen) -> None:
    with held():
        process.terminate()
        print(f"{Path(process.args[0]).name} is being stopped", file=sys.stderr)
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
