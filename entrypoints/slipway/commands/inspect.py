"""`slipway inspect`: what a checkpoint is, and whether it is whole."""

from __future__ import annotations

from slipway.checkpoint.contents import Contents


def inspect(path: str) -> Contents:
    """Tell what a checkpoint is and whether it is whole.

    Prints format, model, parameters, dtypes, size, quantisation, and which tensors or files are missing or surplus
    against config.json: of a Hugging Face model, a NeMo or training checkpoint, torch_dist weights, extracted heads,
    or a model merged with them. Reads headers and metadata only, so that terabytes take seconds. Exit code 65 where
    something is missing, surplus or of another shape.

    Args:
        path: a checkpoint of any kind: a folder, a .safetensors file, hf://org/name[@revision] or nemo://name.
    """
    from slipway.checkpoint import inspection, locate

    return inspection.contents_of(locate.locate(path))
