"""deploy/: every manifest is valid and has what a run on several nodes needs; Slipway understands what it sets."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from slipway.cli import COMMANDS, parse
from slipway.errors import DataError, LostPeer, PreflightError, Stopped, UsageError
from slipway.launch import launchers

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod_of(path: Path) -> dict[str, Any]:
    """The pod that a manifest makes: its one `spec` with containers."""

    def search(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            return ([node] if "containers" in node else []) + [p for value in node.values() for p in search(value)]
        return [p for value in node for p in search(value)] if isinstance(node, list) else []

    (pod,) = search(documents(path))
    return pod


def arguments_of(text: str) -> list[str]:
    """The words after `train` of the one command in a file."""
    (found,) = re.findall(r"(?:args: |command: &train\s+)\[(.*?)\]", text, re.S)
    words = [word.strip().strip('"') for word in found.split(",")]
    assert words[0] == "train"
    return words[1:]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_pods_have_shared_memory_rdma_and_time_to_save(path):
    pod = pod_of(path)
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    # Not IPC_LOCK, which has no effect without root: the node must set no limit.
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] and "/tmp" in mounts
    assert pod["securityContext"]["runAsNonRoot"]
    text = path.read_text()
    assert "rdma/hca: 1" in text and "nvidia.com/gpu: 8" in text
    arguments = parse("train", COMMANDS["train"], arguments_of(text))[1]
    assert pod["terminationGracePeriodSeconds"] > arguments["grace"]


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_indexed_pods_are_told_how_many_they_are(name):
    text = (DEPLOY / "kubernetes" / name).read_text()
    (completions,) = re.findall(r"completions: (\d+)", text)
    (container,) = pod_of(DEPLOY / "kubernetes" / name)["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert re.findall(r"parallelism: (\d+)", text) == [completions] and "completionMode: Indexed" in text
    hints = launchers.kubernetes_job({**env, "JOB_COMPLETION_INDEX": "1", "HOSTNAME": "train-1.train"})
    assert hints.nodes.value == int(completions) and hints.node_rank.value == 1
    assert hints.master_addr.value == "train-0.train"


def test_the_jobs_service_finds_its_pods():
    service, job = documents(DEPLOY / "kubernetes" / "job.yaml")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def jobs() -> dict[str, dict[str, Any]]:
    """File → the spec of the Job whose pods run, at whatever level it is."""
    jobset = documents(DEPLOY / "kubernetes" / "jobset.yaml")[0]["spec"]
    runtime = documents(DEPLOY / "kubernetes" / "trainjob.yaml")[0]["spec"]["template"]["spec"]
    found = {
        name: spec["replicatedJobs"][0]["template"]["spec"]
        for name, spec in (("jobset", jobset), ("trainjob", runtime))
    }
    return found | {"job": documents(DEPLOY / "kubernetes" / "job.yaml")[1]["spec"]}


@pytest.mark.parametrize("name", ["job", "jobset", "trainjob"])
def test_a_stop_or_a_lost_node_is_no_failure_and_what_cannot_work_is_not_tried_again(name):
    spec = jobs()[name]
    (container,) = spec["template"]["spec"]["containers"]
    ignored, drained, given_up = spec["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In"}
    assert ignored == {"action": "Ignore", "onExitCodes": {**codes, "values": [LostPeer.exit_code, Stopped.exit_code]}}
    assert drained == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    final = [UsageError.exit_code, DataError.exit_code, PreflightError.exit_code]
    assert given_up == {"action": "FailJob", "onExitCodes": {**codes, "values": final}}


def test_sets_of_jobs_end_where_another_try_would_fail_too():
    jobset = documents(DEPLOY / "kubernetes" / "jobset.yaml")[0]["spec"]
    runtime = documents(DEPLOY / "kubernetes" / "trainjob.yaml")[0]["spec"]["template"]["spec"]
    for spec in (jobset, runtime):
        (rule,) = spec["failurePolicy"]["rules"]
        assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        assert 1 <= spec["failurePolicy"]["maxRestarts"] <= 10


# The definitions of JobSet and the Trainer, which are not ours to ship.
CRDS = ROOT.parent / "shared" / "crd"


def strict(schema: Any) -> Any:
    """A CRD's schema in which a field that it does not name is an error, as the API server has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not is_open:
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


