"""A run on Kubernetes: applied, asked about and ended with the user's own kubectl."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from slipway.cluster import kubernetes, runs, yaml
from slipway.cluster.chain import Step
from slipway.cluster.runs import Overview, StepState
from slipway.cluster.settings import Kubernetes, Lab
from slipway.errors import PreflightError, UsageError
from slipway.report import say
from slipway.untrusted import NotJson, harmless, parse_json

OF_RUN = "jobset.sigs.k8s.io/jobset-name"
OF_STEP = "jobset.sigs.k8s.io/replicatedjob-name"
INDEX = "batch.kubernetes.io/job-completion-index"
STEPS = "slipway/steps"  # annotation: the steps, and the folder of each one's run


def apply(steps: Sequence[Step], lab: Lab, run: str) -> None:
    """Apply a chain; PreflightError where the cluster has not what it needs, and nothing is applied then."""
    own = _own(lab)
    claims = sorted({f"pvc/{source.partition('/')[0]}" for source, _ in lab.mounts})
    needed = [*claims, *([f"secret/{own.secrets}"] if own.secrets else [])]
    if needed:
        kubectl(lab, ["get", *needed, "-o", "name"])
    documents = noted(steps, lab, run)
    kubectl(lab, ["apply", "--dry-run=server", "-f", "-"], yaml.dump(documents[0]))
    try:
        kubectl(lab, ["apply", "-f", "-"], yaml.dump(*documents))
    except PreflightError:
        with contextlib.suppress(PreflightError):
            kubectl(lab, ["delete", "--ignore-not-found", "-f", "-"], yaml.dump(*documents))
        raise


def noted(steps: Sequence[Step], lab: Lab, run: str) -> list[dict[str, Any]]:
    """The manifests with the steps in an annotation, by which any client can tell about the run."""
    documents = kubernetes.manifests(steps, lab, run)
    names = [kubernetes.NODE if lab.own.trainer and step.saves else step.name for step in steps]  # type: ignore[union-attr]
    outs = [step.arguments["out"] if step.saves else "" for step in steps]
    found = [{"name": step.name, "job": name, "out": out} for step, name, out in zip(steps, names, outs, strict=True)]
    documents[-1]["metadata"]["annotations"] = {STEPS: json.dumps(found)}
    return documents


def kubectl(lab: Lab, words: Sequence[str], text: str | None = None) -> str:
    """What kubectl prints; PreflightError with its own last line where it fails."""
    try:
        done = subprocess.run(
            [*_command(lab), *words], input=text, capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise _no_kubectl() from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = harmless(lines[-1], 300) if lines else f"exit code {done.returncode}"
        raise PreflightError(f"submit: kubectl: {said}")
    return done.stdout


def _no_kubectl() -> PreflightError:
    return PreflightError("submit: there is no kubectl on this machine; install it, and make `kubectl get nodes` work")


def _command(lab: Lab) -> list[str]:
    own = _own(lab)
    where = {"context": own.context, "namespace": own.namespace}
    return ["kubectl", *(f"--{name}={value}" for name, value in where.items() if value)]


def _own(lab: Lab) -> Kubernetes:
    assert isinstance(lab.own, Kubernetes)
    return lab.own


def _kind(lab: Lab) -> str:
    return "trainjob" if _own(lab).trainer else "jobset"


# ---------------------------------------------------------------------------- a run that was applied


def find(run: str, lab: Lab) -> tuple[str, list[dict[str, str]]]:
    """(name, its steps) of a run, or of the newest; UsageError where there is none."""
    label = ",".join(f"{key}={value}" for key, value in kubernetes.ME.items())
    words = ["get", _kind(lab), "-l", label, "--sort-by=.metadata.creationTimestamp", "-o", "json"]
    items = json.loads(kubectl(lab, words))["items"]
    names = [item["metadata"]["name"] for item in items]
    if run and run not in names:
        raise UsageError(f"submit: there is no run {run}; the newest are {' '.join(names[-3:]) or 'none'}")
    if not names:
        raise UsageError("submit: there is no run yet")
    item = items[names.index(run)] if run else items[-1]
    steps = json.loads(item["metadata"].get("annotations", {}).get(STEPS, "[]"))
    return item["metadata"]["name"], steps


def status(run: str, lab: Lab) -> Overview:
    """What each step of a run does now."""
    name, steps = find(run, lab)
    try:
        jobset = json.loads(kubectl(lab, ["get", "jobset", name, "-o", "json"]))
    except PreflightError:  # of a TrainJob that has just been made, or waits for its quota
        jobset = {}
    said = jobset.get("status", {})
    counts = {one["name"]: one for one in said.get("replicatedJobsStatus", [])}
    conditions = {one["type"] for one in said.get("conditions", []) if one.get("status") == "True"}
    starts = int(said.get("restarts", 0)) + 1
    suspended = bool(jobset.get("spec", {}).get("suspend"))
    found: list[StepState] = []
    for step in steps:
        count = counts.get(step["job"], {})
        state, why = _state(count, conditions, suspended, found)
        one = StepState(step["name"], f"{name}-{step['job']}", state, why, starts=starts)
        if state == runs.GOING and step["out"]:
            one = _with_progress(one, name, step, lab)
        found.append(one)
    return Overview(name, found)


def _state(
    count: dict[str, Any], conditions: set[str], suspended: bool, before: Sequence[StepState]
) -> tuple[str, str]:
    """(state, why) of a step, from what JobSet counts."""
    if count.get("succeeded") or "Completed" in conditions:
        return runs.DONE, ""
    if "Failed" in conditions:
        is_first = all(one.state == runs.DONE for one in before)
        return (runs.FAILED, "see `slipway submit logs`") if is_first else (runs.SKIPPED, "the step before failed")
    if suspended:
        return runs.WAITING, "suspended: by Kueue until there is room, or by `slipway submit stop`"
    if before and before[-1].state != runs.DONE:
        return runs.WAITING, runs.REASONS["Dependency"]
    return (runs.GOING, "") if count.get("active") else (runs.WAITING, "for its pods")


def _with_progress(state: StepState, run: str, step: dict[str, str], lab: Lab) -> StepState:
    """The step with what its pod says about the training; without where the pod cannot be asked now."""
    import dataclasses

    try:
        said = kubectl(lab, ["exec", _pod(run, step["job"], lab), "--", "cat", f"{step['out']}/status.json"])
        line, found = runs.told(parse_json(said), step["out"], None)
    except (PreflightError, UsageError, NotJson):
        return state
    return dataclasses.replace(state, progress=line, status=found)


def _pod(run: str, job: str, lab: Lab) -> str:
    """The newest pod of a step that is number 0."""
    label = f"{OF_RUN}={run},{OF_STEP}={job},{INDEX}=0"
    words = ["get", "pods", "-l", label, "--sort-by=.metadata.creationTimestamp", "-o", "name"]
    names = kubectl(lab, words).split()
    if not names:
        raise UsageError(f"submit: the run {run} has no pod of {job} yet; see `slipway submit status`")
    return names[-1]


def pod_of(run: str, wanted: str, lab: Lab) -> tuple[str, str]:
    """(the run's name, the newest pod of a step) of a run.

    Args:
        wanted: the step's number, verb or name; empty for the newest that has begun.
    """
    name, steps = find(run, lab)
    chosen = [one for one in steps if wanted in (one["name"], *one["name"].split("-", 1))]
    if wanted and not chosen:
        known = ", ".join(one["name"] for one in steps)
        raise UsageError(f"submit: the run {name} has no step {wanted}; there are {known}")
    if not wanted:
        states = status(name, lab).steps
        begun = [
            one for one, state in zip(steps, states, strict=True) if state.state not in (runs.WAITING, runs.SKIPPED)
        ]
        chosen = (begun or steps)[-1:] if begun else steps[:1]
    return name, _pod(name, chosen[0]["job"], lab)


def follow(run: str, step: StepState, followed: set[str], lab: Lab) -> None:
    """Print what a step prints, until its pod ends; nothing where it has no pod that has begun, or that was shown.

    Args:
        followed: pods that were shown to their end. This one comes in. A step that is started again has a new pod.
    """
    try:
        pod = _pod(run, step.job.removeprefix(f"{run}-"), lab)
    except UsageError:
        return
    if pod in followed or kubectl(lab, ["get", pod, "-o", "jsonpath={.status.phase}"]).strip() == "Pending":
        return
    say(f"==> {step.name}")
    if print_logs(pod, -1, lab) == 0:
        followed.add(pod)


def print_logs(pod: str, lines: int, lab: Lab) -> int:
    """Print what a pod has printed, and what it prints until its end; returns kubectl's exit code."""
    sys.stdout.flush()
    return subprocess.run([*_command(lab), "logs", pod, f"--tail={lines}", "--follow"]).returncode


def stop(run: str, lab: Lab) -> str:
    """Suspend a run: its pods save and end. Returns its name."""
    name, _ = find(run, lab)
    kubectl(lab, ["patch", _kind(lab), name, "--type=merge", "-p", '{"spec": {"suspend": true}}'])
    return name


def cancel(run: str, lab: Lab) -> str:
    """Delete a run from the cluster. Returns its name."""
    name, _ = find(run, lab)
    kubectl(lab, ["delete", _kind(lab), name, "--wait=false"])
    if _own(lab).trainer:
        kubectl(lab, ["delete", "trainingruntime", name, "--ignore-not-found", "--wait=false"])
    return name
