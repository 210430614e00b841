"""extract-heads from a large checkpoint: time and memory above what Python takes by itself.

The checkpoint is sparse: every tensor has its place, but only the heads' bytes are there, as nothing else is read.
Beside it, what reading the whole checkpoint once takes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from slipway.report import human_bytes

from benchmarks.common import arguments, interpreter, measure, print_table, scratch, size_of, slipway, verdict

SECONDS, MEMORY = 1.0, 300e6
REPEATS = 5  # the median counts


def main() -> None:
    parser = arguments(__doc__, default=4.0)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="make the checkpoint, nothing else")
    options = parser.parse_args()
    if options.make:
        return make(options.make, options.model, options.gigabytes)
    with scratch(options.scratch, 0.1) as folder:
        measure("-m", "benchmarks.extract_heads", "--make", folder / "ckpt", "--model", options.model,
                "--gigabytes", options.gigabytes)  # fmt: skip
        size = size_of(folder / "ckpt")
        start = sorted(interpreter() for _ in range(REPEATS))[REPEATS // 2]
        runs = sorted(slipway("extract-heads", folder / "ckpt", folder / f"heads{n}") for n in range(REPEATS))
        ours = runs[REPEATS // 2]
        whole = read_all(folder / "ckpt")
        written = size_of(folder / "heads0")
    seconds, memory = ours.seconds, ours.peak - start.peak
    print(f"{options.model}, checkpoint of {human_bytes(size)}, heads of {human_bytes(written)}")
    rows = [
        ["extract-heads", f"{ours.seconds:.2f}", human_bytes(ours.peak)],
        ["Python alone", f"{start.seconds:.2f}", human_bytes(start.peak)],
        ["difference", f"{ours.seconds - start.seconds:.2f}", human_bytes(memory)],
        ["reading everything", f"{whole:.2f}", ""],
    ]
    print_table(["", "seconds", "peak memory"], rows)
    print(verdict(f"{seconds:.2f} s, the interpreter's start included (< {SECONDS:g} s)", seconds < SECONDS))
    print(verdict(f"{human_bytes(memory)} above the interpreter (< {human_bytes(MEMORY)})", memory < MEMORY))


def read_all(folder: Path) -> float:
    """Seconds of reading every byte."""
    started = time.monotonic()
    for file in folder.rglob("*.distcp"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(16 << 20):
                pass
    return time.monotonic() - started


def make(folder: Path, family: str, gigabytes: float) -> None:
    """A checkpoint of heads training with the base and the heads in it."""
    import os

    from slipway.checkpoint import archive, torch_dist
    from slipway.checkpoint.heads import ADAPTER
    from slipway.families import FAMILIES
    from slipway.tensors.bits import from_torch
    from slipway.tensors.refs import Ref, TensorInfo
    from slipway.training.heads import DecodingHeads

    from benchmarks.synthetic import config_of

    config = config_of(family, gigabytes)
    heads = {
        ADAPTER + name: part.bfloat16() for name, part in DecodingHeads(config["hidden_size"]).state_dict().items()
    }
    model = FAMILIES[family].rules(config)
    chunks = [ref for cell in model.cells for ref in cell.megatron] + [Ref(key) for key in heads]
    infos = model.megatron | {key: TensorInfo(tuple(t.shape)) for key, t in heads.items()}
    layout = torch_dist.Layout(infos, chunks, [])
    weights = folder / "weights"
    weights.mkdir(parents=True)
    for name, size in layout.sizes.items():
        (weights / name).touch()
        os.truncate(weights / name, size)
    for key, part in heads.items():
        name, offset, _ = layout.places[Ref(key)]
        with (weights / name).open("r+b") as file:
            file.seek(offset)
            file.writelines(archive.write(from_torch(part), "BF16"))
    (weights / ".metadata").write_bytes(layout.metadata())


if __name__ == "__main__":
    sys.exit(main())
