"""Megatron's classic layout: import and export against plainly reading and writing the same bytes, and their memory.

Each copy of a tensor that ranks have counts as written, and as read. Both sides read files that are in the page cache
and end with their output on disk.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

from slipway.report import human_bytes

from benchmarks.common import arguments, interpreter, make_model, print_table, scratch, slipway, verdict
from benchmarks.throughput import copy_files, warm

SHARE = 0.7  # of the plain copy's rate
GROWTH = 1.10  # of the peak memory, over the sizes of the model
# Name → tensor, pipeline and expert parallel size.
LAYOUTS = {"one rank": (1, 1, 1), "TP2 PP2 EP4": (2, 2, 4)}


def main() -> None:
    parser = arguments(__doc__, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; the medians count")
    parser.add_argument("--timed", type=float, default=4.0, help="size at which both are timed, in GB")
    options = parser.parse_args()
    times, peaks, lines = [], {}, []
    with scratch(options.scratch, 6 * max(options.gigabytes)) as folder:
        for gigabytes in sorted(options.gigabytes):
            make_model(folder / "hf", options, gigabytes)
            for layout, sizes in LAYOUTS.items():
                repeats = options.repeats if gigabytes == options.timed else 1
                runs = [both(folder, flags(folder / "hf", sizes)) for _ in range(repeats)]
                for command in ("import", "export"):
                    found = [run[command] for run in runs]
                    peaks.setdefault((layout, command), []).append(max(ours.peak for ours, _, _ in found))
                    if gigabytes != options.timed:
                        continue
                    seconds = statistics.median(ours.seconds for ours, _, _ in found)
                    limit = statistics.median(plain for _, plain, _ in found)
                    ratio = limit / seconds
                    moved = human_bytes(found[0][2])
                    times.append([layout, command, moved, f"{seconds:.2f}", f"{limit:.2f}", f"{ratio:.2f}"])
                    said = f"{layout}, {command}: {ratio:.2f} of the plain rate (≥ {SHARE})"
                    lines.append(verdict(said, ratio >= SHARE))
            shutil.rmtree(folder / "hf")
    print(f"{options.model} in {options.format}, {options.timed:g} GB, experts in one tensor")
    print_table(["", "", "read + written", "ours, s", "plain, s", "ratio"], times)
    print("\n".join(lines))
    print(f"peak memory; Python alone {human_bytes(interpreter().peak)}")
    head = [f"{gigabytes:g} GB" for gigabytes in sorted(options.gigabytes)]
    print_table(["", "", *head], [[*key, *map(human_bytes, found)] for key, found in peaks.items()])
    for (layout, command), found in peaks.items():
        growth = max(found) / min(found)
        print(verdict(f"{layout}, {command}: largest / smallest = {growth:.3f} (≤ {GROWTH})", growth <= GROWTH))


def flags(model: Path, sizes: tuple[int, int, int]) -> list[str]:
    """The options of a layout; the layers are shared as evenly as they can be."""
    tensor, stages, experts = sizes
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    counts = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    words = [f"--tensor-parallel-size={tensor}", f"--pipeline-parallel-size={stages}", "--moe-grouped-gemm"]
    words += [f"--expert-parallel-size={experts}"]
    return words + ([f"--num-layer-list={','.join(map(str, counts))}"] if stages > 1 else [])


def both(folder: Path, words: list[str]) -> dict[str, tuple]:
    """Command → (what ours took, seconds of the plain copy, bytes read and written), one after the other."""
    found = {}
    for command, source, target, flags in (
        ("import", folder / "hf", folder / "classic", ["--format=classic", *words]),
        ("export", folder / "classic", folder / "back", []),
    ):
        warm(source)
        ours = slipway(command, source, target, *flags)
        read, written = (sum(map(size_of_file, files_of(path))) for path in (source, target))
        if command == "export":
            shutil.rmtree(target)
        warm(source)
        plain = copy_files(files_of(source), folder / "plain", written)
        (folder / "plain").unlink()
        found[command] = ours, plain, read + written
    shutil.rmtree(folder / "classic")
    return found


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def size_of_file(file: Path) -> int:
    return file.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
