"""The commands themselves on a real Slurm: the topology of steps, the shipped script, and a chain on a tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import slipway
from bed import Bed
from conftest import make_model
from person import SLIPWAY, Client, events
from slipway.training.run_folder import RunFolder

pytest_plugins = ("beds",)
pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
TOPOLOGY = """
import os
from slipway.launch.topology import Placement, find_topology
print(os.environ["SLURMD_NODENAME"], find_topology(Placement()))
"""


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-N1"], ["1 node × 1, this is node 0"]),
        (["-N2"], ["2 nodes × 1, this is node 0", "2 nodes × 1, this is node 1"]),
        (["-N3"], [f"3 nodes × 1, this is node {number}" for number in range(3)]),
        (["-N2", "--ntasks-per-node=2", "--gpus-per-node=2"],
         [f"2 nodes × 2, this is node {node}, process {process}" for node in range(2) for process in range(2)]),
        (["-N2", "--gpus-per-node=2"], ["2 nodes × 2, this is node 0", "2 nodes × 2, this is node 1"]),
        (["-w", "n3,n1", "-N2"], ["2 nodes × 1, this is node 0", "2 nodes × 1, this is node 1"]),
    ],
)  # fmt: skip
def test_every_process_of_a_step_knows_its_place(roots_bed, flags, said):
    # With labels srun does not mix the lines of two tasks. Where a node is not free yet, it says that it waits.
    said_by_all = roots_bed.out("srun", "--label", *flags, sys.executable, "-c", TOPOLOGY).splitlines()
    lines = sorted(line for line in said_by_all if not line.startswith("srun: job "))
    assert [line.partition(", master ")[0].partition("topology: ")[2] for line in lines] == said
    assert all("from slurm" in line for line in lines)
    # Slurm chooses the nodes; one that has just ended another step may not be free yet.
    first = next(line.partition(": ")[2].split()[0] for line in lines if "this is node 0" in line)
    masters = {line.partition("master ")[2].partition(",")[0] for line in lines}
    assert masters == {"127.0.0.1:29500" if flags == ["-N1"] else f"{first}:29500"}


def test_the_shipped_script_saves_is_queued_again_and_goes_on_without_a_lost_node(roots_bed, tmp_path):
    """deploy/slurm.sbatch as it is. There is no pyxis here, so an srun before the real one takes its flags away."""
    bed: Bed = roots_bed
    shared = bed.shared / "shipped"
    (shared / "bin").mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "stand-in", shared / "bin" / "stand-in")
    (shared / "bin" / "train").write_text(f'#!/bin/bash\nexec {shared}/bin/stand-in train --steps 100 "$@"\n')
    without = 'for word in "$@"; do\nshift\ncase "$word" in --*container*) ;; *) set -- "$@" "$word" ;; esac\ndone'
    (shared / "bin" / "srun").write_text(f'#!/bin/bash\n{without}\nexec /usr/bin/srun "$@"\n')
    for tool in (shared / "bin").iterdir():
        tool.chmod(0o755)
    env = {**bed.env, "PATH": f"{shared}/bin:{bed.env['PATH']}", "SHARED": str(shared), "HOME": "/root"}
    words = ["sbatch", "--parsable", "--gpus-per-node=1", ROOT / "deploy" / "slurm.sbatch"]
    job = bed.out(*words, env=env, cwd=shared)

    def steps() -> list[int]:
        return [int(what[1]) for *_, what in events(shared / "run") if what[0] == "step"]

    bed.wait(lambda: len(steps()) > 5, "the first steps")
    bed.run("scancel", "--signal=USR1", job)
    bed.wait(lambda: bed.job(job)["Restarts"] == "1" and len(steps()) > 20, "the second start", hurry=True)
    lost = bed.out("scontrol", "show", "hostnames", bed.job(job)["NodeList"]).split()[1]
    bed.lose(lost)
    try:
        bed.wait(lambda: bed.job(job)["JobState"] == "COMPLETED", "the end", hurry=True)
        assert lost not in bed.job(job)["NodeList"] and steps()[-1] == 100
        assert set(steps()) == set(range(1, 101))
    finally:
        bed.back(lost)
        bed.wait_for_nodes()


def test_a_chain_from_hugging_face_to_hugging_face_has_one_loss_curve(roots_bed, tmp_path):
    """import, preprocess, train with a stop and another start in the middle, export: as jobs, sent over ssh."""
    bed: Bed = roots_bed
    client, out = Client(bed, tmp_path), bed.shared / "chain"
    out.mkdir()
    make_model(out / "hf")
    # One node: on this machine two would halve the speed of NeMo's import, and of nothing else.
    client.lab(
        f'host = "login"\njob_dir = "{bed.shared}/jobs"\ncommand = "{SLIPWAY}"\nnodes = 1\ngpus_per_node = 0\n'
        f'cpus = 2\n[env]\nNEMO_HOME = "{out}/nemo-home"\n'
    )
    source, data = Path(slipway.__file__).parent, out / "data.jsonl"
    train = "--mode lora --steps 150 --seq-length 64 --global-batch-size 4 --lr 1e-3 --warmup-steps 1"
    chain = ["import", out / "hf", "nemo://tiny", "then"]
    chain += ["preprocess", source, data, "--tokenizer", "nemo://tiny", "--seq-length", 64, "then"]
    chain += ["train", "--model", "nemo://tiny", "--data", data, "--out", out / "run", *train.split(), "then"]
    chain += ["export", out / "run", out / "exported"]
    run, jobs = client.sent(*chain)
    folder = RunFolder(out / "run")
    bed.wait(lambda: folder.metrics.exists() and len(folder.read_metrics()) > 20, "the first steps")
    assert "run: running, step" in client.submit("status", run).stdout
    bed.run("scancel", "--signal=USR1", jobs[2])
    bed.wait(lambda: bed.job(jobs[2])["JobState"] == "PENDING", "the job to be queued again")
    saved = folder.latest_checkpoint()
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 4, client.submit("logs", run).stdout
    assert saved and 20 < saved[0] < 150 and folder.read_status()["begun_at"] == saved[0]
    assert [entry["step"] for entry in folder.read_metrics()] == list(range(150)) and folder.plot.exists()
    assert json.loads((out / "exported" / "config.json").read_text())["model_type"] == "gpt_oss"
    assert client.status(run)["steps"][2]["starts"] == 2
    assert signal.SIGUSR1.name in client.submit("logs", run, "--step", "train", "--lines", 10_000).stdout
