"""Runs while the image is built: removes from site-packages what no command can need, and keeps every RECORD correct.

Usage: slim.py locked|built SITE_PACKAGES: `locked` after the locked packages are installed, `built` after the packages
that are built from source. A pattern that matches nothing stops the build, so that these lists stay up to date.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# (pattern below site-packages, why nothing needs it). A pattern that ends in / removes whole folders.
LOCKED = (
    ("**/tests/", "packages' own tests"),
    ("**/test/", "packages' own tests"),
    ("**/*.a", "static libraries: only linkers read them"),
    ("torch/include/", "C++ headers: extensions are compiled in stages of their own"),
    ("pyarrow/include/", "C++ headers"),
    ("torch/bin/protoc*", "compiler of protocol buffers, useless without the headers"),
    ("torch/bin/ptxas", "the same program as triton/backends/nvidia/bin/ptxas, which torch uses if this is missing"),
    ("triton/backends/nvidia/lib/cupti/", "CUPTI of CUDA 12 for Triton's profiler; torch has CUDA 13's"),
    ("triton/instrumentation/", "plug-ins that test Triton's compiler"),
    ("nvidia/cu13/lib/libcusolverMg.so*", "cuSOLVER for several GPUs; torch links only libcusolver"),
    ("nvidia/nvshmem/lib/*.bc", "NVSHMEM for device code that a user compiles"),
    ("pulp/solverdir/cbc/osx/", "a program for macOS"),
    ("pulp/solverdir/cbc/win/", "a program for Windows"),
    ("pulp/solverdir/cbc/linux/i32/", "a program for another processor"),
)
OF_A_PROCESSOR = {
    "x86_64": (
        ("nvidia/cu13/lib/libnvrtc*.alt.so*", "a second NVRTC; torch loads libnvrtc.so.13"),
        ("pulp/solverdir/cbc/linux/arm64/", "a program for another processor"),
    ),
    "aarch64": (("pulp/solverdir/cbc/linux/i64/", "a program for another processor"),),
}
BUILT = (("tests/", "NeMo's own tests, which its wheel installs next to the packages"),)
KEPT = ("pyre_extensions/tests",)  # the package imports it
# These lose debug information (268 MB); the exported symbols stay.
STRIPPED = ("triton/_C/libtriton.so",)


def remove(site: Path, patterns: Iterable[tuple[str, str]]) -> set[Path]:
    """Delete what the patterns match; returns every deleted file."""
    gone: set[Path] = set()
    for pattern, _ in patterns:
        kept = {site / name for name in KEPT}
        found = [path for path in site.glob(pattern.rstrip("/")) if path.is_dir() == pattern.endswith("/")]
        found = [path for path in found if path not in kept]
        if not found:
            sys.exit(f"slim.py: the pattern {pattern} matches nothing; delete it from the list")
        for path in found:
            files = path.rglob("*") if path.is_dir() else [path]
            gone.update(file for file in files if not file.is_dir())
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return gone


def strip(site: Path) -> set[Path]:
    """Remove debug information from STRIPPED; returns the files."""
    files = {site / name for name in STRIPPED}
    for file in files:
        subprocess.run(["strip", "--strip-unneeded", file], check=True)
    return files


def correct_records(site: Path, gone: set[Path], changed: set[Path]) -> None:
    """Rewrite each RECORD that names one of these files, so that tools that check or uninstall packages still work."""
    for record in site.glob("*.dist-info/RECORD"):
        with record.open(newline="") as file:
            rows = list(csv.reader(file))
        kept = [_row(site, row, changed) for row in rows if site / row[0] not in gone]
        if kept != rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(kept)
            record.write_text(text.getvalue())


def _row(site: Path, row: list[str], changed: set[Path]) -> list[str]:
    if (file := site / row[0]) not in changed:
        return row
    content = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return [row[0], f"sha256={digest}", str(len(content))]


if __name__ == "__main__":
    stage, folder = sys.argv[1], Path(sys.argv[2])
    patterns = {"locked": (*LOCKED, *OF_A_PROCESSOR[platform.machine()]), "built": BUILT}[stage]
    removed = remove(folder, patterns)
    correct_records(folder, removed, strip(folder) if stage == "locked" else set())
