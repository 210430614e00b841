"""`slipway merge-heads`: trained heads and their base as one model."""

from __future__ import annotations

from slipway.report import Summary


def merge_heads(
    heads: str, base: str, out: str, *, shard_size: str = "5GB", memory: str = "1GB", overwrite: bool = False
) -> Summary:
    """Join extracted heads and their Hugging Face base into one model, streamed.

    Args:
        heads: folder that `extract-heads` wrote.
        base: folder of the base model in BF16, or hf://org/name[@revision].
        out: folder to write.
        shard_size: largest safetensors file.
        memory: memory for the tensors in work.
        overwrite: replace what is at the output, once the new one is whole.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.source import name_of
    from slipway.checkpoint.stream import existing_folder, parse_size

    limit = parse_size(shard_size, "--shard-size")
    return carry_out(
        "merge-heads",
        out,
        memory,
        lambda: convert.merge_plan(existing_folder(heads), locate.folder(base), limit, name_of(base)),
        overwrite=overwrite,
    )