@functools.cache
def crds() -> list[dict[str, Any]]:
    """The definitions; reading them takes seconds."""
    return [yaml.load(path.read_text(), yaml.CSafeLoader) for path in CRDS.glob("*.yaml")]


def crd_of(document: dict[str, Any]) -> dict[str, Any]:
    """The strict schema for a manifest of JobSet or the Trainer."""
    group, _, version = document["apiVersion"].partition("/")
    for crd in crds():
        if crd["spec"]["group"] == group and crd["spec"]["names"]["kind"] == document["kind"]:
            (found,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version]
            schema = strict(found)
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    raise AssertionError(f"no CRD for {document['kind']}")


@pytest.mark.skipif(not CRDS.is_dir(), reason="the CRDs of JobSet and the Trainer are not beside the repository")
@pytest.mark.parametrize("name", ["jobset.yaml", "trainjob.yaml"])
def test_sets_of_jobs_fit_the_definitions_of_their_kinds(name):
    import jsonschema

    for document in documents(DEPLOY / "kubernetes" / name):
        jsonschema.validate(document, crd_of(document))
        document["spec"]["nonsense"] = 1
        with pytest.raises(jsonschema.ValidationError, match="nonsense"):
            jsonschema.validate(document, crd_of(document))


def test_the_trainjob_uses_its_runtime():
    runtime, job = documents(DEPLOY / "kubernetes" / "trainjob.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"] and runtime["spec"]["mlPolicy"]["torch"] == {}
    assert pod_of(DEPLOY / "kubernetes" / "trainjob.yaml")["containers"][0]["name"] == "node"


def test_job_and_service_fit_kubernetes_schema():
    from kubernetes_validate import validate

    service, job = documents(DEPLOY / "kubernetes" / "job.yaml")
    for document in (service, job):
        validate(document, "1.30", strict=True)
    # JobSet and the Trainer have their own schemas; the Jobs that they create have that of Kubernetes.
    jobset = documents(DEPLOY / "kubernetes" / "jobset.yaml")[0]
    runtime = documents(DEPLOY / "kubernetes" / "trainjob.yaml")[0]
    for replicated in (jobset["spec"]["replicatedJobs"][0], runtime["spec"]["template"]["spec"]["replicatedJobs"][0]):
        made = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": replicated["template"]["spec"],
        }
        validate(made, "1.30", strict=True)
    job["spec"]["completion"] = 2
    with pytest.raises(Exception, match="completion"):
        validate(job, "1.30", strict=True)


def test_compose_has_two_nodes_with_what_they_need():
    nodes = documents(DEPLOY / "compose.yaml")[0]["services"]
    assert [node["environment"]["NODE_RANK"] for node in nodes.values()] == ["0", "1"]
    for node in nodes.values():
        assert node["shm_size"] == "16gb" and node["ulimits"]["memlock"] == -1 and "cap_add" not in node
        assert node["stop_grace_period"] == "11m" and node["read_only"]
    text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", (DEPLOY / "compose.yaml").read_text())
    arguments = parse("train", COMMANDS["train"], arguments_of(text))[1]
    assert arguments["nodes"] == len(nodes) and arguments["master_addr"] in nodes and arguments["grace"] < 660
    gpu = documents(DEPLOY / "compose.gpu.yaml")[0]["services"]
    assert gpu.keys() == nodes.keys() and all("/dev/infiniband" in node["devices"][0] for node in gpu.values())


def test_sbatch_asks_for_a_stop_in_time_and_queues_again():
    path = DEPLOY / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    text = path.read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=?(\S*)", text))
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"
    (command,) = re.findall(r"(?s)\n(srun .*?)\ncode=", text)
    words = shlex.split(command.replace("\\\n", " "))
    assert {"--wait=60", "--kill-on-bad-exit=1"} <= set(words)
    arguments = parse("train", COMMANDS["train"], words[words.index("train") + 1 :])[1]
    assert int(options["signal"].partition("@")[2]) > arguments["grace"]
    tail = text[text.index('case "$code" in') :]
    assert f"{Stopped.exit_code}) requeue" in tail and f"{LostPeer.exit_code}) again_without_them" in tail
    assert text.count("scontrol requeue") == 1 and "MOST_LOSSES:-5" in text
