"""Random faults on real Slurms, with stand-ins for the commands: `make slurm-slow` prints a table.

Each fault meets one chain of import, train and export, at a random moment. What must hold: the chain ends in the state
that the fault calls for; where that is not its end, the same chain submitted again ends it; no two starts of a step
work at the same time; what was saved is not computed again; no output is missing or visible in part. Ends with 1 else.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bed import Bed, missing, sweep
from person import SLIPWAY, Client, chain, events, install
from slipway.cluster.runs import FORGOTTEN

LIMIT = 300.0  # seconds in which a chain must have ended
STEPS = 24
LAB = 'host = "login"\njob_dir = "{shared}/jobs"\ncommand = "{tool}"\nnodes = {nodes}\ngpus_per_node = 1\n'


@dataclass
class Case:
    """One fault and what came of it."""

    kind: str
    seed: int
    problems: list[str]
    seconds: float = 0.0
    starts: int = 0
    submitted: int = 1


@dataclass
class Scene:
    """A chain that a fault is about to meet."""

    bed: Bed
    client: Client
    out: Path
    chance: random.Random
    nodes: int
    run: str = ""
    jobs: tuple[str, ...] = ()

    @property
    def words(self) -> list[object]:
        """The chain."""
        return chain(self.out, STEPS)

    def send(self) -> None:
        """Submit it."""
        self.run, jobs = self.client.sent(*self.words)
        self.jobs = tuple(jobs)

    def nodes_of(self) -> list[str]:
        """The nodes where a step is at work, the first of them first."""
        names = self.bed.out("squeue", "-h", "-t", "R", "-o", "%N").split()
        return self.bed.out("scontrol", "show", "hostnames", names[0]).split() if names else []

    def wait_a_little(self) -> None:
        """Until a random moment of the chain's work."""
        self.bed.wait(lambda: self.nodes_of(), "the first job")
        time.sleep(self.chance.uniform(0, 12))


Fault = Callable[[Scene], list[str]]  # does it, and returns the states that may follow: "done", "ended" …


def kill_a_step(scene: Scene) -> list[str]:
    """SIGKILL to a process of the step, as the kernel's killer of large processes does it."""
    node = scene.chance.choice(scene.nodes_of() or ["n1"])
    victims = scene.bed.processes(node, "stand-in")
    for pid in victims[-1:]:
        subprocess.run(["kill", "-KILL", str(pid)], capture_output=True)
    return ["done", "ended"]


def lose_a_node(scene: Scene) -> list[str]:
    """The power of a node fails; it comes back after a while."""
    node = scene.chance.choice(scene.nodes_of() or ["n1"])
    scene.bed.lose(node)
    time.sleep(scene.chance.choice([3, 25, 50]))
    scene.bed.back(node)
    return ["done"]


def cut_a_node(scene: Scene) -> list[str]:
    """The network of a node fails, not the node; it works again after a while."""
    node = scene.chance.choice(scene.nodes_of() or ["n1"])
    scene.bed.cut(node)
    time.sleep(scene.chance.choice([3, 25, 50]))
    scene.bed.join(node)
    return ["done", "ended"]


def kill_the_controller(scene: Scene) -> list[str]:
    """slurmctld is killed and started again; what it has not written by then (up to 5 s of work) it has forgotten."""
    scene.bed.kill("login", "slurmctld")
    time.sleep(scene.chance.choice([1, 8, 20]))
    scene.bed.start("slurmctld")
    return ["done", "forgotten"]


def cancel_a_job(scene: Scene) -> list[str]:
    """scancel of one of the jobs, by hand."""
    scene.bed.run("scancel", scene.chance.choice(scene.jobs))
    return ["done", "ended"]


def preempt(scene: Scene) -> list[str]:
    """A job of a partition with priority takes all nodes."""
    words = ["sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 4"]
    scene.bed.run(*words)
    return ["done"]


def warn(scene: Scene) -> list[str]:
    """USR1 to a job, as before its time limit."""
    scene.bed.run("scancel", "--signal=USR1", scene.chance.choice(scene.jobs))
    return ["done"]


def stop(scene: Scene) -> list[str]:
    """`slipway submit stop`."""
    done = scene.client.submit("stop", scene.run)
    assert done.returncode == 0, done.stderr
    return ["done", "ended"]


