"""`slipway dequant`: a quantised Hugging Face model → its BF16 form."""

from __future__ import annotations

import time
from typing import Literal

from entrypoints.checkpoint.forecast import Forecast, forecast
from entrypoints.report import Summary


def dequant(
    src: str,
    dst: str,
    *,
    shard_size: str = "5GB",
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dry_run: bool = False,
) -> Summary | Forecast:
    """Write the BF16 form of a quantised (MXFP4 or FP8) Hugging Face model.

    Every other file of the model is kept, config.json without quantization_config. A run that was ended goes on
    when the same command is given again.

    Args:
        src: folder of the model, or hf://org/name[@revision].
        dst: folder to write.
        shard_size: most bytes in one safetensors file.
        memory: bytes that tensors at work may take.
        device: what decodes; auto = every GPU there is, else the CPU.
        dry_run: plan, measure on a small sample, and tell bytes, files and time; nothing is written.
    """
    from entrypoints.checkpoint import convert, locate, quantization, stream

    started, out = time.monotonic(), locate.output(dst)
    limit, budget = stream.parse_size(shard_size, "--shard-size"), stream.parse_size(memory, "--memory")
    stream.refuse_existing(out)
    plan, decoded = convert.dequant_plan(locate.folder(src), limit, quantization.devices(device))
    if dry_run:
        return forecast(plan, out, "dequant", budget, started)
    stream.run(plan, out, "dequant", budget)
    details = {"files": len(plan.sizes), "decoded_tensors": decoded}
    return Summary("dequant", str(out), plan.bytes, time.monotonic() - started, details)
