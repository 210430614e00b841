"""`slipway export`: a Megatron checkpoint of any kind → a Hugging Face model."""

from __future__ import annotations

from typing import Any

from slipway.checkpoint.classic import Options
from slipway.checkpoint.forecast import Forecast
from slipway.options import check_group, given_of, take, with_options
from slipway.report import Summary


@with_options(Options)
def export(
    ckpt: str,
    out: str,
    *,
    adapter: bool = False,
    base: str | None = None,
    config: str | None = None,
    lora_alpha: float | None = None,
    lora_r: int | None = None,
    shard_size: str = "5GB",
    memory: str = "1GB",
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Summary | Forecast:
    """Turn a checkpoint of NeMo, Megatron-Bridge, Megatron-LM or MindSpeed-LLM into a Hugging Face model in BF16.

    Any number of ranks may have saved it, in torch_dist or in Megatron's classic layout (mp_rank_XX). Which model it is
    and how it is cut stands in most checkpoints. Where it does not, give --config, and the last options below.

    Low-rank adapters are merged into their base. With --adapter they become an adapter that `peft` loads.

    Args:
        ckpt: the checkpoint, a folder or nemo://name.
        out: folder to write.
        adapter: write the low-rank adapters alone, in the form of `peft`.
        base: NeMo checkpoint of the adapters' base, if it has moved since the training.
        config: config.json of the model, a file, its folder or hf://org/name, for a checkpoint that does not say which
            model it is. Tokenizer, templates, generation config and licence beside it go along.
        lora_alpha: alpha of low-rank adapters, for a checkpoint that does not say it; else it is compared.
        lora_r: rank of low-rank adapters; it is compared with what is stored.
        shard_size: largest safetensors file.
        memory: memory for the tensors in work.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.opened import Given
    from slipway.checkpoint.stream import parse_size

    limit = parse_size(shard_size, "--shard-size")
    check_group(take(Options, options))
    source, below = locate.nemo_folder(ckpt), locate.nemo_folder(base) if base else None
    given = Given(locate.config_file(config), below, given_of(Options, options), lora_r, lora_alpha)
    return carry_out(
        "export",
        out,
        memory,
        lambda: convert.adapter_plan(source, given) if adapter else convert.export_plan(source, limit, given),
        overwrite=overwrite,
        dry_run=dry_run,
    )