def kill_the_client(scene: Scene) -> list[str]:
    """The client is killed while it submits."""
    raise NotImplementedError  # it is there before the chain: see `_meet`


FAULTS: dict[str, Fault] = {
    "a process of a step is killed": kill_a_step,
    "a node is lost": lose_a_node,
    "a node's network is cut": cut_a_node,
    "the client is killed": kill_the_client,
    "the controller is killed": kill_the_controller,
    "a job is cancelled": cancel_a_job,
    "a job is pre-empted": preempt,
    "a job is told to save": warn,
    "the run is stopped": stop,
}


def _meet(scene: Scene, kind: str) -> list[str]:
    """Submit a chain and let the fault meet it; the ends that may follow."""
    if FAULTS[kind] is not kill_the_client:
        scene.send()
        scene.wait_a_little()
        return FAULTS[kind](scene)
    command = [SLIPWAY, "submit", "--", *map(str, scene.words)]
    client = subprocess.Popen(command, env=scene.bed.client, cwd=scene.client.folder, stdout=subprocess.DEVNULL)
    time.sleep(scene.chance.uniform(0.1, 1.0))
    client.send_signal(signal.SIGKILL)
    client.wait()
    time.sleep(8)  # what had begun on the login node ends
    return ["done", "none"]


def end_of(scene: Scene) -> str:
    """Wait until the newest chain of the scene has ended.

    Returns: done, ended, none where nothing was submitted, or forgotten where Slurm has lost a part of it, which
    `status` must say. What is left of it is then taken away, as `status` says too.
    """
    bed, deadline = scene.bed, time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        bed.hurry()
        reasons = bed.out("squeue", "-h", "-u", bed.user, "-p", "batch", "-o", "%r").split()
        if {*reasons} <= {"JobHeldUser", "Dependency"} and (end := _told_end(scene)):  # nothing goes on by itself
            return end
        time.sleep(1)
    state = bed.out("squeue", "-o", "%i %j %T %r %N") + bed.out("sinfo", "-N")
    return f"not after {LIMIT:.0f} s: {state} {scene.client.submit('status').stdout}"


def _told_end(scene: Scene) -> str:
    """How the newest chain has ended, by `status`; empty where it has not."""
    told = scene.client.submit("status", "--json", *([scene.run] if scene.run else []))
    if told.returncode == 2:
        return "none"
    found = json.loads(told.stdout) if told.stdout else {}
    if found.get("warning", "").startswith("Slurm has forgotten"):
        scene.client.submit("cancel", found["run"])
        return "forgotten"
    if not found.get("ended"):
        return ""
    if any(step["said"].startswith(FORGOTTEN) for step in found["steps"]):
        return "forgotten"
    return "done" if told.returncode == 0 else "ended"


def wrong_with(out: Path) -> list[str]:
    """What does not hold of the outputs of a chain that is done."""
    found = []
    for name in ("nemo", "run", "exported"):
        work = [one for one in events(out / name) if one[2] == "0"]
        order = [start for _, start, *_ in work]
        turns = [start for number, start in enumerate(order) if number == 0 or order[number - 1] != start]
        if len(turns) != len(set(turns)):
            found.append(f"{name}: two starts worked at the same time: {turns}")
    steps, saved = [], 0
    for *_, what in events(out / "run"):
        if what[0] == "begin":
            goes_on_from = int(what[1])
            if goes_on_from < saved:
                found.append(f"run: step {saved} was saved, but a start went on from {goes_on_from}")
            del steps[goes_on_from:]  # what was not saved is computed again
        if what[0] == "step":
            steps.append(int(what[1]))
        saved = int(what[1]) if what[0] == "saved" else saved
    if steps != list(range(1, STEPS + 1)):
        found.append(f"run: the steps are {steps}")
    if not (out / "run" / "done").exists() or (out / "nemo" / "step").read_text().strip() != "12":
        found.append("an output is missing or not whole")
    if (out / "nemo.partial").exists() or (out / "exported.partial").exists():
        found.append("unfinished work lies about")
    return found


