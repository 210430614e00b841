"""dequant and import against plainly reading and writing the same bytes, and the decoders against copying.

Both sides read files that are in the page cache and end with their output on disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import (
    arguments,
    interpreter,
    make_model,
    print_table,
    scratch,
    size_of,
    slipway,
    verdict,
)
from entrypoints.report import human_bytes

SHARE = 0.7  # of the plain copy's rate
DECODED = 1e9  # bytes of output per second and core
BLOCK = 16 << 20


def main() -> None:
    parser = arguments(__doc__, default=4.0)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, interleaved; the median counts")
    parser.add_argument("--decoders", action="store_true", help="measure the decoders in this process, nothing else")
    options = parser.parse_args()
    if options.decoders:
        return decoders()
    start = statistics.median(interpreter().seconds for _ in range(options.repeats))
    rows, lines = [], []
    with scratch(options.scratch, 2.5 * options.gigabytes) as folder:
        make_model(folder / "hf", options, options.gigabytes)
        source = size_of(folder / "hf")
        for command in ("dequant", "import"):
            ours, plain = [], []
            for _ in range(options.repeats):
                warm(folder / "hf")
                ours.append(slipway(command, folder / "hf", folder / "out").seconds)
                written = size_of(folder / "out")
                shutil.rmtree(folder / "out")
                warm(folder / "hf")
                plain.append(copy_plainly(folder / "hf", folder / "plain", written))
                (folder / "plain").unlink()
            seconds, limit = statistics.median(ours), statistics.median(plain)
            moved = source + written
            rows.append([command, human_bytes(moved), f"{seconds:.2f}", f"{limit:.2f}", f"{limit / seconds:.2f}",
                         f"{limit / (seconds - start):.2f}"])  # fmt: skip
            lines.append(
                verdict(f"{command}: {limit / seconds:.2f} of the plain rate (≥ {SHARE})", limit / seconds >= SHARE)
            )
    print(f"{options.model} in {options.format}, {options.gigabytes:g} GB; Python and torch start in {start:.2f} s")
    print_table(["", "read + written", "ours, s", "plain, s", "ratio", "without the start"], rows)
    print("\n".join(lines), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.throughput", "--decoders"])


def warm(folder: Path) -> None:
    """Brings every file into the page cache, and what was written before onto the disk."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass


def copy_plainly(source: Path, target: Path, count: int) -> float:
    """Seconds of reading every file and writing `count` bytes in large blocks, up to the fsync."""
    block = bytearray(BLOCK)
    started = time.monotonic()
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    with target.open("wb", buffering=0) as stream:
        os.posix_fallocate(stream.fileno(), 0, count)
        for start in range(0, count, BLOCK):
            stream.write(memoryview(block)[: count - start])
        os.fsync(stream.fileno())
    return time.monotonic() - started


def decoders() -> None:
    """Each decoder on one core, by the bytes that it gives out, beside a copy of those bytes."""
    import torch

    from entrypoints.checkpoint.quantization import decode_fp8_block, decode_mxfp4

    torch.set_num_threads(1)
    rows = columns = 2880
    blocks = torch.randint(0, 256, (rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(119, 127, (rows, columns // 32), dtype=torch.uint8)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128))
    result = torch.randn(rows, columns).bfloat16()
    size = result.nbytes
    copied = size / best_seconds(lambda: result.clone())
    found = {
        "MXFP4": size / best_seconds(lambda: decode_mxfp4(blocks, scales)),
        "FP8 block": size / best_seconds(lambda: decode_fp8_block(weight, scale, (128, 128))),
    }
    print()
    table = [
        [name, human_bytes(rate) + "/s", human_bytes(copied) + "/s", f"{rate / copied:.2f}"]
        for name, rate in found.items()
    ]
    print_table(["decoder, one core", "ours", "copy", "ratio"], table)
    for name, rate in found.items():
        print(
            verdict(f"{name}: {human_bytes(rate)}/s of BF16 on one core (≥ {human_bytes(DECODED)}/s)", rate >= DECODED)
        )


def best_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The shortest of many runs: what the work takes when nothing else runs."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(repeats))


if __name__ == "__main__":
    sys.exit(main())
