"""`slipway submit` and what it can be asked: the calls of the cluster, and what comes of them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipway.cluster import chain, kubectl, remote, runs, settings, slurm, yaml
from slipway.cluster.chain import Kind, Step
from slipway.cluster.settings import Lab, Slurm
from slipway.errors import PreflightError, UsageError
from slipway.options import option, suggestion
from slipway.report import say
from slipway.untrusted import harmless_lines

BETWEEN_LOOKS = 5.0  # seconds; kubectl tells of a run only when it is asked
LINES = 100  # of a log that are shown
INTERRUPTED = 130  # as a shell has it for Ctrl-C
NAME_OF_RUN = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
VERBS = ("status", "logs", "stop", "cancel")


@dataclass(frozen=True)
class Wanted:
    """What `submit` can be asked for."""

    cluster: str = option("lab.toml", "file that describes the cluster; docs/launching.md lists its keys")
    dry_run: bool = option(False, "print what would be sent, and send nothing")
    follow: bool = option(
        False, "show what the jobs print and how far the run is, until its end; Ctrl-C ends that alone"
    )
    step: str | None = option(None, "of `logs`: the step, by its number or verb", otherwise="the newest")
    lines: int | None = option(None, "of `logs`: how many, the last ones", low=1, high=10**6, otherwise=str(LINES))


@dataclass(frozen=True)
class Answer:
    """What a call did, for people and as JSON."""

    said: str
    found: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def __str__(self) -> str:
        return self.said

    def as_dict(self) -> dict[str, Any]:
        """The same as one JSON-ready object."""
        return {"command": "submit", **self.found}


def submit(words: Sequence[str], wanted: Wanted, kinds: Mapping[str, Kind]) -> Answer | runs.Overview:
    """Submit a chain of steps, or ask about one.

    Args:
        words: the steps, with `then` between; or one of VERBS and a run.
        kinds: verb → what it is as a step.

    Errors: UsageError for words or a lab.toml that are wrong, PreflightError for a cluster that does not answer or does
    not take the jobs. Nothing is submitted then.
    """
    lab = settings.read(Path(wanted.cluster), {verb: kind.whole for verb, kind in kinds.items()})
    if words[0] in VERBS:
        with _understood():
            return _ask(words, wanted, lab)
    if words[0] not in kinds and (near := suggestion(words[0], VERBS)):
        raise UsageError(f"submit: {words[0]!r} is no step{near}; there are {', '.join((*VERBS, *kinds))}")
    _refuse_flags_of_logs("submit", wanted)
    steps = chain.steps_of(list(words), lab, kinds)
    return _send(steps, lab, wanted)


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """What a cluster answers that is no answer of ours becomes a PreflightError."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise PreflightError(
            f"submit: the cluster's answer is not understood ({type(error).__name__}); does the login shell print into "
            "it, or is another version of Slipway there?"
        ) from None


def _send(steps: list[Step], lab: Lab, wanted: Wanted) -> Answer | runs.Overview:
    if not isinstance(lab.own, Slurm):
        return _apply(steps, lab, wanted)
    run = slurm.new_name()
    if wanted.dry_run:
        scripts = {step.name: slurm.script(step, lab, run) for step in steps}
        shown = [f"# ---- {slurm.folder(lab, run)}/{name}.sbatch\n{text}" for name, text in scripts.items()]
        return Answer("\n".join(shown), {"run": run, "scripts": scripts})
    try:
        records = remote.call(lab.own.host, slurm.submission(steps, lab, run))
    except KeyboardInterrupt:
        return _interrupted(run)
    with _understood():
        jobs = next(record[1:] for record in records if record[0] == "submitted")
        named = ", ".join(f"{step.verb} {job}" for step, job in zip(steps, jobs, strict=True))
    where = f" to {lab.own.host}" if lab.own.host else ""
    said = f"submit: run {run}{where}: {named}; look with `slipway submit status`"
    if wanted.follow:
        say(said)
        return _follow(run, lab)
    return Answer(said, {"run": run, "jobs": {step.name: job for step, job in zip(steps, jobs, strict=True)}})


def _interrupted(run: str) -> Answer:
    """Ctrl-C while a chain was on its way: nobody knows whether the cluster has it."""
    said = f"submit: interrupted while the chain was sent; `slipway submit status {run}` says whether it is there"
    return Answer(said, {"run": run}, INTERRUPTED)


def _goes_on(run: str) -> Answer:
    """Ctrl-C while a run was followed: that ends nothing else."""
    look = f"`slipway submit status{f' {run}' if run else ''}`"
    return Answer(f"submit: the run goes on; look with {look}", {"run": run}, INTERRUPTED)


def _apply(steps: list[Step], lab: Lab, wanted: Wanted) -> Answer | runs.Overview:
    """Send a chain to Kubernetes."""
    run = f"{lab.own.name}-{slurm.new_name()}"
    documents = kubectl.noted(steps, lab, run)
    if wanted.dry_run:
        return Answer(yaml.dump(*documents).rstrip(), {"run": run, "manifests": documents})
    try:
        kubectl.apply(steps, lab, run)
    except KeyboardInterrupt:
        return _interrupted(run)
    said = f"submit: run {run}; look with `slipway submit status`"
    if wanted.follow:
        say(said)
        return _follow_pods(run, lab)
    return Answer(said, {"run": run})


