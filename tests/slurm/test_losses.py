"""What is lost under a chain: a node, a network, the controller, the client. Nothing is done twice, and it goes on."""

from __future__ import annotations

import subprocess
import time

import pytest
from bed import Bed
from person import SLIPWAY, chain, events, steps_done, wait_for

pytest_plugins = ("beds",)
pytestmark = pytest.mark.timeout(1800)


def test_preemption_saves_and_the_job_comes_again(bed, client, out):
    run, jobs = client.sent(*chain(out, 60))
    wait_for(bed, out / "run.events", "step 3")
    urgent = bed.out("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "--wrap", "sleep 3")
    bed.wait(lambda: bed.job(jobs[1]).get("Restarts") == "1", "the pre-emption")
    bed.wait(lambda: bed.job(urgent).get("JobState") == "COMPLETED", "the urgent job")
    bed.wait(lambda: client.over(run), "the chain's end", hurry=True)
    assert client.states(run) == ["done"] * 3 and steps_done(out) == list(range(1, 61))


def test_a_step_that_does_not_save_comes_again_after_a_preemption(bed, client, out):
    run, jobs = client.sent(*chain(out))
    wait_for(bed, out / "nemo.events", "step 2")
    bed.out("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    bed.wait(lambda: bed.job(jobs[0]).get("Restarts") == "1", "the pre-emption")
    bed.wait(lambda: client.over(run), "the chain's end", hurry=True)
    assert client.states(run) == ["done"] * 3
    assert [int(what[1]) for *_, what in events(out / "nemo") if what[0] == "step"] == list(range(1, 13))


def test_a_lost_node_is_excluded_and_the_run_goes_on(bed, client, out):
    run, jobs = client.sent(*chain(out, 100))
    wait_for(bed, out / "run.events", "step 9")
    lost = bed.out("scontrol", "show", "hostnames", bed.job(jobs[1])["NodeList"]).split()[1]
    bed.lose(lost)
    try:
        bed.wait(lambda: client.status(run)["steps"][1]["starts"] == 2, "another start", hurry=True)
        fields = bed.job(jobs[1])
        assert lost not in bed.out("scontrol", "show", "hostnames", fields["NodeList"]).split()
        bed.wait(lambda: client.over(run), "the chain's end", hurry=True)
        assert client.states(run) == ["done"] * 3
        done = steps_done(out)
        assert done[-1] == 100 and set(done) == set(range(1, 101))
    finally:
        bed.back(lost)
        bed.wait_for_nodes()


def test_what_the_controller_cannot_say_the_files_do(bed, client, out):
    run, _ = client.sent(*chain(out))
    bed.wait(lambda: client.over(run) and not bed.out("squeue", "-h"), "the end")
    bed.kill("login", "slurmctld")
    try:
        done = client.submit("status", run)
        assert done.returncode == 0 and done.stdout.count(" done") == 3, done.stdout + done.stderr
        refused = client.submit("--", *chain(out))
        assert refused.returncode == 78 and refused.stderr.count("\n") == 1
        assert "Slurm's controller does not answer: Slurmctld(primary) at login is DOWN" in refused.stderr
    finally:
        bed.start("slurmctld")
        bed.wait_for_nodes()


def test_a_start_that_is_cut_off_gives_way_to_the_next_one(bed, client, out):
    """A node loses the network, not its life: Slurm starts the job elsewhere, while the old start still works."""
    client.lab((client.folder / "lab.toml").read_text().replace("nodes = 2", "nodes = 1"))
    run, jobs = client.sent(*chain(out, 400))
    wait_for(bed, out / "run.events", "step 9")
    cut = bed.job(jobs[1])["NodeList"]
    bed.cut(cut)
    try:
        bed.wait(lambda: client.status(run)["steps"][1]["starts"] == 2, "another start", hurry=True)
        bed.wait(lambda: [one for one in events(out / "run") if one[3] != cut], "work on another node")
        time.sleep(2)
        found = [one for one in events(out / "run") if one[4][0] == "step"]
        last = max(time for time, _, _, node, _ in found if node == cut)
        first = min(time for time, _, _, node, _ in found if node != cut)
        assert last < first, "two starts worked at the same time"
        numbers = [int(one[4][1]) for one in found]
        assert numbers == list(range(1, len(numbers) + 1))  # the old start saved before it gave way
    finally:
        client.submit("cancel", run)
        bed.join(cut)
        bed.wait_for_nodes()


def whole_or_none(bed: Bed, before: set[str]) -> bool:
    """Three jobs more than before, none of them held; or none at all."""
    jobs = {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()} - before
    held = "JobHeldUser" in bed.out("squeue", "-h", "-o", "%i %r")
    if not jobs:
        time.sleep(5)
        return not {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()} - before
    return len(jobs) == 3 and not held


def test_a_client_that_is_killed_leaves_a_whole_chain_or_none(bed, client, out):
    bed.wait(lambda: not bed.out("squeue", "-h"), "an empty queue")
    for delay in (0.25, 0.35, 0.45, 0.55):
        before = {*bed.out("squeue", "-h", "-t", "all", "-o", "%i").split()}
        words = [SLIPWAY, "submit", "--", *map(str, chain(out / f"{delay}"))]
        process = subprocess.Popen(words, env=bed.client, cwd=client.folder, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        # What the client has begun on the cluster goes on without it, and on a busy machine takes its time.
        assert bed.wait(lambda before=before: whole_or_none(bed, before), "a whole chain, or none")
    bed.run("scancel", "-u", bed.user)
