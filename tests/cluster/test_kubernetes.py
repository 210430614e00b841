"""lab.toml of Kubernetes: every manifest is what the API servers take, strictly, and has what deploy/'s have."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml as reader
from hypothesis import given
from hypothesis import strategies as some
from slipway import cli
from slipway.cluster import chain, kubectl, kubernetes, yaml
from slipway.commands.submit import STEPS
from slipway.errors import PreflightError, UsageError
from test_deploy import CRDS, DEPLOY, crd_of, documents
from test_lab import read

LAB = """
kind = "kubernetes"
image = "ghcr.io#org/slipway:1"
mounts = ["models/deepseek:/models", "models/nemo:/nemo", "scratch:/shared"]
nodes = 4
secrets = "hub"
namespace = "research"

[env]
NEMO_HOME = "/nemo"
HF_HOME = "/shared/hf"

[limits]
"rdma/hca" = 1
memory = "1Ti"

[node_selector]
gpu = "h100"
"""
WORDS = shlex.split(
    "import hf://org/model nemo://m then train --model nemo://m --data /shared/x.jsonl --out /shared/run then "
    "export /shared/run /models/out"
)
QUEUED = LAB.replace("nodes = 4", 'nodes = 4\nqueue = "team"')
WITH_TRAINER = LAB.replace("nodes = 4", "nodes = 4\ntrainer = true")


def manifests(tmp_path: Path, text: str = LAB, words: list[str] = WORDS) -> list[dict[str, Any]]:
    lab = read(tmp_path, text)
    return kubectl.noted(chain.steps_of(words, lab, STEPS), lab, "slipway-20261126-091500-bcd")


@pytest.mark.skipif(not CRDS.is_dir(), reason="the CRDs of JobSet and the Trainer are not beside the repository")
@pytest.mark.parametrize("text", [LAB, QUEUED, WITH_TRAINER, LAB.replace('secrets = "hub"\n', "")], ids=range(4))
@pytest.mark.parametrize("words", [WORDS, WORDS[WORDS.index("then") + 1 : -4]], ids=["chain", "train"])
def test_every_manifest_fits_the_definitions_strictly(tmp_path, text, words):
    import jsonschema
    from kubernetes_validate import validate

    for document in manifests(tmp_path, text, words):
        assert reader.safe_load(yaml.dump(document)) == document
        jsonschema.validate(document, crd_of(document))
        spec = document["spec"]
        jobs = spec.get("replicatedJobs") or spec.get("template", {}).get("spec", {}).get("replicatedJobs", [])
        for job in jobs:  # the Jobs that JobSet makes have Kubernetes' own definition
            made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
            validate(made, "1.30", strict=True)
        spec["nonsense"] = 1
        with pytest.raises(jsonschema.ValidationError, match="nonsense"):
            jsonschema.validate(document, crd_of(document))


def test_steps_wait_for_each_other_and_have_what_they_need(tmp_path):
    (jobset,) = manifests(tmp_path)
    converts, trains, exports = jobset["spec"]["replicatedJobs"]
    assert "dependsOn" not in converts and trains["dependsOn"] == [{"name": "1-import", "status": "Complete"}]
    assert exports["dependsOn"] == [{"name": "2-train", "status": "Complete"}]
    specs = [job["template"]["spec"] for job in (converts, trains, exports)]
    assert [spec["completions"] for spec in specs] == [1, 4, 1]
    (one,), (two,), _ = (spec["template"]["spec"]["containers"] for spec in specs)
    assert two["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "1", "memory": "1Ti"}
    assert one["resources"] == {"requests": {"cpu": "16"}} and one["image"] == "ghcr.io/org/slipway:1"
    assert {"name": "NNODES", "value": "4"} in two["env"] and two["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert two["args"] == ["train", *WORDS[WORDS.index("train") + 1 : WORDS.index("then", 5)], "--grace", "540"]
    pod = specs[1]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 540 and pod["nodeSelector"] == {"gpu": "h100"}
    mounts = {one["mountPath"]: one for one in two["volumeMounts"]}
    assert mounts["/models"]["subPath"] == "deepseek" and mounts["/models"]["name"] == mounts["/nemo"]["name"]
    assert {"/dev/shm", "/tmp", "/shared"} < mounts.keys()
    assert len([one for one in pod["volumes"] if "persistentVolumeClaim" in one]) == 2


def test_a_step_of_one_node_may_ask_for_gpus(tmp_path):
    (jobset,) = manifests(tmp_path, LAB + "[step.bench]\ngpus_per_node = 2\n", ["bench", "qwen25_7b"])
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "2"}, "requests": {"cpu": "16"}}


def test_pods_are_those_that_deploy_ships(tmp_path):
    """What makes a stop no failure, and a user who is not root: the same as in the manifests to write by hand."""
    shipped = documents(DEPLOY / "kubernetes" / "jobset.yaml")[0]["spec"]
    ours = manifests(tmp_path)[0]["spec"]
    assert ours["failurePolicy"] == shipped["failurePolicy"]
    theirs, job = (spec["replicatedJobs"][index]["template"]["spec"] for spec, index in ((shipped, 0), (ours, 1)))
    text = json.dumps(job["podFailurePolicy"]).replace('"step"', '"train"')
    assert json.loads(text) == theirs["podFailurePolicy"] and job["backoffLimit"] == theirs["backoffLimit"]
    pods = [spec["template"]["spec"] for spec in (theirs, job)]
    for key in ("securityContext", "restartPolicy", "terminationGracePeriodSeconds"):
        assert pods[0][key] == pods[1][key]
    assert pods[0]["containers"][0]["securityContext"] == pods[1]["containers"][0]["securityContext"]


def test_kueues_queue_is_a_label(tmp_path):
    assert manifests(tmp_path, QUEUED)[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def test_a_trainjob_has_the_other_steps_in_its_runtime(tmp_path):
    runtime, job = manifests(tmp_path, WITH_TRAINER)
    names = [one["name"] for one in runtime["spec"]["template"]["spec"]["replicatedJobs"]]
    assert (
        names == ["1-import", "node", "3-export"] and job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    )
    assert job["spec"]["trainer"]["numNodes"] == 4 and job["spec"]["trainer"]["args"][0] == "train"
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]
    assert node["containers"][0]["name"] == "node" and "args" not in node["containers"][0]
    with pytest.raises(UsageError, match="a chain needs one `train`"):
        manifests(tmp_path, WITH_TRAINER, ["import", "hf://a/b", "nemo://m"])


def test_no_word_is_taken_for_a_variable_and_no_secret_is_shown(tmp_path):
    (jobset,) = manifests(tmp_path, LAB, ["export", "/shared/$(HF_TOKEN)", "/shared/out"])
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["export", "/shared/$$(HF_TOKEN)", "/shared/out"]


def as_kubernetes_expands(text: str) -> str:
    """What a container gets of a text: k8s.io/kubernetes/third_party/forked/golang/expansion, with no variable set."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda match: "$" if match[1] == "$" else "", text)


