"""`slipway dequant`: a quantised Hugging Face model → its BF16 form."""

from __future__ import annotations

from typing import Literal

from slipway.checkpoint.forecast import Forecast
from slipway.report import Summary


def dequant(
    src: str,
    dst: str,
    *,
    shard_size: str = "5GB",
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary | Forecast:
    """Write the BF16 form of a quantised (FP8, MXFP8, MXFP4 or NVFP4) Hugging Face model.

    Every other file of the model is kept, of one from the hub tokenizer, templates, code, licence and README.
    config.json loses its quantization_config. If the command is interrupted, run it again: it continues.

    Args:
        src: folder of the model, or hf://org/name[@revision].
        dst: folder to write.
        shard_size: largest safetensors file.
        memory: memory for the tensors in work.
        device: what decodes; auto = every GPU there is, else the CPU.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.quantization import devices
    from slipway.checkpoint.stream import parse_size

    limit = parse_size(shard_size, "--shard-size")
    return carry_out(
        "dequant",
        dst,
        memory,
        lambda: convert.dequant_plan(locate.folder(src), limit, devices(device)),
        overwrite=overwrite,
        dry_run=dry_run,
    )
