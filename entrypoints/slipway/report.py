"""What a command tells the person who runs it: progress while it works, one summary at the end."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from slipway.streams import put

LOG_INTERVAL_SECONDS = 10.0


def human_bytes(count: float) -> str:
    """`count` bytes in decimal units with three significant digits: 1230000 → "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(count: float) -> str:
    """`count` seconds in the unit that fits: 75 → "1.2 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} s"


_is_living = False  # a line is on the terminal that the next one takes the place of


def say(line: str, living: bool = False) -> None:
    """Print a line. On a terminal a living line takes the place of the one before; elsewhere every line stays."""
    global _is_living
    if not sys.stdout.isatty():
        put(f"{line}\n" if line else "", sys.stdout)
        return
    if living:
        width = shutil.get_terminal_size().columns - 1
        put(f"\r\x1b[2K{line[:width]}", sys.stdout)
    else:
        put(("\n" if _is_living else "") + (f"{line}\n" if line else ""), sys.stdout)
    _is_living = living


@dataclass
class Summary:
    """The result of one command: what was written, how large it is and how long it took.

    Every command returns this or another object whose `str()` is for people and whose `as_dict()` is for `--json`.
    """

    command: str
    wrote: str
    bytes: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    streamed: bool = True  # the seconds went into those bytes, so their rate says something

    def __str__(self) -> str:
        rate = f", {human_bytes(self.bytes / self.seconds)}/s" if self.streamed and self.seconds > 0 else ""
        notes = "".join(f"\n{self.command}: note: {note}" for note in self.details.get("notes", ()))
        shown = {name: value for name, value in self.details.items() if name != "notes"}
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
        return (
            f"{self.command}: wrote {self.wrote}, {human_bytes(self.bytes)} in {self.seconds:.1f} s{rate}"
            + (f" ({details})" if details else "")
            + notes
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as one flat JSON-ready object, for `--json`."""
        return {
            "command": self.command,
            "wrote": self.wrote,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            **self.details,
        }


class Progress:
    """Bytes done out of a known total: a bar on a terminal, a line every ten seconds in a log.

    Use as a context manager and call `advance(n)` from any thread. Everything goes to standard error.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._lock = threading.Lock()
        self.started = self.last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.title, unit="B", unit_scale=True, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Count `count` more bytes as done."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(count)
            elif (now := time.monotonic()) - self.last_line >= LOG_INTERVAL_SECONDS:
                self.last_line = now
                self._print_line(now)

    def _print_line(self, now: float) -> None:
        rate = self.done / (now - self.started)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "waiting"
        done = f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        put(f"{self.title}: {done}, {human_bytes(rate)}/s, {left}\n", sys.stderr)
