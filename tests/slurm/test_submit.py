"""`slipway submit` over ssh on a real Slurm, as an ordinary user, with stand-ins for the commands."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest
from bed import Bed
from conftest import seconds_of_children
from person import SLIPWAY, chain, steps_done, wait_for

pytest_plugins = ("beds",)
pytestmark = pytest.mark.timeout(1800)


def test_a_chain_runs_to_its_end_and_is_told(bed, client, out):
    done = client.submit("--follow", "--", *chain(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_done(out) == list(range(1, 13)) and (out / "exported").is_dir()
    # Others can read what the jobs have written, as far as the person's umask lets them, and not the folder of the run.
    assert (out / "exported").stat().st_mode & 0o777 == 0o755
    newest = max((bed.shared / "jobs").iterdir())
    assert newest.stat().st_mode & 0o777 == 0o700
    assert "==> 2-train" in done.stdout and "train: goes on from step 0" in done.stdout
    assert "run: running, step " in done.stdout and "loss 1.5" in done.stdout
    assert client.states() == ["done", "done", "done"]
    # Submitted again, what is there is passed over.
    run, _ = client.sent(*chain(out))
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and "is there already" in client.submit("logs", run, "--step", "1").stdout
    assert client.submit("logs", "--step", "train", "--lines", 1).stdout.strip() == "train: goes on from step 12"


def test_each_step_has_the_nodes_and_gpus_it_needs(bed, client, out):
    run, jobs = client.sent(*chain(out))
    fields = [bed.job(job) for job in jobs]
    assert [one["NumNodes"].partition("-")[0] for one in fields] == ["1", "2", "1"]
    assert ["gres:gpu" in one.get("TresPerNode", "") for one in fields] == [False, True, False]
    assert [one["Requeue"] for one in fields] == ["1"] * 3 and fields[1]["Dependency"].startswith("afterok:")
    client.submit("cancel", run)


def test_submit_and_status_cost_little(bed, client, out):
    """Processor time, which a machine that is busy does not change; seconds by the clock are in docs/launching.md."""
    with seconds_of_children() as sent:
        run, _ = client.sent(*chain(out))
    with seconds_of_children() as asked:
        client.status(run)
    client.submit("cancel", run)
    assert sent[0] < 2 and asked[0] < 1.5, (sent, asked)


def test_a_signal_before_the_limit_saves_queues_again_and_goes_on(bed, client, out):
    run, jobs = client.sent(*chain(out, 40))
    wait_for(bed, out / "run.events", "step 6")
    bed.run("scancel", "--signal=USR1", jobs[1])
    bed.wait(lambda: bed.job(jobs[1]).get("JobState") == "PENDING", "the job to be queued again")
    assert "queued again" in client.submit("status", run).stdout
    client.wait_for_end(run)
    assert client.states(run) == ["done"] * 3 and client.status(run)["steps"][1]["starts"] == 2
    assert steps_done(out) == list(range(1, 41))  # no step was lost, none done twice


def test_stop_saves_and_ends_and_the_same_chain_goes_on(bed, client, out):
    run, jobs = client.sent(*chain(out, 40))
    wait_for(bed, out / "run.events", "step 6")
    assert "2-train saves and ends; 3-export taken out of the queue" in client.submit("stop", run).stdout
    client.wait_for_end(run)
    found = client.status(run)
    assert client.states(run) == ["done", "stopped", "not started"] and found["code"] == 75
    assert bed.job(jobs[1])["Restarts"] == "0"
    again, _ = client.sent(*chain(out, 40))
    client.wait_for_end(again)
    assert client.states(again) == ["done"] * 3 and steps_done(out) == list(range(1, 41))


def test_cancel_takes_all_jobs_away(bed, client, out):
    run, jobs = client.sent(*chain(out, 400))
    wait_for(bed, out / "run.events", "step 3")
    assert client.submit("cancel", run).stdout.strip().endswith("2-train, 3-export cancelled")
    client.wait_for_end(run)
    assert client.states(run) == ["done", "cancelled", "cancelled"]
    assert bed.out("squeue", "-h", "-j", jobs[1], "-t", "PD,R") == ""
    assert "had ended already" in client.submit("cancel", run).stdout


def test_scancel_of_somebody_else_saves_and_ends(bed, client, out):
    run, jobs = client.sent(*chain(out, 400))
    wait_for(bed, out / "run.events", "step 3")
    bed.run("scancel", jobs[1])
    client.wait_for_end(run)
    saved = int((out / "run" / "step").read_text())
    assert saved == steps_done(out)[-1] and client.states(run)[2] == "not started"
    assert client.states(run)[1] in ("stopped", "cancelled")
    assert bed.out("squeue", "-h", "-j", jobs[2]) in ("", "slurm_load_jobs error: Invalid job id specified")


def test_a_step_that_fails_ends_the_chain(bed, client, out):
    (out / "nemo.partial").write_text("a file is in the way")
    run, jobs = client.sent(*chain(out))
    client.wait_for_end(run)
    assert client.states(run) == ["failed", "not started", "not started"] and client.status(run)["code"] == 73
    # Slurm does not keep jobs that can never begin.
    assert all(bed.job(job).get("JobState") == "CANCELLED" for job in jobs[1:])


def test_secrets_come_from_a_file_of_the_cluster_and_are_seen_by_the_step_alone(bed, client, out):
    secrets = out / "secrets"
    secrets.write_text("HF_TOKEN=hf_verysecret\nexport WANDB_API_KEY='key with space'\n")
    bed.run("chown", bed.user, secrets, user="root")
    tool = out / "tool"
    tool.write_text(
        f'#!/bin/bash\ntest "$HF_TOKEN$WANDB_API_KEY" = "hf_verysecretkey with space" && touch {out}/known\n'
    )
    tool.chmod(0o755)
    text = f'host = "login"\njob_dir = "{bed.shared}/jobs"\ncommand = "{tool}"\nsecrets = "{secrets}"\n'
    client.lab(text)
    refused = client.submit("--", "import", "/hf/model", out / "nemo")
    assert refused.returncode == 78 and "with mode 600: chmod 600" in refused.stderr
    assert "hf_verysecret" not in client.submit("--dry-run", "--", "import", "/hf/model", out / "nemo").stdout
    secrets.chmod(0o600)
    run, _ = client.sent("import", "/hf/model", out / "nemo")
    client.wait_for_end(run)
    assert client.states(run) == ["done"] and (out / "known").exists()
    for file in (bed.shared / "jobs" / run).iterdir():
        assert "verysecret" not in file.read_text() and "key with" not in file.read_text(), file


@pytest.mark.parametrize(
    "key, value, words, code, said",
    [
        ("partition", "btach", [], 78, "invalid partition"),
        ("image", "/not/there.sqsh", [], 78, "the image /not/there.sqsh is not there on login; make it"),
        ("job_dir", "/proc/jobs", [], 78, "/proc/jobs"),
        ("nodes", 99, [], 78, "Slurm refuses the job"),
        ("host", "silent", [], 78, "silent does not answer: ssh: connect to host"),
        ("host", "unknown.invalid", [], 78, "unknown.invalid does not answer"),
        ("partitoin", "batch", [], 2, "unknown key partitoin, did you mean partition?"),
        ("nodes", 2, ["--lrr", "1"], 2, "unknown flag --lrr, did you mean --lr?"),
    ],
)
def test_what_cannot_be_submitted_is_one_line_and_nothing_is(bed, client, out, key, value, words, code, said):
    before = bed.out("squeue", "-h", "-o", "%i")
    lines = {"host": '"login"', "job_dir": f'"{bed.shared}/jobs"', "gpus_per_node": 1, key: json.dumps(value)}
    mounts = ["[env]"] if key != "image" else [f'mounts = ["{bed.shared}:{bed.shared}"]']
    client.lab("\n".join([*(f"{name} = {one}" for name, one in lines.items()), *mounts]))
    train = ["train", "--model", out / "nemo", "--data", out / "x", "--out", out / "run", *words]
    done = client.submit("--", "import", out / "hf", out / "nemo", "then", *train)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert bed.out("squeue", "-h", "-o", "%i") == before and not done.stdout


def test_a_chain_is_whole_or_not_there(bed, client, out):
    """The second sbatch fails, though its test did not: the first job is taken away again."""
    tool = out / "bin" / "sbatch"
    tool.parent.mkdir()
    count = out / "count"
    refuse = f'echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; echo x >>{count}; exit 1'
    tool.write_text(f'#!/bin/bash\ncase "$*" in *afterok*) {refuse} ;; esac\nexec /usr/bin/sbatch "$@"\n')
    tool.chmod(0o755)
    (bed.shared / ".bashrc").write_text(f"PATH={tool.parent}:$PATH\n")
    try:
        done = client.submit("--", *chain(out))
        assert done.returncode == 78 and "QOSMaxSubmitJobPerUserLimit; nothing was submitted" in done.stderr
        assert count.exists() and bed.out("squeue", "-h", "-t", "PD,R", "-o", "%j") == ""
    finally:
        (bed.shared / ".bashrc").unlink()


VARIABLES = """
export SBATCH_EXPORT=NONE SBATCH_PARTITION=urgent SBATCH_TIMELIMIT=20 SBATCH_NO_REQUEUE=1 SBATCH_OUTPUT=/dev/null
export SBATCH_ARRAY_INX=1-2 SQUEUE_PARTITION=urgent SLURM_MEM_PER_CPU=100 SLURM_MEM_PER_GPU=100 SLURM_EXPORT_ENV=NONE
"""


def test_variables_of_a_login_shell_change_no_job(bed, client, out):
    """Slurm's commands would take them before the flags of a script; the last three are those of an outer job."""
    tool = out / "tool"
    tool.write_text(f'#!/bin/bash\n[ "$MINE" = here ] && touch {out}/known\n')
    tool.chmod(0o755)
    text = f'host = "login"\njob_dir = "{bed.shared}/jobs"\ncommand = "{tool}"\npartition = "batch"\n'
    client.lab(f'{text}[env]\nMINE = "here"\n')
    (bed.shared / ".bashrc").write_text(VARIABLES)
    try:
        run, (job,) = client.sent("import", "/hf/model", out / "nemo")
        found = bed.job(job)
        client.wait_for_end(run)
        assert client.states(run) == ["done"] and (out / "known").exists()
    finally:
        (bed.shared / ".bashrc").unlink()
    assert (found["Partition"], found["TimeLimit"], found["Requeue"]) == ("batch", "1-00:00:00", "1")
    assert found["StdOut"].endswith("1-import.log") and "ArrayJobId" not in found


