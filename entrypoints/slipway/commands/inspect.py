"""`slipway inspect`: what a checkpoint is, and whether it is whole."""

from __future__ import annotations

from typing import Any

from slipway.checkpoint.classic import Options
from slipway.checkpoint.contents import Contents
from slipway.options import check_group, given_of, take, with_options


@with_options(Options)
def inspect(path: str, *, config: str | None = None, **options: Any) -> Contents:
    """Tell what a checkpoint is and whether it is whole.

    Prints format, model, parameters, dtypes, size, quantisation, and which tensors or files are missing or surplus
    against config.json: of a Hugging Face model; a checkpoint of NeMo, Megatron-Bridge, Megatron-LM or MindSpeed-LLM,
    with its layout and what made it; extracted heads, or a model merged with them. Reads headers and metadata only, so
    that terabytes take seconds. Exit code 65 where something is missing, surplus or of another shape.

    Args:
        path: a checkpoint of any kind: a folder, a .safetensors file, hf://org/name[@revision] or nemo://name.
        config: config.json of the model, for a Megatron checkpoint that does not say which model it is.
    """
    from slipway.checkpoint import inspection, locate
    from slipway.checkpoint.opened import Given

    check_group(take(Options, options))
    given = Given(config=locate.config_file(config), layout=given_of(Options, options))
    return inspection.contents_of(locate.locate(path), given)
