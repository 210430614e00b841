"""NeMo's model from the context of a checkpoint, which is checked before NeMo reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.checkpoint import handover
from slipway.checkpoint.nemo_context import has_tokenizer


def model_of(checkpoint: Path) -> Any:
    """The model that the context describes, without weights; DataError where it names what it should not.

    Of its call only the configuration and the tokenizer are built: training brings its own optimizer and what it
    attaches.
    """
    handover.check_context(checkpoint)
    import fiddle  # type: ignore[import-untyped]
    from nemo.lightning.io import load_context

    calls = load_context(checkpoint / "context", subpath="model", build=False)
    # Where there is no tokenizer, `import` once wrote a call for it all the same.
    built = {"config", "tokenizer"} if has_tokenizer(checkpoint) else {"config"}
    for name in set(calls.__arguments__) - built:
        delattr(calls, name)
    return fiddle.build(calls)
