"""NeMo's model from the context of a checkpoint, which is checked before NeMo reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.checkpoint import handover

BUILT = ("config", "tokenizer")  # of the model; training brings its own optimizer and what it attaches


def model_of(checkpoint: Path) -> Any:
    """The model that the context describes, without weights; DataError where it names what it should not."""
    handover.check_context(checkpoint)
    import fiddle  # type: ignore[import-untyped]
    from nemo.lightning.io import load_context

    calls = load_context(checkpoint / "context", subpath="model", build=False)
    for name in set(calls.__arguments__) - set(BUILT):
        delattr(calls, name)
    return fiddle.build(calls)
