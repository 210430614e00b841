"""Where the time of a step goes on a GPU, and what the GPU can do at best."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.distributed import ReduceOp, all_reduce

FILE = "profile.json"
# What a kernel does, by its name; the first that matches counts.
KINDS = {
    "communication": r"nccl|barrier_kernel",  # waiting for others too
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "moving tokens": r"permute|spread|collect|sort|index|gather|scatter|topk|memcpy|memset|_count|cumsum",
    "normalising": r"norm",
}
LARGEST = 8  # kernels that are listed
SIDE, TIMES = 8192, 20  # of the product that shows what the GPU can do


class Profile(Callback):
    """On rank 0: profiles the last step, which its record is to leave out, and writes FILE into a folder.

    The memory in it is that of the rank that takes most.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self._profile: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self.steps - 1 or not torch.cuda.is_available():
            return
        peak = torch.tensor(torch.cuda.max_memory_allocated(), device="cuda")
        all_reduce(peak, ReduceOp.MAX)
        if trainer.is_global_zero:
            self._memory = int(peak)
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            torch.cuda.synchronize()
            self._profile.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self._profile is None:
            return
        torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        found = {**summary(events_of(self._profile, DeviceType.CUDA)), "peak": self._memory}
        self._profile = None
        found |= {"gpu": torch.cuda.get_device_name(), "reachable_tflops": round(reachable_tflops(), 1)}
        (self.folder / FILE).write_text(json.dumps(found))


def events_of(profile: torch.profiler.profile, device: DeviceType) -> list[tuple[str, float, float]]:
    """Name, beginning and end in µs of all that ran on a kind of device.

    `profile.events()` has the same, but first puts all events into a tree. Of a step of many micro batches these are
    millions, for which it takes minutes.
    """
    recorded = profile.profiler.kineto_results.events()
    return [(e.name(), e.start_ns() / 1e3, e.end_ns() / 1e3) for e in recorded if e.device_type() == device]


def summary(kernels: list[tuple[str, float, float]]) -> dict[str, Any]:
    """What a profile comes to.

    Args:
        kernels: name, beginning and end in µs.

    Returns: busy, the part of the time between the first beginning and the last end in which any kernel runs; launches;
    kinds, the part of the kernels' time by kind; largest, [name, part, launches] of those that take most.
    """
    if not kernels:
        return {"busy": 0.0, "launches": 0, "kinds": {}, "largest": []}
    of_name: dict[str, list[float]] = {}
    busy, reached = 0.0, min(start for _, start, _ in kernels)
    first = reached
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        of_name.setdefault(name, []).append(end - start)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = sum(map(sum, of_name.values())) or 1.0
    kinds: dict[str, float] = {}
    for name, times in of_name.items():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), "others")
        kinds[kind] = kinds.get(kind, 0.0) + sum(times) / total
    largest = sorted(of_name.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    return {
        "busy": round(busy / max(reached - first, 1e-9), 4),
        "launches": len(kernels),
        "kinds": {kind: round(part, 4) for kind, part in sorted(kinds.items(), key=lambda item: -item[1])},
        "largest": [[name[:100], round(sum(times) / total, 4), len(times)] for name, times in largest],
    }


def reachable_tflops() -> float:
    """TFLOP/s of a large product in BF16 on this GPU, random values: what a model can come near to."""
    first, second = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(TIMES + 3):
        if number == 3:
            start.record()
        first @ second
    end.record()
    torch.cuda.synchronize()
    return 2 * SIDE**3 * TIMES / start.elapsed_time(end) / 1e9
