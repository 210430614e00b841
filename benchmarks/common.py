"""What the benchmarks share: running a command and measuring it, and the table.

Nothing large is imported here. The peak memory that the kernel reports of a process is never less than that of the
process which started it, so whatever measures must stay small, and the models are made by a process of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipway.report import human_bytes

ROOM = 1.3  # free space asked for, over what is planned


@dataclass(order=True)
class Measured:
    """One finished process: wall seconds and peak resident bytes; the quicker is the smaller."""

    seconds: float
    peak: int


def measure(*words: object) -> Measured:
    """Run `python WORDS` to its end; a failure ends the benchmark with what it printed."""
    command = [sys.executable, *map(str, words)]
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()}")
    return Measured(seconds, usage.ru_maxrss * 1024)


def slipway(*words: object) -> Measured:
    """Run one command of ours."""
    return measure("-m", "slipway.cli", *words)


def interpreter() -> Measured:
    """What Python takes before it has done anything."""
    return measure("-c", "pass")


def make_model(folder: Path, options: argparse.Namespace, gigabytes: float) -> None:
    """A model of about so many gigabytes in BF16, made by another process."""
    measure("-m", "benchmarks.synthetic", folder, options.model, options.format, gigabytes)


def arguments(about: str, **sizes: object) -> argparse.ArgumentParser:
    """The flags that all benchmarks take; `sizes` are those of --gigabytes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="gpt_oss", help="family of the synthetic model")
    parser.add_argument("--format", default="mxfp4", choices=["mxfp4", "fp8", "bf16"], help="of its weights")
    parser.add_argument("--gigabytes", type=float, help="size of the model in BF16", **sizes)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder to work in")
    return parser


@contextmanager
def scratch(folder: Path, gigabytes: float) -> Iterator[Path]:
    """A folder that is removed afterwards, on a disk with that much room."""
    needed, free = ROOM * gigabytes * 1e9, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder}: {human_bytes(needed)} are needed, {human_bytes(free)} are free; give another --scratch")
    with tempfile.TemporaryDirectory(prefix="slipway-bench-", dir=folder) as made:
        yield Path(made)


def size_of(folder: Path) -> int:
    """Bytes of everything in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need be, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]), flush=True)


def verdict(what: str, passed: bool) -> str:
    """One line on a target."""
    return f"{'ok  ' if passed else 'MISS'} {what}"
