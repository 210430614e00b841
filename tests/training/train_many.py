"""Many short training runs by the worker itself, with NeMo imported once: each rank of each run is a fork.

python train_many.py JOBS.json, a list of {"recipe": {...}, "indices": PATH, "ranks": N, "port": N}; what a run leaves
lies in its recipe's folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import fork_ranks, import_nemo
from slipway.training import worker
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder


def run(job: dict[str, Any]) -> bool:
    """All ranks of a job ended well."""
    recipe = Recipe(**job["recipe"])
    folder = RunFolder.of(recipe)
    folder.path.mkdir(parents=True)
    recipe.save(folder.recipe)
    folder.write_status({"state": "starting", "step": 0, "steps": recipe.steps, "tokens": 0, "why": ""})
    started = time.monotonic()
    stop = folder.path / "stop"
    ok = fork_ranks(
        job["ranks"],
        job["port"],
        folder.path,
        lambda: worker.run(recipe, Path(job["indices"]), stop, 1, time.time()),
    )
    print(f"{folder.path.name}: {'ok' if ok else 'FAILED'} {time.monotonic() - started:.1f} s", flush=True)
    return ok


if __name__ == "__main__":
    import_nemo()
    failed = [job for job in json.loads(Path(sys.argv[1]).read_text()) if not run(job)]
    sys.exit(len(failed))
