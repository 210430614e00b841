"""The curve of a run's loss: as a picture in its folder, and in text for a terminal."""

from __future__ import annotations

import math
import os
from typing import Any

from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

BARS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"


def plot_losses(folder: RunFolder) -> None:
    """Write loss.png: the loss by step. A reader sees the old picture or the new one, never a part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = folder.read_metrics()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([m["step"] + 1 for m in metrics], [m["loss"] for m in metrics], marker=".", label="training")
    if evaluations := folder.read_evaluations():
        axes.plot(
            [e["step"] + 1 for e in evaluations], [e["loss"] for e in evaluations], marker="o", label="evaluation"
        )
        axes.legend()
    axes.set(xlabel="step", ylabel="loss per token", title=f"{folder.path.name}: {Recipe.load(folder.recipe).mode}")
    axes.grid(alpha=0.3)
    part = folder.plot.with_suffix(".part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, folder.plot)
    pyplot.close(figure)


def sparkline(metrics: list[dict[str, Any]], width: int) -> str:
    """The losses as a row of at most `width` bars, each the mean of as many steps as the others."""
    losses = [entry["loss"] for entry in metrics]
    if not losses:
        return ""
    count = min(width, len(losses))
    groups = [losses[len(losses) * i // count : len(losses) * (i + 1) // count] for i in range(count)]
    means = [sum(group) / len(group) for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    heights = [(mean - low) / span * len(BARS) for mean in means]
    return "".join(BARS[min(len(BARS) - 1, int(h))] if math.isfinite(h) else NOT_FINITE for h in heights)
