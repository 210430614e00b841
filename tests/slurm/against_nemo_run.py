"""Two jobs, import and train, sent to the same Slurm by `slipway submit` and by NeMo-Run, and asked about: seconds.

NeMo-Run is told what it needs to know of this cluster: an account, and ssh as this client has it. Only the sending is
compared; without pyxis its jobs cannot run here.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bed import Bed, missing, sweep
from person import SLIPWAY, Client, install

TIMES = 3
PROGRAM = """
import sys
import nemo_run as run
host, key, folder = sys.argv[1:]
tunnel = run.SSHTunnel(host=host, user="root", job_dir=folder, identity=key)
trains = run.SlurmExecutor(account="lab", partition="batch", nodes=2, ntasks_per_node=1, gpus_per_node=1,
                           time="01:00:00", tunnel=tunnel, container_image="none", packager=run.Packager())
imports = trains.clone()
imports.nodes, imports.gpus_per_node = 1, None
with run.Experiment("chain") as experiment:
    experiment.add(run.Script(inline="import /hf /nemo"), executor=imports, name="import")
    experiment.add(run.Script(inline="train --model /nemo --data /x --out /run"), executor=trains, name="train")
    experiment.run(sequential=True, detach=True)
print("id", experiment._id)
"""


def timed(words: list[object], **options: object) -> tuple[float, str]:
    """(seconds, what was printed) of a command that must end well."""
    begun = time.monotonic()
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"{words[:3]} ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-3000:]}")
    return seconds, done.stdout


def of_nemo_run(bed: Bed, folder: Path) -> tuple[list[float], list[float]]:
    """(seconds to send, seconds to ask)."""
    env = {**bed.client, "NEMORUN_HOME": str(folder / "nemorun")}
    python = Path(sys.executable)
    program = folder / "chain.py"
    program.write_text(PROGRAM)
    sent, asked = [], []
    for _ in range(TIMES):
        words = [python, program, f"{bed.net}.1", bed.folder / "ssh" / "user", bed.shared / "nemorun"]
        seconds, said = timed(words, env=env, cwd=folder)
        sent.append(seconds)
        name = said.split("id ")[-1].split()[0]
        asked.append(timed([python.parent / "nemorun", "experiment", "status", name], env=env, cwd=folder)[0])
    return sent, asked


def of_slipway(bed: Bed, folder: Path) -> tuple[list[float], list[float]]:
    """(seconds to send, seconds to ask), the first without a kept connection."""
    client = Client(bed, folder)
    keys = {"host": "login", "job_dir": f"{bed.shared}/jobs", "command": f"{install(bed)}"}
    client.lab("".join(f'{key} = "{value}"\n' for key, value in keys.items()) + "nodes = 2\ngpus_per_node = 1\n")
    chain = ["import", "/hf", bed.shared / "nemo", "then", "train", "--model", bed.shared / "nemo", "--data", "/x"]
    chain += ["--out", bed.shared / "run"]
    sent, asked = [], []
    for _ in range(TIMES):
        sent.append(timed([SLIPWAY, "submit", "--", *chain], env=bed.client, cwd=folder)[0])
        asked.append(timed([SLIPWAY, "submit", "status"], env=bed.client, cwd=folder)[0])
    return sent, asked


def main() -> int:
    """Print the table."""
    if why := missing(install=True):
        print(why)
        return 1
    sweep()
    print(f"load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors\n")
    print("| seconds, median (and all) | two jobs sent | status |\n|---|---|---|")
    with Bed(user=False) as bed, tempfile.TemporaryDirectory() as folder:
        for name, measure in (("`slipway submit`", of_slipway), ("NeMo-Run", of_nemo_run)):
            place = Path(folder) / name.strip("`").replace(" ", "-")
            place.mkdir()
            row = [
                f"{statistics.median(one):.1f} ({', '.join(f'{s:.1f}' for s in one)})" for one in measure(bed, place)
            ]
            print(f"| {name} | {row[0]} | {row[1]} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
