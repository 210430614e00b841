"""How fast a NeMo checkpoint's tensors are read into memory or onto a GPU: by torch alone, and as `train` does it.

python -m benchmarks.loading CHECKPOINT [--repeats 3]

Both read the same files in turns, into tensors that are there already, and the bits are compared. Each first time is
left out: it brings the files into the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from slipway.checkpoint.torch_dist import weights_folder
from slipway.report import human_bytes

from benchmarks.common import print_table

PIECE = 1 << 30  # bytes that are compared at once: the checkpoint is in memory twice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    import torch
    import torch.distributed.checkpoint as dcp
    from slipway.training import loading

    folder = weights_folder(options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: {
            key: torch.zeros(entry.size, dtype=entry.properties.dtype, device=device)
            for key, entry in entries.items()
            if hasattr(entry, "chunks")
        }
        for name in ("torch", "slipway")
    }

    class Threaded(dcp.FileSystemReader):
        read_data = loading.reading_in_threads(dcp.FileSystemReader.read_data)

    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats + 1):
        for name, reader in (("torch", dcp.FileSystemReader), ("slipway", Threaded)):
            begun = time.monotonic()
            dcp.load(found[name], storage_reader=reader(folder), no_dist=True)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.monotonic() - begun)
    size = sum(tensor.nbytes for tensor in found["torch"].values())
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    print(f"{human_bytes(size)} onto {where}, {loading.width()} threads, the median of {options.repeats}")
    rows = [[name, f"{taken:.2f} s", f"{human_bytes(size / taken)}/s"] for name, taken in medians.items()]
    print_table(["", "seconds", "rate"], rows)
    print(f"{medians['torch'] / medians['slipway']:.2f} times as fast")
    for key, tensor in found["torch"].items():
        both = (one.reshape(-1).view(torch.uint8).split(PIECE) for one in (tensor, found["slipway"][key]))
        if not all(torch.equal(one, other) for one, other in zip(*both, strict=True)):
            sys.exit(f"{key} differs")


if __name__ == "__main__":
    main()
