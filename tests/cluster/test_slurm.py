"""What is sent to Slurm: the scripts of a chain, and how the records that come back are told to people."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slipway.cluster import chain, remote, runs, slurm
from slipway.commands.submit import STEPS
from slipway.errors import PreflightError, UsageError
from test_lab import SLURM, read

ROOT = Path(__file__).parents[2]
DATA = "/shared/it's $(here).jsonl"
CHAIN = shlex.split("import /shared/hf nemo://m then train --model nemo://m --data X --out /shared/run")
CHAIN[CHAIN.index("X")] = DATA
TEXT = SLURM.replace("[env]", 'partition = "batch"\naccount = "lab"\nsecrets = "/lustre/me/secrets"\n[env]')


def scripts(tmp_path: Path, text: str = TEXT, words: list[str] = CHAIN) -> list[str]:
    lab = read(tmp_path, text)
    return [slurm.script(step, lab, "RUN") for step in chain.steps_of(words, lab, STEPS)]


def flags(script: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=?(.*)$", script))


def test_each_step_asks_for_what_it_needs(tmp_path):
    converts, trains = map(flags, scripts(tmp_path))
    assert trains["nodes"] == "5" and trains["gpus-per-node"] == "8" and {"exclusive", "mem"} < trains.keys()
    assert converts["nodes"] == "1" and converts["cpus-per-task"] == "16"
    assert not {"gpus-per-node", "exclusive", "mem"} & converts.keys()
    for one in (converts, trains):
        assert {"requeue", "signal", "open-mode"} < one.keys() and one["ntasks-per-node"] == "1"
        assert one["partition"] == "batch" and one["account"] == "lab"
    assert trains["signal"] == "USR1@600" and trains["output"] == "/lustre/me/jobs/RUN/2-train.log"


def test_a_step_of_one_node_may_ask_for_gpus(tmp_path):
    (one,) = map(flags, scripts(tmp_path, TEXT + "[step.bench]\ngpus_per_node = 2\n", ["bench", "qwen25_7b"]))
    assert one["gpus-per-node"] == "2" and one["cpus-per-task"] == "16" and "exclusive" not in one


def command(script: str) -> list[str]:
    (found,) = re.findall(r"(?s)step\(\) \{\n    set -- (.*?[^\\])\n", script)
    return shlex.split(found.replace("\\\n", " "))


def test_memory_for_each_gpu_takes_the_place_of_all_memory(tmp_path):
    """sbatch refuses both at once, though nobody has asked for --mem."""
    for text, wanted in (("", "0"), ("[sbatch]\nmem-per-gpu = '100G'\n", None), ("[sbatch]\nmem = '1T'\n", "1T")):
        assert flags(scripts(tmp_path, f"{TEXT}\n{text}")[1]).get("mem") == wanted


def test_gpus_are_asked_for_once(tmp_path):
    text = TEXT + "\n[sbatch]\ngres = 'gpu:h100:8'\n"
    with pytest.raises(UsageError, match=r"\[sbatch\] gres is 'gpu:h100:8', and gpus_per_node is 8 for train: set"):
        scripts(tmp_path, text)
    assert flags(scripts(tmp_path, f"gpus_per_node = 0\n{text}")[1])["gres"] == "gpu:h100:8"
    assert flags(scripts(tmp_path, TEXT + "\n[sbatch]\ngres = 'nvme:1'\n")[1])["gpus-per-node"] == "8"


def test_the_words_arrive_as_they_are(tmp_path):
    words = command(scripts(tmp_path)[1])
    assert words[words.index("train") + 1 :] == [*CHAIN[5:], "--grace", "540"]
    assert "--container-image=/lustre/me/slipway.sqsh" in words
    assert "--container-mounts=/lustre/me:/shared,/lustre/me/nemo:/nemo" in words
    assert words[words.index("train") - 1] == "slipway"


def test_without_an_image_nothing_of_pyxis_is_used(tmp_path):
    text = 'job_dir = "/jobs"\ncommand = "/shared/my venv/bin/slipway"\n'.replace("my venv", "venv")
    words = command(scripts(tmp_path, text, ["import", "/a", "/b"])[0])
    assert words[:3] == ["$(type -P srun)", "--wait=60", "--kill-on-bad-exit=1"]
    assert words[3:] == ["/shared/venv/bin/slipway", "import", "/a", "/b"]


@pytest.mark.parametrize(
    "image, name",
    [
        ("ghcr.io/org/slipway:1", "ghcr.io#org/slipway:1"),
        ("ghcr.io#org/slipway:1", "ghcr.io#org/slipway:1"),
        ("docker://localhost:5000/slipway", "localhost:5000#slipway"),
        ("org/slipway:1", "org/slipway:1"),
        ("/lustre/a.b/slipway.sqsh", "/lustre/a.b/slipway.sqsh"),
    ],
)
def test_images_as_pyxis_names_them(image, name):
    assert slurm.pyxis_name(image) == name


def test_scripts_are_good_bash(tmp_path):
    for script in scripts(tmp_path):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        file = tmp_path / "script.sh"
        file.write_text(script)
        shellcheck = Path(sys.executable).parent / "shellcheck"
        done = subprocess.run([shellcheck, "-e", "SC1091,SC2015,SC2016", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


OURS = (
    "STATE VERB SECRETS NAMES MOST_RESTARTS MOST_LOSSES RESTARTS SILENT NOT_STARTED ME COMMAND NODES code work watcher "
)
OURS += "tries begins"
SRUN = """#!/bin/bash
/usr/bin/env -0 >"$SEEN"
printf '%s\\n' "$@" >"$SEEN.words"
exit "${CODE:-0}"
"""


@pytest.mark.parametrize("code", [0, 3])
def test_variables_of_a_person_and_those_of_the_script_do_not_meet(tmp_path, code):
    """The whole script of a step, with an srun that writes down what it gets."""
    wanted = {name: f"it's {name}" for name in OURS.split()} | {"PATH": "/opt/nothing", "HOME": "/me"}
    wanted |= {"SEEN": str(tmp_path / "seen"), "CODE": str(code), "SRUN_CPUS_PER_TASK": "3"}
    secrets = {"HF_TOKEN": "hf_x y", "STATE": "of a secret", "SECRETS": "/nowhere", "NAMES": "n", "size": "1"}
    lines = zip(("", "  ", "\t", "export ", " export\t"), secrets.items(), strict=True)  # as a shell reads them
    (tmp_path / "secrets").write_text(
        "".join(f"{before}{name}={shlex.quote(value)}\n" for before, (name, value) in lines)
    )
    (tmp_path / "secrets").chmod(0o600)
    text = f'job_dir = "{tmp_path}"\nimage = "/a.sqsh"\nmounts = ["/a:/shared"]\n'
    text += f'secrets = "{tmp_path}/secrets"\n[env]\n'
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in wanted.items())
    (script,) = scripts(tmp_path, text, ["import", "/shared/a", "/shared/b c"])
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "1-import.log").touch()  # Slurm's, with what the script prints
    tools = {
        "srun": SRUN,
        "scontrol": f"#!/bin/bash\necho ' JobState=RUNNING Command={tmp_path}/RUN/1-import.sbatch '\n",
    }
    (tmp_path / "bin").mkdir()
    for name, content in tools.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    around = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **around}
    )
    assert done.returncode == code and not done.stderr, done.stderr
    assert (tmp_path / "RUN" / "1-import.exit").read_text().split()[0] == str(code)
    seen = dict(one.split("=", 1) for one in (tmp_path / "seen").read_text().split("\0") if one)
    assert {name: seen.get(name) for name in wanted | secrets} == wanted | secrets
    words = (tmp_path / "seen.words").read_text().splitlines()
    assert words[-4:] == ["slipway", "import", "/shared/a", "/shared/b c"]
    (named,) = (word.partition("=")[2].split(",") for word in words if word.startswith("--container-env="))
    assert set(named) == set(wanted | secrets)


@pytest.mark.parametrize(
    "scontrol, noted",
    [
        ("echo ' JobState=RUNNING Command=/x/RUN/1-import.sbatch '", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo ' JobState=RUNNING Command=/x/ANOTHER/1-import.sbatch '", False),
        ("echo ' JobState=COMPLETING Command=/x/RUN/1-import.sbatch '", False),
    ],
)
def test_a_step_that_was_killed_has_failed_unless_slurm_ends_or_has_forgotten_its_job(tmp_path, scontrol, noted):
    """Then the code of srun is there for `status`, which says more than that the step failed."""
    (script,) = scripts(
        tmp_path, f'job_dir = "{tmp_path}"\nimage = "/a.sqsh"\nmounts = ["/a:/a"]\n', ["import", "/a/b", "/a/c"]
    )
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "1-import.log").touch()
    (tmp_path / "bin").mkdir()
    for name, content in {"srun": "exit 137", "scontrol": scontrol}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    around = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **around}
    )
    assert done.returncode == 137, done.stderr
    assert (tmp_path / "RUN" / "1-import.exit").exists() == noted
    assert (tmp_path / "RUN" / "1-import.last").read_text().startswith("137 ")


def test_no_secret_and_no_name_of_one_is_in_a_script(tmp_path):
    for script in scripts(tmp_path):
        assert "HF_TOKEN" not in script and "SECRETS=/lustre/me/secrets\n" in script


def test_the_tail_of_the_shipped_script_is_that_of_submit():
    """deploy/slurm.sbatch is for those who write their own; what it does about a lost node is the same text."""
    ours = (ROOT / "entrypoints" / "slipway" / "cluster" / "step.sh").read_text()
    shipped = (ROOT / "deploy" / "slurm.sbatch").read_text()
    for name in ("is_running", "lost_nodes", "without_lost_nodes"):
        (one,) = re.findall(rf"(?ms)^{name}\(\) \{{.*?^\}}", ours)
        assert one in shipped


# ---------------------------------------------------------------------------- what comes back


def records(*steps: list[str], meta: str = "e30=") -> runs.Overview:
    return runs.overview([["run", "R"], ["now", "1000"], ["meta", meta], *steps])


def queue(name: str, state: str, reason: str = "None") -> list[str]:
    return ["queue", name, state, reason, "n[1-2]", "1:00", "1-00:00:00", "N/A"]


def step(name: str, exit_code: str = "", marks: str = "", starts: int = 1) -> list[str]:
    return ["step", name, "7", exit_code, marks, "", str(starts)]


@pytest.mark.parametrize(
    "given, states, code",
    [
        ([step("1-a", "0 1"), step("2-b", "0 2")], ["done", "done"], 0),
        ([step("1-a", "0 1"), step("2-b"), queue("2-b", "RUNNING")], ["done", "running"], 0),
        ([step("1-a", "0 1"), step("2-b", "65 2")], ["done", "failed"], 65),
        ([step("1-a", "65 1"), step("2-b", starts=0)], ["failed", "not started"], 65),
        ([step("1-a", "75 1"), step("2-b", starts=0)], ["stopped", "not started"], 75),
        ([step("1-a", "138 1", "stop")], ["stopped"], 75),
        ([step("1-a", "75 1", "cancelled")], ["cancelled"], 75),
        ([step("1-a", "", "cancelled", 0)], ["cancelled"], 1),
        ([step("1-a"), queue("1-a", "PENDING", "BeginTime")], ["waiting"], 0),
        ([step("1-a"), ["sacct", "7", "TIMEOUT"]], ["failed"], 1),
        ([step("1-a"), ["sacct", "7", "COMPLETED"]], ["done"], 0),
        ([step("1-a")], ["failed"], 1),
        ([step("1-a", starts=0), queue("1-a", "PENDING", "Dependency")], ["waiting"], 0),
    ],
)
def test_the_state_of_each_step(given, states, code):
    found = records(*given)
    assert [one.state for one in found.steps] == states and found.exit_code == code
    assert str(found) and json.dumps(found.as_dict())


def queued_again(*more: list[str]) -> list[list[str]]:
    """A step that has left a code and is queued again."""
    return [step("1-a", "0 1"), ["step", "2-b", "8", "", "", "75 900", "1"], step("3-c", starts=0), *more]


def test_a_job_that_is_queued_again_has_not_ended_whatever_slurm_says():
    for given in (["queue", "2-b", "REQUEUED", "None"], ["queue", "2-b", "PENDING", "BeginTime"]):
        found = records(*queued_again([*given, "", "0:00", "1:00", "N/A"], queue("3-c", "PENDING", "Dependency")))
        assert [one.state for one in found.steps] == ["done", "waiting", "waiting"] and not found.has_ended
    left = ["step", "2-b", "8", "137 900", "", "137 900", "1"]  # a start that was killed as Slurm queued it again
    found = records(step("1-a", "0 1"), left, queue("2-b", "PENDING", "BeginTime"))
    assert found.steps[1].state == "waiting" and not found.has_ended and found.exit_code == 0
    assert records(step("1-a", "0 1"), left, queue("2-b", "COMPLETING")).steps[1].state == "failed"
    # While Slurm does not answer nobody knows: what the job has left is also there if it is queued again.
    found = records(*queued_again(["silent", "Slurmctld is DOWN"]))
    assert [one.state for one in found.steps] == ["done", "not known", "not known"] and not found.has_ended
    assert found.exit_code == 0 and "Slurm does not answer (Slurmctld is DOWN)" in str(found)
    # It answers and knows nothing of the job: then that was the end.
    assert "Slurm has forgotten it; submit the same chain again" in records(*queued_again()).steps[1].said
    assert "Slurm has" not in records(*queued_again(["sacct", "8", "TIMEOUT"])).steps[1].said
    assert [one.state for one in records(*queued_again()).steps] == ["done", "stopped", "not started"]


def test_what_ended_badly_is_known_without_slurm():
    found = records(step("1-a", "65 1"), step("2-b", starts=0), ["silent", "DOWN"])
    assert [one.state for one in found.steps] == ["failed", "not started"] and found.exit_code == 65


@pytest.mark.parametrize("first", [step("1-a", "0 1"), step("1-a", starts=0)])
def test_what_a_killed_controller_has_forgotten_is_told_with_the_cure(first):
    held = queue("1-a", "PENDING", "JobHeldUser")
    found = records(first, held, step("2-b", starts=0), step("3-c", starts=0))
    assert "job 7 is still in its queue; take it away with `slipway submit cancel`" in str(found)
    assert "Slurm has forgotten it" in found.steps[1].said
    assert "warning" not in records(first, held, step("2-b"), queue("2-b", "PENDING")).as_dict()


def test_the_runs_own_progress_is_shown():
    status = {"state": "running", "step": 12, "steps": 40, "loss": 2.5, "seconds_left": 900,
              "updated": "1970-01-01T00:16:30Z"}  # fmt: skip
    progress = ["progress", "1-train", "/lustre/run", base64.b64encode(json.dumps(status).encode()).decode()]
    said = str(records(step("1-train"), queue("1-train", "RUNNING"), progress))
    assert "run: running, step 12 of 40, loss 2.500000, 14.8 min left" in said
    broken = ["progress", "1-train", "/lustre/run", "bm90IGpzb24="]
    assert "cannot be read" in str(records(step("1-train"), queue("1-train", "RUNNING"), broken))


TEN = [f"{number}-inspect" for number in range(1, 13)]


def test_ten_steps_are_in_their_order():
    """Also where they are told in another one, and the first of them ended badly."""
    given = [step(name, "65 1" if name == TEN[0] else "", starts=int(name == TEN[0])) for name in sorted(TEN)]
    found = records(*given, *(["sacct", "7", "CANCELLED"] for _ in TEN))
    assert [one.name for one in found.steps] == TEN
    assert [one.state for one in found.steps] == ["failed", *["not started"] * 11] and found.exit_code == 65


def test_the_login_node_names_ten_steps_in_their_order(tmp_path):
    """For status, logs, stop and cancel, which all find the run in the same way."""
    (tmp_path / "20261127-000000-bcd").mkdir()
    for number, name in enumerate(TEN):
        (tmp_path / "20261127-000000-bcd" / f"{name}.id").write_text(f"{number}\n")
        (tmp_path / "20261127-000000-bcd" / f"{name}.log").write_text(f"log of {name}\n")
    lab = read(tmp_path, f'job_dir = "{tmp_path}"\n')
    said: list[str] = []
    remote.call(None, slurm.call("logs", lab, RUN="", WANTED="", LINES_SHOWN="1"), said.append)
    assert said == ["log of 12-inspect"]
    text = slurm.call("find_run", lab, RUN="") .replace("main find_run", 'find_run; record names "${NAMES[@]}"; '
        'record ids "${IDS[@]}"; record end; exit')  # fmt: skip
    found = {record[0]: record[1:] for record in remote.call(None, text)}
    assert found["names"] == TEN and found["ids"] == list(map(str, range(12)))


def test_a_chain_that_was_sent_in_part_is_named():
    assert "was not submitted whole" in str(records(step("1-a", starts=0), queue("1-a", "PENDING"), meta=""))


# ---------------------------------------------------------------------------- one call


def test_a_call_without_a_host_runs_here():
    text = "main() { printf 'slipway\\tx\\ty\\nslipway\\tend\\n'; exit; }\nmain\n"
    assert remote.call(None, text) == [["x", "y"], ["end"]]


def test_what_a_login_shell_prints_is_no_record():
    said: list[str] = []
    remote.call(None, "echo Welcome; printf 'slipway\\tend\\n'; exit\n", said.append)
    assert said == ["Welcome"]


@pytest.mark.parametrize("text, said", [("exit 3\n", "ended with 3"), ("no-such-command; exit 4\n", "not found")])
def test_a_call_that_ends_early_is_an_error(text, said):
    with pytest.raises(PreflightError, match=said):
        remote.call(None, text)


@pytest.mark.parametrize("text, is_good", [("A=1\nexport B=2\n", True), ("", True), ("A=1\r\nB=2\r\n", False)])
def test_line_ends_of_windows_do_not_become_a_part_of_a_secret(tmp_path, text, is_good):
    secrets = tmp_path / "secrets"
    secrets.write_bytes(text.encode())
    secrets.chmod(0o600)
    lab = read(tmp_path, TEXT.replace("/lustre/me/jobs", f"{tmp_path}/jobs"))
    call = slurm.call("check_files", lab, SOURCES=[], IMAGES=[], SECRETS=str(secrets))
    if is_good:
        assert remote.call(None, call) == [["end"]]
    else:
        with pytest.raises(
            PreflightError, match=r"has line ends of Windows on .*: take them out with sed -i 's/\\r//' /"
        ):
            remote.call(None, call)


def test_variables_of_a_login_shell_are_no_flags_of_slurms_commands(tmp_path, monkeypatch):
    """Else squeue leaves out the run's jobs, sbatch moves them, and srun takes what an outer job has."""
    for name in ("SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SBATCH_EXPORT", "SLURM_EXPORT_ENV", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    kept = {"SLURM_CONF": "theirs", "SBATCH_ACCOUNT": "theirs", "SBATCH_QOS": "theirs"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "sbatch").write_text("#!/bin/bash\nenv\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lab = read(tmp_path, TEXT)

    def seen(function: str) -> dict[str, str]:
        said: list[str] = []
        remote.call(None, slurm.call(function, lab), said.append)
        pairs = (line.partition("=")[::2] for line in said if re.match("S(LURM|BATCH|RUN|QUEUE|CANCEL)_|LC_ALL", line))
        return dict(pairs)

    assert seen("env") == kept | {"LC_ALL": "C"}
    # The script has an account, and no quality of service. A job has the person's language.
    theirs = {"SLURM_CONF": "theirs", "SBATCH_QOS": "theirs"}
    submits = f"sbatch_with {shlex.quote(scripts(tmp_path)[0])}"
    assert seen(submits) == theirs | {"LC_ALL": "de_DE.UTF-8"}
    monkeypatch.delenv("LC_ALL")
    assert seen(submits) == theirs


def test_a_host_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PreflightError) as error:
        remote.call("slipway-no-such-host.invalid", "true")
    assert "slipway-no-such-host.invalid does not answer: ssh: Could not resolve" in str(error.value)


def test_nothing_is_sent_where_a_word_is_wrong(tmp_path, slipway):
    (tmp_path / "lab.toml").write_text(TEXT.replace('"login"', '"slipway-no-such-host.invalid"'))
    done = slipway("submit", "--", "import", "/shared/hf", "nemo://m", "--mpt", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean --mtp?" in done.stderr
    shown = slipway("submit", "--dry-run", "--", *CHAIN, cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.count("#!/bin/bash") == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (["statsu"], "'statsu' is no step, did you mean status?"),
        (["status", "a", "b"], "'b' is one word too many"),
        (["status", "../x"], "'../x' is no run"),
        (["status", "\udcff"], "is no run; a name is like"),  # the byte 0xff, which was called an answer of the cluster
        (["logs", "--step", "\udcff"], "it must be a step's number or verb"),
        (["cancel", "--dry-run"], "--dry-run is for a chain"),
        (["status", "--lines", "5"], "submit status: --lines belongs to `slipway submit logs`"),
        (["--lines", "5", "--", "import", "/shared/a", "/shared/b"], "--lines belongs to `slipway submit logs`"),
        (["logs", "--follow", "--lines", "5"], "--follow shows all lines of all steps; leave out --lines"),
        (["status", "--step", "train"], "submit status: --step belongs to `slipway submit logs`"),
        (["stop", "--follow"], "submit stop: --follow is for a chain and for `slipway submit logs`"),
        (["logs", "--follow", "--step", "train"], "--follow shows all steps; leave out --step"),
        ([], "WORDS is missing"),
        (["--", "import", "/shared/a", ""], "submit: one of WORDS is empty; see `slipway submit --help`"),
        (["--step", "train", "--", "import", "/shared/a", "/shared/b"], "--step belongs to `slipway submit logs`"),
    ],
)
def test_wrong_words_of_submit_itself(tmp_path, slipway, words, said):
    (tmp_path / "lab.toml").write_text(TEXT)
    done = slipway("submit", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("note, code", [("75 1795661678", 75), ("0 1", 0), ("", 1), ("x", 1), ("²", 1), ("99999 1", 1)])
def test_a_note_of_a_job_may_be_spoiled(note, code):
    assert runs._code(note) == code


def test_images_of_steps_are_all_looked_for(tmp_path):
    lab = read(tmp_path, TEXT + '[step.import]\nimage = "/lustre/me/other.sqsh"\npartition = "cpu"\n')
    text = slurm.submission(chain.steps_of(CHAIN, lab, STEPS), lab, "RUN")
    assert "IMAGES=(/lustre/me/other.sqsh /lustre/me/slipway.sqsh)" in text and "PARTITIONS=(cpu batch)" in text
