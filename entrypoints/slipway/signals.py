"""Requests to stop: which process reacts to them, and how.

Only the command reacts. Slurm sends a signal to every process of a step, and torchrun kills its workers 30 seconds
after SIGTERM, which is too early for a large model to be saved. So torchrun and the workers ignore these signals. The
command writes the stop file, and every worker looks for it after each step, saves and ends by itself. When the grace
period is over, the command ends torchrun with SIGHUP.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from slipway.errors import Stopped
from slipway.streams import put
from slipway.untrusted import replace_file

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CLOSED = signal.SIGHUP  # of the command: its terminal was closed, or the connection to it was lost
END = signal.SIGHUP  # from the command to torchrun, which has no terminal, and from torchrun to its workers
PR_SET_PDEATHSIG = 1  # prctl(2)


class StopRequests:
    """What a request to stop does in the command, which depends on how far the run is; a context manager.

    Before the workers run, it raises Stopped, because there is nothing to save yet. Within `while_saving` it writes the
    stop file. After that the run has ended already, and nothing happens. A second request does nothing.
    """

    def __init__(self, stop_file: Path, grace: float) -> None:
        """`stop_file`: the name of the signal is written to it; `grace`: seconds that the workers then have."""
        self.stop_file, self.grace = stop_file, grace
        self.asked_by = ""  # the signal's name
        self.grace_is_over = False
        self._owner = os.getpid()  # a child that is forked meanwhile inherits the handlers
        self._meaning: Callable[[str], None] = self._stop_at_once

    def __enter__(self) -> StopRequests:
        # Under nohup it is ignored already, so that the run outlives its terminal.
        closed = () if signal.getsignal(CLOSED) == signal.SIG_IGN else (CLOSED,)
        self._before = {number: signal.signal(number, self._handle) for number in (*STOP_SIGNALS, *closed)}
        return self

    def __exit__(self, *_: object) -> None:
        # srun --kill-on-bad-exit treats the first exit code 75 as a failure and sends SIGTERM to the other commands.
        # They are ending too, and must not end with another exit code because of it.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.asked_by else handler)

    @contextlib.contextmanager
    def while_saving(self, give_up: Callable[[], None]) -> Iterator[None]:
        """In this block a request lets the workers save; `give_up` is called when the grace period is over."""

        def end() -> None:
            self.grace_is_over = True
            give_up()

        timer = threading.Timer(self.grace, end)
        timer.daemon = True

        def save(name: str) -> None:
            self.asked_by = name
            replace_file(self.stop_file, name.encode(), durable=False)  # a worker may look at any time
            put(f"train: {name}: saving and stopping within {self.grace:.0f} s\n", sys.stderr)
            if self.grace:
                timer.start()
            else:  # at once: a thread could be started so late that the workers have saved by then
                end()

        self._meaning = save
        try:
            yield
        finally:
            self._meaning = lambda _: None
            timer.cancel()

    def _handle(self, number: int, _: object) -> None:
        # A forked child, such as a data loader, has these handlers too, but decides nothing.
        if os.getpid() == self._owner and not self.asked_by:
            self._meaning(signal.Signals(number).name)

    def _stop_at_once(self, name: str) -> None:
        self.asked_by = name
        raise Stopped(f"train: {name} before the first step; run the same command again")


def prepare_child() -> None:
    """In a child process, before torchrun starts there: ignore requests to stop, and end when the command ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, so that no worker goes on alone and keeps its GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def heed_the_parent_alone() -> None:
    """In a worker: SIGTERM from torchrun ends it, SIGTERM from any other process does nothing.

    A thread waits for the signal, so that it works while the main thread waits inside NCCL or gloo. Call this before
    any other thread is started: SIGTERM is blocked here, and new threads inherit that.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
