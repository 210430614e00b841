"""Who runs into a folder: one run at a time, and the claim of a run that is gone does not hold.

A claim is a file that is created only where there is none. Its owner touches it as long as it lives. A second start
reads it: on the same machine it looks for the owner's process; elsewhere it waits for a sign of life.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from slipway.errors import DataError, PreflightError
from slipway.report import human_seconds
from slipway.training.run_folder import now
from slipway.untrusted import harmless, read_object, tell

BEAT = 10.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one, after which the owner is gone
LONGEST_WORDS = 300  # characters of what an owner says of itself


class Claim:
    """The claim on a run's folder, held as long as the context lasts.

    Args:
        file: where it is.
        beat, silent: seconds, see BEAT and SILENT.

    Errors: PreflightError where a run holds the folder that lives.
    """

    def __init__(self, file: Path, beat: float = BEAT, silent: float = SILENT) -> None:
        self.file, self.beat, self.silent = file, beat, silent
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Claim:
        while not self._create():
            self._wait_until_it_is_stale()
            with contextlib.suppress(FileNotFoundError):
                self._remove()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self.file.unlink()

    def _create(self) -> bool:
        """Make the file; False where it is there already."""
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            json.dump(_me(), file)
        return True

    def _remove(self) -> None:
        try:
            self.file.unlink()
        except (IsADirectoryError, PermissionError) as error:
            raise PreflightError(f"{self.file}: {error.strerror}; remove it, or choose another --out") from None

    def _live(self) -> None:
        while not self._end.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def _wait_until_it_is_stale(self) -> None:
        """Return once the owner is known to be gone; PreflightError where it lives."""
        owner, seen = _read(self.file), _touched(self.file)
        if owner.get("job") and owner["job"] == _job() and owner.get("restart") != _restart():
            return  # Slurm starts a job again only when its last start has ended
        here = _is_here(owner)
        if here is False:
            return
        silent_for = 0.0
        while not here and silent_for < self.silent:
            if not silent_for:
                said = f"{_words(owner)}; waiting up to {human_seconds(self.silent)} for a sign of life"
                tell(f"train: {self.file.parent} is held by {said}")
            time.sleep(min(1.0, self.beat / 2))
            silent_for += min(1.0, self.beat / 2)
            if (touched := _touched(self.file)) is None:
                return  # it has ended meanwhile
            here = touched != seen
        if here:
            raise PreflightError(
                f"{self.file.parent} is held by {_words(owner)}; wait for its end, stop it, or choose another --out"
            )


def is_gone(file: Path) -> bool:
    """Whether the owner of a claim was a process of this machine that ended without giving it back: it was killed."""
    return _is_here(_read(file)) is False


def _me() -> dict[str, Any]:
    pid = os.getpid()
    about = {"host": socket.gethostname(), "job": _job(), "restart": _restart(), "started": now(), "pid": pid}
    return about | _process(pid)


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _restart() -> str:
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _process(pid: int) -> dict[str, Any]:
    """What tells a process of this machine from a later one with the same number; {} where there is none."""
    try:
        begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # see proc(5): starttime
        return {"begun": begun, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                "namespace": os.readlink("/proc/self/ns/pid")}  # fmt: skip
    except OSError:
        return {}


def _is_here(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process lives on this machine; None where that cannot be seen from here."""
    own = _process(os.getpid())
    if not own or any(owner.get(key) != own[key] for key in ("boot", "namespace")):
        return None
    there = _process(owner["pid"]) if isinstance(owner.get("pid"), int) else {}
    return bool(there) and there["begun"] == owner.get("begun")


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (DataError, OSError):  # it has just been made, or was cut off by a full disk
        return {}


def _touched(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _words(owner: dict[str, Any]) -> str:
    """The owner for people."""
    parts = [f"a run on {owner.get('host', 'an unknown host')}"]
    parts += [f"process {owner['pid']}"] if "pid" in owner else []
    parts += [f"job {owner['job']}"] if owner.get("job") else []
    return harmless(", ".join(parts) + (f", since {owner['started']}" if "started" in owner else ""), LONGEST_WORDS)
