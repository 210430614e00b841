"""`slipway import`: a Hugging Face model, BF16 or quantised, → a NeMo checkpoint."""

from __future__ import annotations

from typing import Literal

from slipway.checkpoint.forecast import Forecast
from slipway.report import Summary


def import_checkpoint(
    src: str,
    dst: str,
    *,
    mtp: bool = False,
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dry_run: bool = False,
) -> Summary | Forecast:
    """Turn a Hugging Face model into a NeMo checkpoint.

    MXFP4 and FP8 are read directly, without a BF16 copy on disk. The checkpoint is not split for any number of GPUs:
    NeMo loads it with any parallel sizes. If the command is interrupted, run it again: it continues.

    Args:
        src: folder of the model, BF16, FP8 or MXFP4, or hf://org/name[@revision].
        dst: NeMo checkpoint to write, a folder or nemo://name.
        mtp: keep the layers for multi-token prediction (DeepSeek V3 has one); without this flag they are left out.
        memory: memory for the tensors in work.
        device: what decodes; auto = every GPU there is, else the CPU.
        dry_run: plan, measure on a small sample, and print bytes, files and time; nothing is written.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.quantization import devices

    return carry_out(
        "import",
        dst,
        memory,
        lambda: convert.import_plan(locate.folder(src), mtp, devices(device)),
        dry_run=dry_run,
    )