def one(bed: Bed, kind: str, seed: int) -> Case:
    """One fault of a kind, on a bed that is whole; it is whole afterwards too."""
    chance, begun = random.Random(seed), time.monotonic()
    out = bed.shared / f"case{seed}"
    out.mkdir()
    subprocess.run(["chown", bed.user, out], check=True)
    with tempfile.TemporaryDirectory() as folder:
        client, nodes = Client(bed, Path(folder)), chance.choice([1, 2])
        client.lab(LAB.format(shared=bed.shared, tool=install(bed), nodes=nodes).replace("/jobs", f"/jobs{seed}"))
        scene, case = Scene(bed, client, out, chance, nodes), Case(kind, seed, [])
        try:
            may_be = _meet(scene, kind)
            end = end_of(scene)
            if end not in may_be:
                case.problems.append(f"ended as {end!r}, not one of {may_be}")
            while end in ("ended", "none", "forgotten") and case.submitted < 3:
                scene.send()
                case.submitted += 1
                end = end_of(scene)
            case.problems += wrong_with(out) if end == "done" else [f"does not come to its end: {end}"]
            case.starts = len({start for _, start, *_ in events(out / "run")})
        except Exception:
            case.problems.append(traceback.format_exc(limit=3))
        case.seconds = time.monotonic() - begun
        if case.problems:
            case.problems.append(f"what was left is in {_kept(bed, out, seed)}")
        _heal(bed)
    return case


def _kept(bed: Bed, out: Path, seed: int) -> Path:
    """A folder with what a wrong case has left: outputs, scripts, states, and what Slurm wrote down."""
    folder = Path(tempfile.mkdtemp(prefix=f"slipway-fault-{seed}-"))
    for one in (out, bed.shared / f"jobs{seed}"):
        shutil.copytree(one, folder / one.name, dirs_exist_ok=True)
    for file in bed.folder.glob("*.log"):
        shutil.copy(file, folder)
    return folder


def _heal(bed: Bed) -> None:
    bed.run("scancel", "-u", bed.user, user="root")
    bed.put_back()
    bed.wait_for_nodes()


def worker(seeds: list[int], kinds: list[str]) -> list[Case]:
    """The faults of one bed, one after the other; a bed that does not heal is replaced."""
    found: list[Case] = []
    todo = list(zip(seeds, kinds, strict=True))
    while todo:
        with Bed(slurmd_timeout=15) as bed:
            while todo:
                seed, kind = todo.pop(0)
                try:
                    found.append(one(bed, kind, seed))
                except AssertionError as error:  # the bed is not whole again
                    found.append(Case(kind, seed, [f"the bed did not heal: {error}"]))
                    break
                case = found[-1]
                print(f"{kind}, seed {seed}: {'; '.join(case.problems) or 'right'}, {case.seconds:.0f} s", flush=True)
    return found


def main() -> int:
    """Run the faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="faults")
    parser.add_argument("--beds", type=int, default=4, help="Slurms at once")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kind", help="only faults whose name has this in it")
    wanted = parser.parse_args()
    if why := missing(install=True):
        print(why)
        return 1
    sweep()
    kinds = [kind for kind in FAULTS if not wanted.kind or wanted.kind in kind]
    chosen = [kinds[number % len(kinds)] for number in range(wanted.count)]
    seeds = [wanted.seed + number for number in range(wanted.count)]
    begun = time.monotonic()
    with ProcessPoolExecutor(wanted.beds) as pool:
        parts = [(seeds[one :: wanted.beds], chosen[one :: wanted.beds]) for one in range(wanted.beds)]
        cases = [case for future in [pool.submit(worker, *part) for part in parts] for case in future.result()]
    print(f"\n{wanted.count} faults, seed {wanted.seed}, {wanted.beds} Slurms, {time.monotonic() - begun:.0f} s\n")
    print("| fault | times | right | submitted again | starts of train, at most | seconds, median |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        of_it = [case for case in cases if case.kind == kind]
        if of_it:
            right = sum(not case.problems for case in of_it)
            again = sum(case.submitted - 1 for case in of_it)
            seconds = statistics.median(case.seconds for case in of_it)
            print(f"| {kind} | {len(of_it)} | {right} | {again} | {max(c.starts for c in of_it)} | {seconds:.0f} |")
    wrong = [case for case in cases if case.problems]
    for case in wrong:
        print(f"\nseed {case.seed}, {case.kind}: {'; '.join(case.problems)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
