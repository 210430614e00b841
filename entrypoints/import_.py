"""`slipway import`: a Hugging Face model, BF16 or quantised, → a NeMo checkpoint."""

from __future__ import annotations

import time
from typing import Literal

from entrypoints.checkpoint.forecast import Forecast, forecast
from entrypoints.report import Summary


def import_(
    src: str,
    dst: str,
    *,
    mtp: bool = False,
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dry_run: bool = False,
) -> Summary | Forecast:
    """Turn a Hugging Face model into a NeMo checkpoint.

    MXFP4 and FP8 are read straight, without a BF16 copy on disk. The checkpoint holds no parallelism: NeMo loads it
    with any. A run that was ended goes on when the same command is given again.

    Args:
        src: folder of the model, BF16, FP8 or MXFP4, or hf://org/name[@revision].
        dst: NeMo checkpoint to write, a folder or nemo://name.
        mtp: keep the layers for multi-token prediction (DeepSeek V3 has one), which are left out otherwise.
        memory: bytes that tensors at work may take.
        device: what decodes; auto = every GPU there is, else the CPU.
        dry_run: plan, measure on a small sample, and tell bytes, files and time; nothing is written.
    """
    from entrypoints.checkpoint import convert, locate, quantization, stream

    started, out = time.monotonic(), locate.output(dst)
    budget = stream.parse_size(memory, "--memory")
    stream.refuse_existing(out)
    plan, tensors = convert.import_plan(locate.folder(src), mtp, quantization.devices(device))
    if dry_run:
        return forecast(plan, out, "import", budget, started)
    stream.run(plan, out, "import", budget)
    return Summary("import", str(out), plan.bytes, time.monotonic() - started, {"tensors": len(tensors)})
