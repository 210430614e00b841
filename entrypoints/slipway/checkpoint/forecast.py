"""What a conversion would need: bytes and files from the plan, the time from a sample that is read and converted.

Nothing is written: a person asks before there is a place to write to, and expects to find nothing there afterwards.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint.stream import Plan, in_parallel
from slipway.errors import WriteError
from slipway.report import human_bytes, human_seconds

SAMPLE_BYTES = 256_000_000
KERNELS = "TRITON_CACHE_DIR"


@dataclass
class Forecast:
    """The result of --dry-run: `seconds` and `planned_in` in seconds, sizes in bytes, the others are counts."""

    command: str
    out: str
    reads: int
    writes: int
    files: int
    pieces: int
    free: int
    seconds: float
    planned_in: float

    def __str__(self) -> str:
        enough = "enough" if self.free >= self.writes else "NOT ENOUGH, free some space"
        return (
            f"{self.command}: would read {human_bytes(self.reads)} and write {human_bytes(self.writes)} "
            f"({self.files} files, {self.pieces} pieces) to {self.out} in about {human_seconds(self.seconds)} "
            f"if that disk keeps up; it has {human_bytes(self.free)} free: {enough} "
            f"(planned in {self.planned_in:.1f} s)"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(plan: Plan, out: Path, command: str, memory: int, started: float) -> Forecast:
    """Read and convert some pieces of the plan, and estimate the rest from them.

    Args:
        memory: most bytes for all pieces that are at work.
        started: time.monotonic() when planning began.

    Errors: WriteError where nothing could be written.
    """
    planned_in = time.monotonic() - started
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write {out}: {parent} is read-only for this user; choose another place")
    reads = sum(piece.bytes for piece in plan.pieces)
    copied = sum(source.stat().st_size for source in plan.copies.values())
    return Forecast(
        command=command,
        out=str(out),
        reads=reads,
        writes=plan.bytes + copied,
        files=len(plan.sizes) + len(plan.small) + len(plan.copies),
        pieces=len(plan.pieces),
        free=shutil.disk_usage(parent).free,
        seconds=reads * _seconds_per_byte(plan, memory),
        planned_in=planned_in,
    )


def _seconds_per_byte(plan: Plan, memory: int) -> float:
    """Seconds per byte of the source, for reading and converting, measured on random pieces."""
    numbers = list(range(len(plan.pieces)))
    random.Random(0).shuffle(numbers)  # the first pieces are headers and embeddings, which tell little of the rest
    sample: dict[int, int] = {}
    for number in numbers:
        if sum(sample.values()) >= SAMPLE_BYTES:
            break
        sample[number] = plan.pieces[number].bytes

    def do(number: int) -> None:
        for _ in plan.pieces[number].work():
            pass

    with _kernels_aside():
        started = time.monotonic()
        in_parallel(sample, do, "forecast", memory)
        return (time.monotonic() - started) / max(1, sum(sample.values()))


@contextlib.contextmanager
def _kernels_aside() -> Iterator[None]:
    """Where a GPU decodes, Triton keeps what it compiles: here in a folder that goes away."""
    before = os.environ.get(KERNELS)
    with tempfile.TemporaryDirectory(prefix="slipway-dry-run-") as folder:
        os.environ[KERNELS] = folder
        try:
            yield
        finally:
            del os.environ[KERNELS]
            if before is not None:
                os.environ[KERNELS] = before
