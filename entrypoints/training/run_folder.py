"""The folder of one training run: what lies where, and what its files say.

checkpoints/step=N/   NeMo checkpoints; one with a marker `step=N-unfinished` beside it is not complete
recipe.json           what is computed
status.json           state (running, stopped, done), step, loss, tokens, and why it stopped
metrics.jsonl         one object per step; step, loss, lr, tokens, seconds
loss.png, tensorboard/, logs/
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETE = ".complete"  # in the context of a checkpoint, once everything is there


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest complete checkpoint."""
        found = []
        for folder in self.checkpoints.glob("step=*"):
            match = re.fullmatch(r"step=(\d+)", folder.name)
            if match and (folder / "context" / COMPLETE).exists() and not Path(f"{folder}-unfinished").exists():
                found.append((int(match.group(1)), folder))
        return max(found, default=None)

    def remove_incomplete(self) -> None:
        """Take away what a killed run was writing, or NeMo would save beside it under another name."""
        for folder in self.checkpoints.glob("step=*"):
            if not (folder / "context" / COMPLETE).exists() or Path(f"{folder}-unfinished").exists():
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()

    def read_status(self) -> dict[str, Any]:
        """The status file, or {} where there is none."""
        return json.loads(self.status.read_text()) if self.status.exists() else {}

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace the status file at once."""
        part = self.status.with_suffix(".part")
        part.write_text(json.dumps(status, indent=1) + "\n")
        os.replace(part, self.status)

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per step, in order."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def forget_metrics_from(self, step: int) -> None:
        """Drop what was recorded from `step` on: a resumed run computes those steps again."""
        kept = [entry for entry in self.read_metrics() if entry["step"] < step]
        part = self.metrics.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(part, self.metrics)
