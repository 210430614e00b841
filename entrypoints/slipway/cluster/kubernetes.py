"""A chain as one JobSet, or as a TrainJob of Kubeflow Trainer v2: the same pods as those of deploy/kubernetes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from slipway.cluster.chain import Step
from slipway.cluster.names import image_name
from slipway.cluster.settings import Common, Kubernetes, Lab
from slipway.errors import DataError, LostPeer, PreflightError, Stopped, UsageError

JOBSET = "jobset.x-k8s.io/v1alpha2"
TRAINER = "trainer.kubeflow.org/v1alpha1"
ME = {"app.kubernetes.io/managed-by": "slipway"}
QUEUE = "kueue.x-k8s.io/queue-name"
NODE = "node"  # what the Trainer calls the job that trains, and its container
GO_ON = [LostPeer.exit_code, Stopped.exit_code]  # the pod comes again, and neither counts as a failure
GIVE_UP = [UsageError.exit_code, DataError.exit_code, PreflightError.exit_code]  # another try would fail too


def manifests(steps: Sequence[Step], lab: Lab, run: str) -> list[dict[str, Any]]:
    """What is applied for a chain.

    Args:
        run: the name of the run, which is that of the JobSet.

    Errors: UsageError for a chain that a TrainJob cannot be.
    """
    own = _own(lab)
    labels = {**ME, "app.kubernetes.io/instance": run} | ({QUEUE: own.queue} if own.queue else {})
    if own.trainer:
        return _trainjob(steps, lab, run, labels)
    network = {"enableDNSHostnames": True, "subdomain": run, "publishNotReadyAddresses": True}
    spec = {"network": network, **_policy(own), "replicatedJobs": _jobs(steps, lab)}
    return [{"apiVersion": JOBSET, "kind": "JobSet", "metadata": {"name": run, "labels": labels}, "spec": spec}]


def _own(lab: Lab) -> Kubernetes:
    assert isinstance(lab.own, Kubernetes)
    return lab.own


def _policy(own: Kubernetes) -> dict[str, Any]:
    rule = {"name": "another-try-would-fail-too", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {"failurePolicy": {"maxRestarts": own.restarts, "rules": [rule]}}


def _trainjob(steps: Sequence[Step], lab: Lab, run: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """A runtime with all steps, of which `train` is the job that the Trainer knows; and the TrainJob that uses it."""
    trains = [step for step in steps if step.verb == "train"]
    if len(trains) != 1 or any(step.kind.whole for step in steps if step.verb != "train"):
        raise UsageError(f"submit: with trainer = true in {lab.file} a chain needs one `train`, and no `doctor`")
    (train,) = trains
    jobs = _jobs(steps, lab, of_trainer=train)
    template = {"spec": {"network": {"publishNotReadyAddresses": True}, **_policy(_own(lab)), "replicatedJobs": jobs}}
    policy = {"numNodes": train.keys.nodes, "torch": {}}
    runtime = {"apiVersion": TRAINER, "kind": "TrainingRuntime",
               "metadata": {"name": run, "labels": {**ME, "trainer.kubeflow.org/framework": "torch"}},
               "spec": {"mlPolicy": policy, "template": template}}  # fmt: skip
    trainer = {"numNodes": train.keys.nodes, **_command(train), "resourcesPerNode": _resources(train, lab)}
    ref = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": run}
    spec = {"runtimeRef": ref, "trainer": trainer}
    job = {"apiVersion": TRAINER, "kind": "TrainJob", "metadata": {"name": run, "labels": labels}, "spec": spec}
    return [runtime, job]


# ---------------------------------------------------------------------------- the jobs of a set


def _jobs(steps: Sequence[Step], lab: Lab, of_trainer: Step | None = None) -> list[dict[str, Any]]:
    """The replicated jobs, each of which waits for the one before.

    Args:
        of_trainer: the step to which the Trainer adds nodes, command and resources.
    """
    found: list[dict[str, Any]] = []
    for step in steps:
        is_its = step is of_trainer
        job: dict[str, Any] = {"name": NODE if is_its else step.name}
        if found:
            job["dependsOn"] = [{"name": found[-1]["name"], "status": "Complete"}]
        template: dict[str, Any] = {"spec": _job(step, lab, is_its)}
        if is_its:
            template = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, **template}
        found.append({**job, **({} if is_its else {"replicas": 1}), "template": template})
    return found


def _job(step: Step, lab: Lab, of_trainer: bool) -> dict[str, Any]:
    name = NODE if of_trainer else "step"
    codes = {"containerName": name, "operator": "In"}
    rules = [
        {"action": "Ignore", "onExitCodes": {**codes, "values": GO_ON}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {**codes, "values": GIVE_UP}},
    ]
    count = step.keys.nodes
    size = {} if of_trainer else {"completionMode": "Indexed", "completions": count, "parallelism": count}
    # No pod is tried alone: JobSet starts all of them again.
    return {**size, "backoffLimit": 0, "podFailurePolicy": {"rules": rules},
            "template": {"spec": _pod(step, lab, name, of_trainer)}}  # fmt: skip


def _pod(step: Step, lab: Lab, name: str, of_trainer: bool) -> dict[str, Any]:
    own = _own(lab)
    env = [{"name": one, "value": _literal(value)} for one, value in lab.env.items()]
    if not of_trainer:
        env.append({"name": "NNODES", "value": str(step.keys.nodes)})
    container: dict[str, Any] = {"name": name, "image": image_name(step.keys.image)}
    container |= {} if of_trainer else _command(step)
    container |= {"env": env} if env else {}
    container |= {"envFrom": [{"secretRef": {"name": own.secrets}}]} if own.secrets else {}
    container |= {} if of_trainer else {"resources": _resources(step, lab)}
    container["securityContext"] = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes, container["volumeMounts"] = _volumes(step, lab)
    grace = step.keys.stop_before + 60 if step.saves else 60  # more than --grace, else nothing is saved
    user = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": grace, "securityContext": user}
    pod |= {"nodeSelector": lab.node_selector} if lab.node_selector else {}
    return {**pod, "containers": [container], "volumes": volumes}


def _command(step: Step) -> dict[str, Any]:
    """The image's entrypoint with a verb, or the command of lab.toml."""
    words = [_literal(word) for word in (step.verb, *step.words)]
    own = [_literal(word) for word in shlex.split(step.keys.command)]
    return {"args": words} if own == [Common.command] else {"command": own, "args": words}


