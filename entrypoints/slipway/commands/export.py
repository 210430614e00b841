"""`slipway export`: a NeMo checkpoint → a Hugging Face model."""

from __future__ import annotations

from slipway.checkpoint.forecast import Forecast
from slipway.report import Summary


def export(
    ckpt: str,
    out: str,
    *,
    adapter: bool = False,
    base: str | None = None,
    shard_size: str = "5GB",
    memory: str = "1GB",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Summary | Forecast:
    """Turn a NeMo checkpoint, saved by any number of ranks, into a Hugging Face model in BF16.

    Low-rank adapters are merged into their base. With --adapter they become an adapter that `peft` loads.

    Args:
        ckpt: NeMo checkpoint, a folder or nemo://name, that `import` made, or that training wrote from one.
        out: folder to write.
        adapter: write the low-rank adapters alone, in the form of `peft`.
        base: NeMo checkpoint of the adapters' base, if it has moved since the training.
        shard_size: largest safetensors file.
        memory: memory for the tensors in work.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.stream import parse_size

    limit = parse_size(shard_size, "--shard-size")
    source, below = locate.nemo_folder(ckpt), locate.nemo_folder(base) if base else None
    return carry_out(
        "export",
        out,
        memory,
        lambda: convert.adapter_plan(source, below) if adapter else convert.export_plan(source, limit, below),
        overwrite=overwrite,
        dry_run=dry_run,
    )
