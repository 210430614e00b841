"""`slipway import`: a model in any form → a NeMo checkpoint, Megatron-Bridge's, or Megatron's classic layout."""

from __future__ import annotations

from typing import Any, Literal

from slipway.checkpoint.classic import Options
from slipway.checkpoint.forecast import Forecast
from slipway.errors import UsageError
from slipway.options import check_group, given_of, take, with_options
from slipway.report import Summary


@with_options(Options)
def import_checkpoint(
    src: str,
    dst: str,
    *,
    format: Literal["nemo", "bridge", "classic"] = "nemo",
    config: str | None = None,
    adapter: str | None = None,
    mtp: bool = False,
    memory: str = "1GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Summary | Forecast:
    """Turn a Hugging Face model, or a Megatron checkpoint of any kind, into a NeMo checkpoint.

    Quantised models (FP8, MXFP4, MXFP8, NVFP4) are read directly, without a BF16 copy on disk. The checkpoint is not
    split for any number of GPUs: NeMo loads it with any parallel sizes. If the command is interrupted, run it again: it
    continues.

    --format classic writes Megatron's older layout, mp_rank_XX/model_optim_rng.pt, cut for a number of ranks: with
    MindSpeed-LLM's names for DeepSeek-V3, with Megatron-LM's for the other models. The last options below are for it.

    With --adapter the result is a checkpoint of low-rank adapters that compute what a `peft` adapter does; the
    checkpoint of their base is written to DST/base, unless SRC is one.

    Args:
        src: folder of the model, in BF16 or quantised, or hf://org/name[@revision]; or a checkpoint of NeMo,
            Megatron-Bridge, Megatron-LM or MindSpeed-LLM, a folder or nemo://name.
        dst: checkpoint to write, a folder or nemo://name.
        format: what to write: NeMo 2's checkpoint, Megatron-Bridge's, or Megatron's classic layout.
        config: config.json of the model, a file, its folder or hf://org/name, for a checkpoint that does not say which
            model it is. Tokenizer, templates, generation config and licence beside it go along.
        adapter: folder of a LoRA or DoRA adapter of `peft` for this model, or hf://org/name[@revision].
        mtp: keep the layers for multi-token prediction (DeepSeek V3 has one); without this flag they are left out.
        memory: memory for the tensors in work.
        device: what decodes; auto = every GPU there is, else the CPU.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate, peft_import
    from slipway.checkpoint.job import carry_out
    from slipway.checkpoint.opened import Given
    from slipway.checkpoint.quantization import devices
    from slipway.checkpoint.source import name_of
    from slipway.checkpoint.stream import Plan

    layout = take(Options, options)
    check_group(layout)
    if adapter is not None and (format != "nemo" or config or given_of(Options, options)):
        raise UsageError(
            "--adapter writes NeMo's checkpoint of adapters for a model that says itself what it is; leave out "
            "--format, --config and the options of the classic layout, or export the result and import that with them"
        )
    # The options are the output's if that is in the classic layout, else the source's.
    of_source = {} if format == "classic" else given_of(Options, options)
    said = Given(config=locate.config_file(config), layout=of_source)

    def plan() -> tuple[Plan, dict[str, Any]]:
        source = locate.folder(src)
        if adapter is None:
            target = layout if format == "classic" else Options()
            return convert.import_plan(source, mtp, devices(device), name_of(src), said, format, target)
        given = locate.folder(adapter)
        return peft_import.plan(source, given, locate.output(dst), name_of(src), mtp, devices(device))

    return carry_out("import", dst, memory, plan, overwrite=overwrite, dry_run=dry_run)