def _ask(words: Sequence[str], wanted: Wanted, lab: Lab) -> Answer | runs.Overview:
    if len(words) > 2:
        raise UsageError(f"submit {words[0]}: {words[2]!r} is one word too many; it takes one RUN")
    if wanted.dry_run:
        raise UsageError(f"submit {words[0]}: --dry-run is for a chain; leave it out")
    if words[0] != "logs":
        _refuse_flags_of_logs(f"submit {words[0]}", wanted)
    if wanted.follow and words[0] != "logs":
        raise UsageError(f"submit {words[0]}: --follow is for a chain and for `slipway submit logs`; leave it out")
    run = words[1] if len(words) == 2 else ""
    if run and not NAME_OF_RUN.fullmatch(run):
        raise UsageError(f"submit {words[0]}: {run[:40]!r} is no run; a name is like 20261126-091500-bcd")
    if wanted.step is not None and not NAME_OF_RUN.fullmatch(wanted.step):
        raise UsageError(f"submit {words[0]}: --step is {wanted.step[:40]!r}; it must be a step's number or verb")
    if wanted.lines is not None and wanted.follow and wanted.step is None:
        raise UsageError("submit logs: --follow shows all lines of all steps; leave out --lines")
    if not isinstance(lab.own, Slurm):
        return _ask_kubernetes(words[0], run, wanted, lab)
    if words[0] == "status":
        return status(run, lab)
    if words[0] == "logs" and wanted.follow and wanted.step is not None:
        raise UsageError("submit logs: --follow shows all steps; leave out --step")
    if words[0] == "logs":
        return _follow(run, lab) if wanted.follow else _logs(run, wanted, lab)
    return _end(words[0], run, lab)


def _refuse_flags_of_logs(what: str, wanted: Wanted) -> None:
    for name in ("step", "lines"):
        if getattr(wanted, name) is not None:
            raise UsageError(f"{what}: --{name} belongs to `slipway submit logs`; leave it out")


def _ask_kubernetes(verb: str, run: str, wanted: Wanted, lab: Lab) -> Answer | runs.Overview:
    if verb == "status":
        return kubectl.status(run, lab)
    if verb == "logs" and wanted.follow and wanted.step is None:
        return _follow_pods(run, lab)
    if verb == "logs":
        return _logs_of_pod(run, wanted, lab)
    if verb == "stop":
        name = kubectl.stop(run, lab)
        return Answer(f"submit: run {name}: its pods save and end", {"run": name})
    name = kubectl.cancel(run, lab)
    return Answer(f"submit: run {name} cancelled", {"run": name})


def _logs_of_pod(run: str, wanted: Wanted, lab: Lab) -> Answer:
    """What one step has printed; with `follow` it is printed here, until the step ends."""
    name, pod = kubectl.pod_of(run, wanted.step or "", lab)
    if not wanted.follow:
        text = kubectl.kubectl(lab, ["logs", pod, f"--tail={wanted.lines or LINES}"])
        return Answer(text.rstrip("\n"), {"run": name, "lines": text.splitlines()})
    try:
        return Answer("", {"run": name}, kubectl.print_logs(pod, wanted.lines or LINES, lab))
    except KeyboardInterrupt:
        return _goes_on(name)


def _follow_pods(run: str, lab: Lab) -> Answer | runs.Overview:
    """Show the logs of one step after the other, until the run has ended; then its last state.

    A step that is started again has a new pod, which is followed too.
    """
    followed: set[str] = set()
    try:
        while True:
            found = kubectl.status(run, lab)
            run = found.run
            for step in found.steps:
                if step.state in (runs.GOING, runs.DONE, runs.FAILED):
                    kubectl.follow(run, step, followed, lab)
            if found.has_ended:
                return found
            time.sleep(BETWEEN_LOOKS)
    except KeyboardInterrupt:
        return _goes_on(run)


def _call(function: str, run: str, lab: Lab, said: Any = None, **variables: str) -> list[remote.Record]:
    assert isinstance(lab.own, Slurm)
    return remote.call(lab.own.host, slurm.call(function, lab, RUN=run, **variables), said)


def status(run: str, lab: Lab) -> runs.Overview:
    """What a run does now; `run` is its name, or empty for the newest."""
    return runs.overview(_call("status", run, lab))


def _logs(run: str, wanted: Wanted, lab: Lab) -> Answer:
    lines: list[str] = []
    _call("logs", run, lab, lines.append, WANTED=wanted.step or "", LINES_SHOWN=str(wanted.lines or LINES))
    return Answer("\n".join(lines), {"lines": lines})


def _follow(run: str, lab: Lab) -> Answer | runs.Overview:
    """Show logs and progress until the run has ended; then its last state."""

    def said(line: str) -> None:
        fields = line.removeprefix(remote.MARK).split("\t") if line.startswith(remote.MARK) else []
        if not fields:
            say(harmless_lines(line))
        elif fields[0] == "heading":
            say(f"==> {fields[1]}, job {fields[2]}")
        else:
            say(runs.progress_line(fields), living=True)

    try:
        records = _call("follow", run, lab, said)
    except KeyboardInterrupt:
        return _goes_on(run)
    name = next(record[1] for record in records if record[0] == "run")
    return status(name, lab)


def _end(verb: str, run: str, lab: Lab) -> Answer:
    """Stop or cancel a run."""
    records = _call(verb, run, lab)
    name = next(record[1] for record in records if record[0] == "run")
    stopping = [record[1] for record in records if record[0] == "stopping"]
    taken = [record[1] for record in records if record[0] == "taken"]
    parts = [f"{', '.join(stopping)} saves and ends"] if stopping else []
    parts += (
        [f"{', '.join(reversed(taken))} {'cancelled' if verb == 'cancel' else 'taken out of the queue'}"]
        if taken
        else []
    )
    said = "; ".join(parts) or "it had ended already"
    return Answer(f"submit: run {name}: {said}", {"run": name, "stopping": stopping, "cancelled": taken})
