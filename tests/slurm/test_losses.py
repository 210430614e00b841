"""What is lost under a chain: a node, a network, the controller, the client. Nothing is done twice, and it goes on.

All of it happens at once, each loss on a Slurm of its own: most of the time is waiting, for Slurm to notice.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from bed import Bed
from person import SLIPWAY, Client, chain, events, person, place, steps_done, wait_for

pytest_plugins = ("beds",)
pytestmark = pytest.mark.timeout(1800)
Loss = Callable[[Bed, Client, Path], None]


def urgent(bed: Bed) -> str:
    """A job of a partition with priority, which takes all nodes."""
    words = ["sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    return bed.out(*words)


def a_preemption_saves_and_the_job_comes_again(bed: Bed, client: Client, out: Path) -> None:
    run, jobs = client.sent(*chain(out, 40))
    wait_for(bed, out / "run.events", "step 3")
    urgent(bed)
    bed.wait(lambda: bed.job(jobs[1]).get("Restarts") == "1", "the pre-emption")
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and steps_done(out) == list(range(1, 41))


def a_step_that_does_not_save_comes_again_after_a_preemption(bed: Bed, client: Client, out: Path) -> None:
    run, jobs = client.sent(*chain(out))
    wait_for(bed, out / "nemo.events", "step 2")
    urgent(bed)
    bed.wait(lambda: bed.job(jobs[0]).get("Restarts") == "1", "the pre-emption")
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3
    done = [int(what[1]) for *_, what in events(out / "nemo") if what[0] == "step"]
    # It may have been ended between a step and what is kept of it: that one is done again.
    assert sorted(set(done)) == list(range(1, 13)) and len(done) <= 13


def a_lost_node_is_excluded_and_the_run_goes_on(bed: Bed, client: Client, out: Path) -> None:
    run, jobs = client.sent(*chain(out, 60))
    wait_for(bed, out / "run.events", "step 9")
    lost = bed.out("scontrol", "show", "hostnames", bed.job(jobs[1])["NodeList"]).split()[1]
    bed.lose(lost)
    bed.wait(lambda: client.status(run)["steps"][1]["starts"] == 2, "another start", hurry=True, pause=1.0)
    assert lost not in bed.out("scontrol", "show", "hostnames", bed.job(jobs[1])["NodeList"]).split()
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3
    done = steps_done(out)
    assert done[-1] == 60 and set(done) == set(range(1, 61))


def a_start_that_is_cut_off_gives_way_to_the_next_one(bed: Bed, client: Client, out: Path) -> None:
    """A node loses the network, not its life: Slurm starts the job elsewhere, while the old start still works."""
    client.lab((client.folder / "lab.toml").read_text().replace("nodes = 2", "nodes = 1"))
    run, jobs = client.sent(*chain(out, 400))
    wait_for(bed, out / "run.events", "step 9")
    cut = bed.job(jobs[1])["NodeList"]
    bed.cut(cut)
    bed.wait(lambda: client.status(run)["steps"][1]["starts"] == 2, "another start", hurry=True, pause=1.0)
    bed.wait(lambda: [one for one in events(out / "run") if one[3] != cut], "work on another node")
    time.sleep(2)  # time for an old start that has not given way to write steps beside the new one's
    found = [one for one in events(out / "run") if one[4][0] == "step"]
    last = max(at for at, _, _, node, _ in found if node == cut)
    first = min(at for at, _, _, node, _ in found if node != cut)
    assert last < first, "two starts worked at the same time"
    numbers = [int(one[4][1]) for one in found]
    assert numbers == list(range(1, len(numbers) + 1))  # the old start saved before it gave way


def an_srun_that_hears_nothing_of_a_node_does_not_wait_for_ever(bed: Bed, client: Client, out: Path) -> None:
    """The network of a node is cut until the work is done, so that nobody hears that its task has ended well."""
    run, jobs = client.sent(*chain(out, 60))
    wait_for(bed, out / "run.events", "step 9")
    cut = bed.out("scontrol", "show", "hostnames", bed.job(jobs[1])["NodeList"]).split()[1]
    bed.cut(cut)
    bed.wait(lambda: "MESSAGE_TASK_EXIT" in (bed.folder / f"slurmd.{cut}.log").read_text(), "a word that nobody hears")
    bed.join(cut)
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and steps_done(out) == list(range(1, 61))
    assert "waits for a node that cannot be heard" in client.submit("logs", run, "--step", "train").stdout


def an_allocation_in_which_nothing_starts_is_given_back(bed: Bed, client: Client, out: Path) -> None:
    """Slurm 22.05 may give one as a node is lost. Here an srun before the real one says what it says there."""
    tool = out / "bin" / "srun"
    tool.parent.mkdir()
    said = "srun: error: Unable to create step for job $SLURM_JOB_ID: Invalid generic resource (gres) specification"
    refuse = f'case "${{SLURM_RESTART_COUNT:-0}} $*" in "0 "*" train "*) echo "{said}" >&2; exit 1 ;; esac'
    tool.write_text(f'#!/bin/bash\n{refuse}\nexec /usr/bin/srun "$@"\n')
    tool.chmod(0o755)
    (bed.shared / ".bashrc").write_text(f"PATH={tool.parent}:$PATH\n")
    run, _ = client.sent(*chain(out))
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and steps_done(out) == list(range(1, 13))
    assert client.status(run)["steps"][1]["starts"] == 2
    assert said.partition("$")[0] in client.submit("logs", run, "--step", "train").stdout


def what_the_controller_cannot_say_the_files_do(bed: Bed, client: Client, out: Path) -> None:
    """Two chains: one is done, and one is queued again, of which nobody can say whether it will go on."""
    over, _ = client.sent(*chain(out / "over"))
    run, jobs = client.sent(*chain(out, 40))
    wait_for(bed, out / "run.events", "step 6")
    bed.run("scancel", "--signal=USR1", jobs[1])
    bed.wait(lambda: bed.job(jobs[1]).get("JobState") == "PENDING", "the job to be queued again")
    client.wait_for_end(over)
    bed.kill("login", "slurmctld", signal.SIGTERM)
    bed.wait(lambda: not bed.processes("login", "slurmctld"), "the controller to end")
    done = client.submit("status", over)
    assert done.returncode == 0 and done.stdout.count(" done") == 3, done.stdout + done.stderr
    found = client.status(run)
    assert [step["state"] for step in found["steps"]] == ["done", "not known", "not known"]
    assert found["code"] == 0 and not found["ended"] and "Slurm does not answer" in found["warning"]
    refused = client.submit("--", *chain(out))
    assert refused.returncode == 78 and refused.stderr.count("\n") == 1
    assert "Slurm's controller does not answer: Slurmctld(primary) at login is DOWN" in refused.stderr
    bed.start("slurmctld")
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and steps_done(out) == list(range(1, 41))


def a_controller_that_forgets_gives_ids_again_and_nobody_touches_jobs_of_another_run(
    bed: Bed, client: Client, out: Path
) -> None:
    """The worst that SIGKILL can do to slurmctld: all that it knew is gone, and it counts from 1 again."""
    old, ids = client.sent(*chain(out / "old", 400))
    wait_for(bed, out / "old" / "run.events", "step 3")
    bed.kill("login", "slurmctld")
    shutil.rmtree(bed.folder / "state")
    (bed.folder / "state").mkdir()
    bed.start("slurmctld")
    new, again = client.sent(*chain(out))
    assert {*ids} & {*again}, "else this test shows nothing"
    found = client.status(old)
    assert found["ended"] and "Slurm has forgotten it" in found["steps"][1]["said"]
    for verb in ("stop", "cancel"):
        assert "had ended already" in client.submit(verb, old).stdout
    client.wait_for_end(new)
    assert client.states(new) == ["done"] * 3 and steps_done(out) == list(range(1, 13))


def whole_or_none(bed: Bed, before: set[str]) -> bool:
    """Three jobs more than before, none of them held; or none at all."""
    jobs = {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()} - before
    held = "JobHeldUser" in bed.out("squeue", "-h", "-o", "%i %r")
    if not jobs:
        time.sleep(5)  # none yet, or none for good: sbatch may be on its way still
        return not {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()} - before
    return len(jobs) == 3 and not held


def a_client_that_is_killed_leaves_a_whole_chain_or_none(bed: Bed, client: Client, out: Path) -> None:
    for delay in (0.25, 0.35, 0.45, 0.55):
        before = {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()}
        words = [SLIPWAY, "submit", "--", *map(str, chain(out / f"{delay}"))]
        process = subprocess.Popen(words, env=bed.client, cwd=client.folder, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        # What the client has begun on the cluster goes on without it, and on a busy machine takes its time.
        assert bed.wait(lambda before=before: whole_or_none(bed, before), "a whole chain, or none")


LOSSES: list[Loss] = [
    a_preemption_saves_and_the_job_comes_again,
    a_step_that_does_not_save_comes_again_after_a_preemption,
    a_lost_node_is_excluded_and_the_run_goes_on,
    an_srun_that_hears_nothing_of_a_node_does_not_wait_for_ever,
    a_start_that_is_cut_off_gives_way_to_the_next_one,
    an_allocation_in_which_nothing_starts_is_given_back,
    what_the_controller_cannot_say_the_files_do,
    a_controller_that_forgets_gives_ids_again_and_nobody_touches_jobs_of_another_run,
    a_client_that_is_killed_leaves_a_whole_chain_or_none,
]


def happen(loss: Loss, folder: Path) -> None:
    """Let a loss meet a Slurm that nobody else uses."""
    # Where Slurm must not be the first to see that a node is gone, it waits for as long as it does by default.
    patient = loss is an_srun_that_hears_nothing_of_a_node_does_not_wait_for_ever
    with Bed(slurmd_timeout=300 if patient else 20) as bed:
        loss(bed, person(bed, folder), place(bed, "out"))


@pytest.fixture(scope="module")
def happening(possible: None, request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[dict[Loss, Future[None]]]:
    """The losses that are asked for, all at once."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    losses: list[Loss] = [item.callspec.params["loss"] for item in items]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(len(losses)) as pool:
        yield {loss: pool.submit(happen, loss, tmp_path_factory.mktemp("client")) for loss in losses}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_what_is_lost(happening, loss):
    happening[loss].result()
