"""`slipway import`: a Hugging Face model, BF16 or quantised, → a NeMo checkpoint."""

from __future__ import annotations

from typing import Any, Literal

from slipway.checkpoint.forecast import Forecast
from slipway.report import Summary


def import_checkpoint(
    src: str,
    dst: str,
    *,
    adapter: str | None = None,
    mtp: bool = False,
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary | Forecast:
    """Turn a Hugging Face model into a NeMo checkpoint.

    Quantised models (FP8, MXFP4, MXFP8, NVFP4) are read directly, without a BF16 copy on disk. The checkpoint is not
    split for any number of GPUs: NeMo loads it with any parallel sizes. If the command is interrupted, run it again: it
    continues.

    With --adapter the result is a checkpoint of low-rank adapters that compute what a `peft` adapter does; the
    checkpoint of their base is written to DST/base, unless SRC is one.

    Args:
        src: folder of the model, in BF16 or quantised, or hf://org/name[@revision]; with --adapter also its NeMo
            checkpoint, a folder or nemo://name.
        dst: NeMo checkpoint to write, a folder or nemo://name.
        adapter: folder of a LoRA or DoRA adapter of `peft` for this model, or hf://org/name[@revision].
        mtp: keep the layers for multi-token prediction (DeepSeek V3 has one); without this flag they are left out.
        memory: memory for the tensors in work.
        device: what decodes; auto = every GPU there is, else the CPU.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate, peft_import
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.quantization import devices
    from slipway.checkpoint.source import name_of
    from slipway.checkpoint.stream import Plan

    def plan() -> tuple[Plan, dict[str, Any]]:
        source = locate.folder(src)
        if adapter is None:
            return convert.import_plan(source, mtp, devices(device), name_of(src))
        given = locate.folder(adapter)
        return peft_import.plan(source, given, locate.output(dst), name_of(src), mtp, devices(device))

    return carry_out("import", dst, memory, plan, overwrite=overwrite, dry_run=dry_run)
