"""Many short training runs by the worker itself, with NeMo imported once: each rank of each run is a fork.

python train_many.py JOBS.json, a list of {"recipe": {...}, "index": PATH, "ranks": N, "port": N}; what a run leaves
lies in its recipe's folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from multiprocessing import util
from pathlib import Path
from typing import Any

from entrypoints.training import cpu, worker
from entrypoints.training.recipe import Recipe
from entrypoints.training.run_folder import RunFolder

LIMIT = 60  # seconds for one run


def main(jobs: list[dict[str, Any]]) -> int:
    """Run the jobs one after the other; how many of them failed."""
    cpu.enable()
    cpu.enable = lambda: None
    from entrypoints.training import callbacks, data, modes  # noqa: F401 (for the forks)

    return sum(not run(job) for job in jobs)


def run(job: dict[str, Any]) -> bool:
    """All ranks of a job ended well."""
    recipe = Recipe(**job["recipe"])
    folder = RunFolder.of(recipe)
    folder.path.mkdir(parents=True)
    recipe.save(folder.recipe)
    folder.write_status({"state": "starting", "step": 0, "steps": recipe.steps, "tokens": 0, "why": ""})
    started, ranks = time.monotonic(), job["ranks"]
    children = [_fork(recipe, job, rank) for rank in range(ranks)]
    codes = {}
    while len(codes) < ranks and time.monotonic() - started < LIMIT and not any(codes.values()):
        for child in children:
            pid, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            codes |= {pid: status} if pid else {}
        time.sleep(0.02)
    for child in children:
        if child not in codes:
            os.kill(child, 9)
            os.waitpid(child, 0)
    ok = len(codes) == ranks and not any(codes.values())
    print(f"{folder.path.name}: {'ok' if ok else 'FAILED'} {time.monotonic() - started:.1f} s", flush=True)
    return ok


def _fork(recipe: Recipe, job: dict[str, Any], rank: int) -> int:
    if child := os.fork():
        return child
    ranks = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    log = os.open(f"{recipe.out}/rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        worker.run(recipe, Path(job["index"]), Path(recipe.out) / "stop", 1, time.time())
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    util._exit_function()  # Megatron's helper processes end with this one
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
