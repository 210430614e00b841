"""A NeMo checkpoint of the right sizes without weights: its files are holes, which take no room on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint import nemo_context, torch_dist
from slipway.families import by_model_type


def write_hollow(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Write what a training run reads of a base before it loads the weights, which read as zeros.

    Args:
        checkpoint: folder that does not exist.
        config: config.json of the model.
    """
    family = by_model_type()[config["model_type"]]
    model = family.rules(config)
    chunks = [ref for cell in model.cells for ref in cell.megatron]
    layout = torch_dist.Layout(model.megatron, chunks, model.extra_state)
    weights, context = checkpoint / "weights", checkpoint / "context"
    weights.mkdir(parents=True)
    context.mkdir()
    for name, size in layout.sizes.items():
        with (weights / name).open("wb") as file:
            file.truncate(size)
    for name, offset, _ in layout.extra.values():
        with (weights / name).open("r+b") as file:
            file.seek(offset)
            file.write(layout.empty_state)
    small = {
        "metadata.json": torch_dist.FORMAT.encode(),
        "common.pt": torch_dist.common_state(),
        ".metadata": layout.metadata(),
    }
    for name, content in small.items():
        (weights / name).write_bytes(content)
    for name, content in nemo_context.context_files(*family.nemo_model(config), dict(config)).items():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_bytes(content)
