"""`slipway extract-heads`: the trained heads of a checkpoint, alone."""

from __future__ import annotations

from slipway.report import Summary


def extract_heads(ckpt: str, out: str, *, overwrite: bool = False) -> Summary:
    """Write the trained heads of a checkpoint, reading nothing but their eight tensors.

    Args:
        ckpt: NeMo checkpoint of a `train --mode heads` run, a folder or nemo://name.
        out: folder to write: heads.safetensors and config.json.
        overwrite: replace what is at the output, once the new one is whole.
    """
    from slipway.checkpoint import heads, locate
    from slipway.checkpoint.job import carry_out

    return carry_out(
        "extract-heads", out, "1GB", lambda: heads.extract_plan(locate.nemo_folder(ckpt)), overwrite=overwrite
    )
