"""Runs while the image is built: builds a source into a wheel, with a line of progress every so often.

Usage: wheel.py NAME. The source is /src/NAME, the wheel appears in /out. The whole output of compilers is shown only if
the build fails: it has megabytes.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

EVERY_SECONDS = 20
SHOWN_LINES, SHOWN_WIDTH = 120, 1000  # of a build that failed


def watch(name: str, lines: Iterable[str]) -> deque[str]:
    """Print how many objects are compiled, as ninja counts them; returns the last lines.

    A source can have several libraries, and each has a count of its own.
    """
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    library, started = "", time.monotonic()
    said = started
    for line in lines:
        last.append(line.rstrip("\n")[:SHOWN_WIDTH])
        if found := re.match(r"building '(\S+)' extension", line) or re.match(r"Building CMake extension (\S+)", line):
            library = f", {found[1]}"
        count = re.match(r"\[(\d+)/(\d+)\] ", line)
        # The last object of a library is always said, so that the log has the number of all objects.
        if count and (count[1] == count[2] or time.monotonic() - said > EVERY_SECONDS):
            said = time.monotonic()
            print(f"{name}{library}: {count[1]} of {count[2]} objects, {said - started:.0f} s", flush=True)
    return last


# Transformer Engine 2.9 takes architectures from 10.0 on out of CMake's list, and has flags of its own for them.
# CMake refuses a list of which nothing is left, but takes OFF.
TAKEN_OUT_SINCE = 100
LISTS = "transformer_engine/common/CMakeLists.txt"
BEFORE = "# cuDNN frontend API\n"  # the first line after what takes them out
NOT_EMPTY = "if(NOT CMAKE_CUDA_ARCHITECTURES)\n  set(CMAKE_CUDA_ARCHITECTURES OFF)\nendif()\n"


def allow_new_architectures_alone(source: Path, architectures: str) -> None:
    """Let Transformer Engine be compiled for 10.0 and later without an older architecture.

    Args:
        architectures: as NVTE_CUDA_ARCHS has them, "90;100".
    """
    if any(int(name) < TAKEN_OUT_SINCE for name in architectures.split(";")):
        return
    before, found, after = (source / LISTS).read_text().partition(BEFORE)
    if not found:
        print(f"te: {LISTS} has no line {BEFORE!r}: it is compiled as it is (see images/compile/wheel.py)", flush=True)
    elif NOT_EMPTY not in before:
        (source / LISTS).write_text(before + NOT_EMPTY + found + after)


def forget_times(source: Path) -> None:
    """Set the time of every file to 0: `nvcc -lineinfo` writes those of sources and headers into device code."""
    for file in source.rglob("*"):
        os.utime(file, (0, 0), follow_symlinks=False)


def main(name: str) -> int:
    """Build one source; returns uv's exit status."""
    started = time.monotonic()
    if name == "te":
        allow_new_architectures_alone(Path("/src/te"), os.environ["NVTE_CUDA_ARCHS"])
    forget_times(Path("/src") / name)
    command = ["/uv/uv", "build", "--wheel", "--no-build-isolation", "--out-dir", "/out", f"/src/{name}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as build:
        assert build.stdout
        last = watch(name, build.stdout)
    if build.returncode:
        print(*last, sep="\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{name}: {'failed' if build.returncode else 'built'} in {time.monotonic() - started:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of all cores, the largest process had {used.ru_maxrss / 1e6:.2f} GB",
        flush=True,
    )
    return build.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
