"""dequant and import against plainly reading and writing the same bytes, and the decoders against copying.

Both sides read files that are in the page cache and end with their output on disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from slipway.report import human_bytes

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

SHARE = 0.7  # of the plain copy's rate
DECODED = 1e9  # bytes of output per second and core
BLOCK = 16 << 20


def main() -> None:
    parser = arguments(__doc__, default=4.0)
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="runs of each, in turn; median and quickest count",
    )
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
                         f"{min(ours):.2f}", f"{min(plain):.2f}", f"{min(plain) / min(ours):.2f}"])  # fmt: skip
            lines.append(
                verdict(f"{command}: {limit / seconds:.2f} of the plain rate (≥ {SHARE})", limit / seconds >= SHARE)
            )
    print(f"{options.model} in {options.format}, {options.gigabytes:g} GB; Python starts in {start:.2f} s")
    head = ["", "read + written", "ours, s", "plain, s", "ratio", "quickest", "plain's", "ratio"]
    print_table(head, rows)
    print("\n".join(lines), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.throughput", "--decoders"])


def warm(folder: Path) -> None:
    """Brings every file into the page cache, and what was written before onto the disk."""
    os.sync()
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        with file.open("rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass


def copy_plainly(source: Path, target: Path, count: int) -> float:
    """Seconds of reading every file of a folder and writing `count` bytes, up to the fsync."""
    return copy_files(sorted(source.iterdir()), target, count)


def copy_files(files: Iterable[Path], target: Path, count: int) -> float:
    """Seconds of reading the files and writing `count` bytes in large blocks, up to the fsync."""
    block = bytearray(BLOCK)
    started = time.monotonic()
    for file in files:
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
    import numpy as np
    from slipway.checkpoint.quantization import (
        decode_fp8_block,
        decode_mxfp4,
        decode_mxfp8,
        decode_nvfp4,
        nvfp4_scales,
    )
    from slipway.tensors import bits

    rows = columns = 2880
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows, columns // 32, 16), np.uint8)
    scales = random.integers(119, 127, (rows, columns // 32), np.uint8)
    weight = random.integers(0, 127, (rows, columns), np.uint8)
    of_16 = random.integers(0, 127, (rows, columns // 16), np.uint8)
    scale = random.random((-(-rows // 128), -(-columns // 128)), np.float32)
    result = random.integers(0, 1 << 16, (rows, columns), np.uint16)

    def rate(work: Callable[[], object]) -> float:
        """Bytes per second of the quickest run, in memory that is used again, as in the commands."""

        def once() -> float:
            with bits.piece():
                started = time.perf_counter()
                work()
                return time.perf_counter() - started

        return result.nbytes / min(once() for _ in range(20))

    def copy() -> None:
        bits.empty(result.shape, result.dtype)[...] = result

    copied = rate(copy)
    found = {
        "MXFP4": rate(lambda: decode_mxfp4(blocks, scales)),
        "NVFP4": rate(
            lambda: decode_nvfp4(blocks.reshape(rows, -1), of_16, nvfp4_scales(np.float32([0.1]), divide=False))
        ),
        "MXFP8": rate(lambda: decode_mxfp8(weight, scales)),
        "FP8 block": rate(lambda: decode_fp8_block(weight, scale, (128, 128))),
    }
    print()
    table = [
        [name, human_bytes(each) + "/s", human_bytes(copied) + "/s", f"{each / copied:.2f}"]
        for name, each in found.items()
    ]
    print_table(["decoder, one core", "ours", "copy", "ratio"], table)
    for name, each in found.items():
        reached = f"{name}: {human_bytes(each)}/s of BF16 on one core (≥ {human_bytes(DECODED)}/s)"
        print(verdict(reached, each >= DECODED))


if __name__ == "__main__":
    sys.exit(main())
