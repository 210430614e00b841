"""Runs while the image is built: builds a source into a wheel, with a line of progress every so often.

Usage: wheel.py NAME. The source is /src/NAME, the wheel appears in /out. The whole output of compilers is shown only if
the build fails: it has megabytes.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable

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


def main(name: str) -> int:
    """Build one source; returns uv's exit status."""
    started = time.monotonic()
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
