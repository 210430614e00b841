"""Many short training runs by the worker itself, in a process that has NeMo imported: each rank of each run is a fork.

JOBS.json is a list of {"recipe": {...}, "indices": PATH, "ranks": N, "port": N}. What a run leaves is in the folder of
its recipe, and how it ended in the file `end` there. A job can have "without": name of a repair in
without.py that its ranks do not have, "continues": the folder of a run, which it goes on with a copy of, and
"stop_after": it is asked to stop once so many steps are done.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from forked import fork_ranks
from slipway.training import worker
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder


def stop_after(folder: RunFolder, steps: int) -> None:
    """Ask for a stop as `slipway train` does on a signal, once so many steps are done."""
    while len(folder.read_metrics()) < steps:
        time.sleep(0.005)
    (folder.path / "stop").write_text("a test")


def run(job: dict[str, Any]) -> str:
    """How the ranks of a job ended: see fork_ranks."""
    chosen = Recipe(**job["recipe"])
    folder = RunFolder.of(chosen)
    if "continues" in job:
        shutil.copytree(job["continues"], folder.path, ignore=shutil.ignore_patterns("stop"))
    folder.path.mkdir(parents=True, exist_ok=True)
    chosen.save(folder.recipe)
    folder.write_status({"state": "starting", "step": 0, "steps": chosen.steps, "tokens": 0, "why": ""})
    started = time.monotonic()

    def work() -> None:
        if "without" in job:
            from training.without import take_away

            take_away(job["without"])
        worker.run(chosen, Path(job["indices"]), folder.path / "stop", 1, time.time())

    if "stop_after" in job:
        threading.Thread(target=stop_after, args=(folder, job["stop_after"]), daemon=True).start()
    end = fork_ranks(job["ranks"], job["port"], folder.path, work, may_hang="without" in job)
    (folder.path / "end").write_text(end)
    print(f"{folder.path.name}: {end} {time.monotonic() - started:.1f} s", flush=True)
    return end


def run_all(jobs: Path) -> None:
    """The runs of JOBS.json, one after the other."""
    for job in json.loads(jobs.read_text()):
        run(job)
