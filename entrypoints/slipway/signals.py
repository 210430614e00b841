"""Requests to stop: who hears them, and what they mean.

The command alone decides. Slurm sends a signal to every process of a step, and torchrun gives its children 30 seconds
after SIGTERM, too little to save a large model. So torchrun and the workers do not hear such a signal; the command
makes the stop file, every worker sees it after its step, saves and ends by itself. Only when the grace period is over
does the command end torchrun, with SIGHUP.
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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
END = signal.SIGHUP  # from the command to torchrun, and from torchrun to its workers
PR_SET_PDEATHSIG = 1  # prctl(2)


class StopRequests:
    """What a request to stop means to the command, which changes as the run goes on; a context manager.

    Before the workers run, it raises Stopped, for there is nothing to save yet. Within `while_saving` it makes the stop
    file. After that the run has ended already, and it means nothing. A second request adds nothing to the first.
    """

    def __init__(self, stop_file: Path, grace: float) -> None:
        """`stop_file`: gets the signal's name; `grace`: seconds that the workers then have."""
        self.stop_file, self.grace = stop_file, grace
        self.asked_by = ""  # the signal's name
        self.grace_is_over = False
        self._owner = os.getpid()  # a child that is forked meanwhile inherits the handlers
        self._meaning: Callable[[str], None] = self._stop_at_once

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        # srun --kill-on-bad-exit takes the first 75 for a failure: its SIGTERM must not change the others' exit codes.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.asked_by else handler)

    @contextlib.contextmanager
    def while_saving(self, give_up: Callable[[], None]) -> Iterator[None]:
        """While it lasts, a request lets the workers save; `give_up` is called when the grace period is over."""

        def end() -> None:
            self.grace_is_over = True
            give_up()

        timer = threading.Timer(self.grace, end)
        timer.daemon = True

        def save(name: str) -> None:
            self.asked_by = name
            print(f"train: {name}: saving and stopping within {self.grace:.0f} s", file=sys.stderr, flush=True)
            self.stop_file.write_text(name)
            timer.start()

        self._meaning = save
        try:
            yield
        finally:
            self._meaning = lambda _: None
            timer.cancel()

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() == self._owner and not self.asked_by:
            self._meaning(signal.Signals(number).name)

    def _stop_at_once(self, name: str) -> None:
        self.asked_by = name
        raise Stopped(f"train: {name} before the first step; run the same again")


def prepare_child() -> None:
    """In a child, before torchrun starts there: be deaf to requests to stop, and end with the command."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, so that no worker goes on alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def heed_the_parent_alone() -> None:
    """In a worker: SIGTERM ends it when torchrun sends it, and means nothing when anybody else does.

    A thread waits for the signal, so it counts also while the main thread waits inside NCCL or gloo. Call it before any
    other thread is started, for they all inherit that SIGTERM is blocked.
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