@pytest.mark.parametrize("value", ["p$$w", "$(A)", "$$(A)", "a$", "$$$", "$HOME", "plain"])
def test_dollars_arrive_as_they_were_written(tmp_path, value):
    text = LAB.replace("[limits]", f"A = '{value}'\n[limits]").replace("nodes = 4", f"command = \"/x/'{value}'\"")
    (jobset,) = manifests(tmp_path, text, ["export", f"/shared/{value}", "/shared/out"])
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    given = [
        *container["command"],
        container["args"][1],
        *(one["value"] for one in container["env"] if one["name"] == "A"),
    ]
    assert [as_kubernetes_expands(one) for one in given] == [f"/x/{value}", f"/shared/{value}", value]


leaves = (
    some.none() | some.booleans() | some.integers() | some.text(max_size=12) | some.sampled_from(["no", "1e3", "a: b"])
)


@given(some.recursive(leaves, lambda one: some.lists(one, max_size=3) | some.dictionaries(some.text(max_size=6), one)))
def test_yaml_is_read_as_what_was_written(value):
    if isinstance(value, (dict, list)) and value:
        assert reader.safe_load(yaml.dump(value)) == value


# ---------------------------------------------------------------------------- with kubectl

FAKE = """#!/usr/bin/env python3
import json, os, sys
words = [word for word in sys.argv[1:] if not word.startswith(("--context", "--namespace"))]
with open(os.environ["FAKE"] + "/calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
answers = json.load(open(os.environ["FAKE"] + "/answers"))
for begin, answer in answers.items():
    if " ".join(words).startswith(begin):
        if isinstance(answer, str) and answer.startswith("error"):
            sys.exit(print(answer, file=sys.stderr) or 1)
        print(answer if isinstance(answer, str) else json.dumps(answer))
        break
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A kubectl that answers as it is told; its calls are written down."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text(FAKE)
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    (tmp_path / "lab.toml").write_text(LAB)

    def answers(**given: Any) -> None:
        (tmp_path / "answers").write_text(json.dumps({key.replace("_", " "): value for key, value in given.items()}))

    answers()
    return answers


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_a_chain_is_tried_on_the_server_and_then_applied(tmp_path, cluster, slipway):
    done = slipway("submit", "--", *WORDS, cwd=tmp_path)
    assert done.returncode == 0 and "submit: run slipway-2" in done.stdout, done.stderr
    asked, tried, applied = calls(tmp_path)
    assert asked == shlex.split("--namespace=research get pvc/models pvc/scratch secret/hub -o name")
    assert "--dry-run=server" in tried and "--dry-run=server" not in applied


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"get pvc": 'error: persistentvolumeclaims "models" not found'}, 'persistentvolumeclaims "models" not found'),
        ({"apply --dry": 'error: no matches for kind "JobSet"'}, 'kubectl: error: no matches for kind "JobSet"'),
    ],
)
def test_what_the_cluster_has_not_is_one_line_and_nothing_is_applied(tmp_path, cluster, slipway, answer, said):
    cluster(**answer)
    done = slipway("submit", "--", *WORDS, cwd=tmp_path)
    assert done.returncode == 78 and said in done.stderr and done.stderr.count("\n") == 1
    assert all("apply" not in words or "--dry-run=server" in words for words in calls(tmp_path))


def jobset(tmp_path: Path, status: dict[str, Any], **spec: Any) -> dict[str, Any]:
    found = manifests(tmp_path)[0]
    return {**found, "status": status, "spec": {**found["spec"], **spec}}


def counted(**counts: dict[str, int]) -> list[dict[str, Any]]:
    return [{"name": name[1:].replace("_", "-"), **count} for name, count in counts.items()]


@pytest.mark.parametrize(
    "status, states, code",
    [
        ({}, ["waiting"] * 3, 0),
        ({"replicatedJobsStatus": counted(_1_import={"active": 1})}, ["running", "waiting", "waiting"], 0),
        ({"replicatedJobsStatus": counted(_1_import={"succeeded": 1}, _2_train={"active": 1})},
         ["done", "running", "waiting"], 0),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, ["done"] * 3, 0),
        ({"replicatedJobsStatus": counted(_1_import={"succeeded": 1}),
          "conditions": [{"type": "Failed", "status": "True"}]}, ["done", "failed", "not started"], 1),
    ],
)  # fmt: skip
def test_the_state_of_each_step(tmp_path, cluster, slipway, status, states, code):
    one = jobset(tmp_path, status)
    run_status = {
        "state": "running",
        "step": 3,
        "steps": 9,
        "loss": 1.5,
        "seconds_left": 60,
        "updated": "2026-11-26T09:15:00Z",
    }
    cluster(get_jobset_slipway=one, get_jobset=dict(items=[one]), get_pods="pod/x", exec=run_status)
    done = slipway("submit", "status", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [step["state"] for step in found["steps"]] == states and done.returncode == code
    if states[1] == "running":
        assert "step 3 of 9, loss 1.5" in found["steps"][1]["progress"]


def test_logs_stop_and_cancel(tmp_path, cluster, slipway):
    one = jobset(tmp_path, {"replicatedJobsStatus": counted(_1_import={"active": 1})})
    name = one["metadata"]["name"]
    cluster(get_jobset_slipway=one, get_jobset=dict(items=[one]), get_pods="pod/x", logs="what it printed")
    assert slipway("submit", "logs", cwd=tmp_path).stdout == "what it printed\n"
    done = slipway("submit", "logs", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"command": "submit", "run": name, "lines": ["what it printed"]}
    assert (
        "no step nonsense; there are 1-import" in slipway("submit", "logs", "--step", "nonsense", cwd=tmp_path).stderr
    )
    assert slipway("submit", "stop", cwd=tmp_path).returncode == 0
    assert slipway("submit", "cancel", name, cwd=tmp_path).returncode == 0
    done = slipway("submit", "cancel", "other", cwd=tmp_path)
    assert done.returncode == 2 and f"there is no run other; the newest are {name}" in done.stderr
    words = calls(tmp_path)
    assert any("patch" in one and '{"spec": {"suspend": true}}' in one for one in words)
    assert ["--namespace=research", "delete", "jobset", name, "--wait=false"] in words


def test_logs_of_all_steps_are_followed_to_the_end_of_the_run(tmp_path, cluster, slipway):
    one = jobset(tmp_path, {"replicatedJobsStatus": counted(_1_import={"succeeded": 1}, _2_train={"succeeded": 1}),
                            "conditions": [{"type": "Failed", "status": "True"}]})  # fmt: skip
    pods = {f"get pods -l {kubectl.OF_RUN}={one['metadata']['name']},{kubectl.OF_STEP}={step}": f"pod/{step}"
            for step in ("1-import", "2-train", "3-export")}  # fmt: skip
    begun = {"get pod/1": "Succeeded", "get pod/2": "Succeeded", "get pod/3": "Pending"}
    logs = {"logs pod/1-import": "read", "logs pod/2-train": "learned", "logs pod/3-export": "written"}
    cluster(get_jobset_slipway=one, get_jobset=dict(items=[one]), **pods, **begun, **logs)
    done = slipway("submit", "logs", "--follow", cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    shown, _, states = done.stdout.partition("run slipway-")
    assert shown.splitlines() == ["==> 1-import", "read", "==> 2-train", "learned"]
    assert "3-export" in states and "failed" in states


@pytest.mark.parametrize(
    "words, where, said",
    [
        (
            ["submit", "--follow", "--", *WORDS],
            "status",
            "submit: the run goes on; look with `slipway submit status slip",
        ),
        (["submit", "logs", "--follow"], "status", "submit: the run goes on; look with `slipway submit status`"),
        (
            ["submit", "logs", "--follow", "--step", "1"],
            "print_logs",
            "submit: the run goes on; look with `slipway submit",
        ),
        (
            ["submit", "--", *WORDS],
            "apply",
            "submit: interrupted while the chain was sent; `slipway submit status slip",
        ),
    ],
)
def test_ctrl_c_never_says_to_submit_again(tmp_path, cluster, monkeypatch, capsys, words, where, said):
    """The same command would send a second chain, whose jobs write into the folders of the first."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kubectl, "pod_of", lambda *_: ("slipway-x", "pod/x"))
    monkeypatch.setattr(kubectl, where, interrupted)
    assert cli.main(words) == 130
    assert said in (shown := capsys.readouterr()).out and not shown.err


def test_without_kubectl_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PreflightError, match="there is no kubectl on this machine"):
        kubectl.kubectl(read(tmp_path, LAB), ["get", "x"])


def test_dry_run_prints_what_would_be_applied(tmp_path, slipway):
    (tmp_path / "lab.toml").write_text(LAB)
    done = slipway("submit", "--dry-run", "--", *WORDS, cwd=tmp_path)
    assert done.returncode == 0 and [one["kind"] for one in reader.safe_load_all(done.stdout)] == ["JobSet"]
    assert kubernetes.QUEUE not in done.stdout
