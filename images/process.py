"""Programs that leave something behind when they are killed: on an interrupt they are asked to stop, and waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STOPS = {signal.SIGINT, signal.SIGTERM}
STOP_SECONDS = 600  # mmdebstrap, killed, leaves mounts; on a busy machine it needs more than a minute to undo them


def run(command: list[str], capture_output: bool = False, **options: Any) -> subprocess.CompletedProcess:
    """Run a program like subprocess.run, but on an interrupt send it SIGTERM and give it STOP_SECONDS to clean up.

    subprocess.run would kill it. Then mmdebstrap would leave its mounts. docker's plugin would live on, read folders
    that we remove, and print after our last line.

    Args:
        command: the program and its words.
        capture_output: put what it prints into the result.
        options: those of subprocess.Popen.

    Errors: KeyboardInterrupt when the program has ended.
    """
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = None
    try:
        # An interrupt between the start of the program and the assignment would lose the program: it is delayed.
        # The child inherits blocked signals, so it sets its mask back, or it would not hear SIGTERM itself.
        with held() as usual:
            options["preexec_fn"] = lambda: signal.pthread_sigmask(signal.SIG_SETMASK, usual)
            process = subprocess.Popen(command, **options)
        output = process.communicate()
    except KeyboardInterrupt:
        if process:
            _end(process, Path(command[0]).name)
        raise
    return subprocess.CompletedProcess(command, process.returncode, *output)


@contextmanager
def held() -> Iterator[set[int | signal.Signals]]:
    """Delay SIGINT and SIGTERM until the end of the block; yields the signals that were blocked before it."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield usual
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def _end(process: subprocess.Popen, name: str) -> None:
    with held():
        process.terminate()
        print(f"stopping {name}", file=sys.stderr)
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
