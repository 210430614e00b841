"""Cores and memory for compilers: those of the engine's machine, and no more than this process may use there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from images import engine

BYTES_PER_JOB = 4_000_000_000  # the most memory that one compiler of CUDA or torch code was seen to need, rounded up
CGROUPS = Path("/sys/fs/cgroup")


def compile_jobs() -> int:
    """How many compilers may run at once: one per core, fewer if memory is short."""
    cores, memory = (min(values) for values in zip(_of_engine(), _of_this_process(), strict=True))
    return max(1, min(int(cores), int(memory // BYTES_PER_JOB)))


def _of_engine() -> tuple[float, float]:
    """Cores and bytes of the machine that the engine runs on: it may be another one, or a virtual one."""
    words = ["info", "--format", "{{.NCPU}} {{.MemTotal}}"]
    found = engine.docker(*words, capture_output=True, text=True)
    if found.returncode or len(numbers := found.stdout.split()) != 2:
        return float("inf"), float("inf")
    return int(numbers[0]) or float("inf"), int(numbers[1]) or float("inf")


def _of_this_process() -> tuple[float, float]:
    """Cores and bytes that this process may use, if the engine runs beside it; else no limit."""
    if not os.environ.get("DOCKER_HOST", "unix://").startswith("unix://"):
        return float("inf"), float("inf")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores, limited = cgroup_limits()
    return min(len(os.sched_getaffinity(0)), cores), min(memory, limited)


def cgroup_limits(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> tuple[float, float]:
    """(cores, bytes) to which a process's control groups limit it, of version 1 or 2; infinite without a limit.

    A container's groups may be mounted at `root` itself, and then their path does not exist below it.
    """
    cores = memory = float("inf")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _up(root, path):
                memory = min(memory, _number(folder / "memory.max"))
                cores = min(cores, _ratio((_text(folder / "cpu.max") or "max 1").split()))
        elif "memory" in controllers.split(","):
            memory = min([memory, *(_number(d / "memory.limit_in_bytes") for d in _up(root / "memory", path))])
        elif "cpu" in controllers.split(","):
            for folder in _up(root / "cpu", path):
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
                cores = min(cores, _ratio([quota or "max", period or "1"]))
    return cores, memory


def _up(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group and of all groups above it."""
    folder = root / path.lstrip("/")
    yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _number(file: Path) -> float:
    text = _text(file)
    return int(text) if text and text.isdigit() else float("inf")


def _ratio(words: list[str]) -> float:
    """Cores, from a quota and a period: "max" or a negative quota is no limit."""
    quota, period = words
    return int(quota) / int(period) if quota.isdigit() and int(quota) else float("inf")