def test_a_run_that_is_not_known(bed, client):
    client.submit("status")
    for verb in ("status", "logs", "stop", "cancel"):
        done = client.submit(verb, "20200101-000000-abc")
        assert done.returncode == 2 and done.stderr.startswith(
            "slipway: submit: there is no run 20200101-000000-abc in "
        )
        assert done.stderr.count("\n") == 1


def test_two_beds_do_not_meet(bed: Bed):
    with Bed() as other:
        assert other.out("sbatch", "--parsable", "-D", other.shared, "--wrap", "sleep 1").isdigit()
        assert other.out("squeue", "-h", "-o", "%u") == other.user and other.user not in bed.out(
            "squeue", "-h", "-o", "%u"
        )


def heed_interrupts() -> None:
    """A shell gives its background jobs SIGINT ignored, and they hand it on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_following_alone(bed, client, out):
    run, _ = client.sent(*chain(out, 40))
    process = subprocess.Popen(
        [SLIPWAY, "submit", "logs", "--follow", run],
        env=bed.client,
        cwd=client.folder,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    wait_for(bed, out / "run.events", "step 2")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and f"the run goes on; look with `slipway submit status {run}`" in said
    assert "ended" in client.status(run) and not client.status(run)["ended"]
    client.submit("cancel", run)
