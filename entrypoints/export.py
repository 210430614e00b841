"""`slipway export`: a NeMo checkpoint → a Hugging Face model."""

from __future__ import annotations

import time

from entrypoints.checkpoint.forecast import Forecast, forecast
from entrypoints.report import Summary


def export(
    ckpt: str,
    out: str,
    *,
    adapter: bool = False,
    base: str | None = None,
    shard_size: str = "5GB",
    memory: str = "1GB",
    dry_run: bool = False,
) -> Summary | Forecast:
    """Turn a NeMo checkpoint, saved by any number of ranks, into a Hugging Face model in BF16.

    Low-rank adapters are merged into their base, or with --adapter become an adapter that `peft` loads.

    Args:
        ckpt: NeMo checkpoint, a folder or nemo://name, that `import` made, or that training wrote from one.
        out: folder to write.
        adapter: write the low-rank adapters alone, in the form of `peft`.
        base: NeMo checkpoint of the adapters' base, where it is no longer where it was in training.
        shard_size: most bytes in one safetensors file.
        memory: bytes that tensors at work may take.
        dry_run: plan, measure on a small sample, and tell bytes, files and time; nothing is written.
    """
    from entrypoints.checkpoint import convert, locate, stream

    started, target = time.monotonic(), locate.output(out)
    limit, budget = stream.parse_size(shard_size, "--shard-size"), stream.parse_size(memory, "--memory")
    stream.refuse_existing(target)
    source, below = locate.nemo_folder(ckpt), locate.nemo_folder(base) if base else None
    plan = convert.adapter_plan(source, below) if adapter else convert.export_plan(source, limit, below)
    if dry_run:
        return forecast(plan, target, "export", budget, started)
    stream.run(plan, target, "export", budget)
    return Summary(
        "export", str(target), plan.bytes, time.monotonic() - started, {"files": len(plan.sizes) or len(plan.small)}
    )