def _literal(text: str) -> str:
    """A text as Kubernetes leaves it: it takes $(NAME) for a variable, and $$ for one $."""
    return text.replace("$", "$$")


def _resources(step: Step, lab: Lab) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(step.keys.gpus_per_node)} if step.keys.gpus_per_node else {}
    limits |= lab.limits if step.kind.whole else {}
    requests = {} if step.kind.whole else {"cpu": str(step.keys.cpus)}
    return ({"limits": limits} if limits else {}) | ({"requests": requests} if requests else {})


def _volumes(step: Step, lab: Lab) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, volumeMounts): each claim once, /tmp, and enough /dev/shm for what runs on GPUs."""
    claims: dict[str, str] = {}
    mounts: list[dict[str, Any]] = []
    for source, target in lab.mounts:
        claim, _, below = source.partition("/")
        name = claims.setdefault(claim, re.sub(r"[^a-z0-9-]", "-", claim)[:50] + f"-{len(claims)}")
        mounts.append({"name": name, "mountPath": target, **({"subPath": below} if below else {})})
    volumes: list[dict[str, Any]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in claims.items()
    ]
    if step.kind.whole:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _own(lab).shared_memory}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return [*volumes, {"name": "tmp", "emptyDir": {}}], [*mounts, {"name": "tmp", "mountPath": "/tmp"}]
