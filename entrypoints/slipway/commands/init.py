"""`slipway init`: a NeMo checkpoint with random weights, to pretrain from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slipway.checkpoint.forecast import Forecast
from slipway.options import option, take, with_options
from slipway.report import Summary


@dataclass(frozen=True)
class Beginning:
    """What the weights begin with."""

    set: list[str] | None = option(
        None, "FIELD=VALUE for a field of config.json, such as num_hidden_layers=12; can be given more than once"
    )
    seed: int = option(1234, "seed of the weights", low=0, high=2**63 - 1)


@with_options(Beginning)
def init(
    config: str, out: str, *, memory: str = "1GB", overwrite: bool = False, dry_run: bool = False, **options: Any
) -> Summary | Forecast:
    """Write a NeMo checkpoint with random weights, to pretrain from nothing.

    Matrices are drawn from a normal distribution with config.json's initializer_range, norms are 1 and biases 0, as
    transformers begins. The same seed gives the same weights. The tokenizer beside config.json goes along.

    Args:
        config: folder of a Hugging Face model, or hf://org/name[@revision]; its weights are not read.
        out: NeMo checkpoint to write, a folder or nemo://name.
        memory: memory for the tensors in work.
        overwrite: replace what is at the output, once the new one is whole.
        dry_run: plan, convert a small sample in memory, and print bytes, files and time; write nothing.
    """
    from slipway.checkpoint import convert, locate
    from slipway.checkpoint.job import carry_out

    begin = take(Beginning, options)
    return carry_out(
        "init",
        out,
        memory,
        lambda: convert.init_plan(locate.configuration(config), begin.set or [], begin.seed),
        overwrite=overwrite,
        dry_run=dry_run,
    )
