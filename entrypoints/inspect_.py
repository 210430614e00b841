"""`slipway inspect`: what a checkpoint is, and whether it is whole."""

from __future__ import annotations

from entrypoints.checkpoint.contents import Contents


def inspect(path: str) -> Contents:
    """Tell what a checkpoint is and whether it is whole.

    Prints format, model, parameters, dtypes, size, quantisation, and which tensors or files are missing or surplus
    against config.json. Reads headers and metadata only, so that a checkpoint of terabytes takes seconds. Exit code
    65 where something is missing, surplus or of another shape.

    Args:
        path: folder or .safetensors file: Hugging Face, NeMo, torch_dist, a training checkpoint, heads; or a name,
            hf://org/name[@revision] or nemo://name.
    """
    from entrypoints.checkpoint import inspection, locate

    return inspection.contents_of(locate.locate(path))
