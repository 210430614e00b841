"""lab.toml: where jobs run and with what. The one declaration of its keys; checks and the docs' tables come from it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipway.cluster import names
from slipway.errors import DataError, UsageError
from slipway.options import Parameter, check, option, parameters_of, suggestion
from slipway.untrusted import HARMFUL, read_toml, without_credentials

MOST_BEFORE = 65_535  # seconds that sbatch takes for --signal
OF_THE_POD = ("/tmp", "/dev/shm")  # what cluster/kubernetes.py mounts there
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|passphrase|credentials?|(api|access|private)_?key)$")
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)  # days-hours:minutes:seconds
# What a shell does not let one set, or sets itself, and what says to a step which part of a job it is.
OF_BASH = ("BASHOPTS", "BASHPID", "BASH_ARGV0", "BASH_COMMAND", "BASH_SUBSHELL", "BASH_VERSINFO", "DIRSTACK",
           "EPOCHREALTIME", "EPOCHSECONDS", "EUID", "FUNCNAME", "GROUPS", "HISTCMD", "LINENO", "PPID", "RANDOM",
           "SECONDS", "SHELLOPTS", "SRANDOM", "UID", "_")  # fmt: skip
OF_THE_JOB = {
    "slurm": re.compile(r"SLURMD_NODENAME|SLURM_(JOB|STEP|NODE|NNODES|NTASKS|NPROCS|PROCID|LOCALID|TASKS|RESTART).*"),
    "kubernetes": re.compile(r"NNODES|JOB_COMPLETION_INDEX|PET_.*"),
}
# Flags of sbatch that say what another key says, or that would break the chain.
OURS = {
    "nodes": "nodes", "time": "time", "partition": "partition", "account": "account", "qos": "qos",
    "gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus", "exclusive": "exclusive", "signal": "stop_before",
    "job-name": "name", "chdir": "job_dir", "container-image": "image", "container-mounts": "mounts",
    "gpus": "gpus_per_node", "gpus-per-task": "gpus_per_node", "gpus-per-socket": "gpus_per_node", "clusters": "host",
}  # fmt: skip
NOT_OURS = ("dependency", "kill-on-invalid-dep", "output", "error", "open-mode", "requeue", "no-requeue", "parsable",
            "test-only", "help", "usage", "version", "wrap", "array", "hold", "wait", "ntasks",
            "ntasks-per-node", "tasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket",
            "export")  # fmt: skip


@dataclass(frozen=True)
class Common:
    """Keys that both kinds of cluster have."""

    kind: str = option("slurm", "what runs the jobs", choices=("slurm", "kubernetes"))
    name: str = option("slipway", "what the names of jobs begin with: lower case letters, digits, -")
    image: str | None = option(
        None,
        "container image: a squashfs file of the cluster, or a name such as ghcr.io/org/slipway:1",
        otherwise="none: the commands are installed on the nodes",
    )
    command: str = option("slipway", "what stands before the words of a step, such as /shared/venv/bin/slipway")
    mounts: list[str] | None = option(
        None, "SOURCE:TARGET, a folder of the cluster (Kubernetes: a claim) and where the containers see it"
    )
    secrets: str | None = option(
        None, "file on the cluster with NAME=VALUE lines, mode 600 (Kubernetes: name of a Secret), such as HF_TOKEN"
    )
    nodes: int = option(1, "nodes of `train` and `doctor`; every other step has one", low=1, high=100_000)
    gpus_per_node: int = option(
        8,
        "GPUs of each node for `train` and `doctor`; other steps ask for none, unless their own table says how many",
        low=0,
        high=64,
    )
    cpus: int = option(
        16, "processors of a step that asks for no GPUs; fewer where the smallest node has fewer", low=1, high=4096
    )
    stop_before: int = option(
        600, "how long before its end a job is told to save; --grace of `train` is 60 s less", unit="seconds", low=120,
        high=86_400,
    )  # fmt: skip


@dataclass(frozen=True)
class OnSlurm:
    """Keys of Slurm alone."""

    host: str | None = option(
        None, "the login node, as in `ssh HOST`", otherwise="none: this machine has sbatch itself"
    )
    job_dir: str | None = option(
        None, "folder for scripts, logs and states of runs, which all nodes see; must be given", otherwise=""
    )
    partition: str | None = option(None, "partition", otherwise="the cluster's")
    account: str | None = option(None, "account", otherwise="the user's")
    qos: str | None = option(None, "quality of service", otherwise="the user's")
    time: str = option("24:00:00", "time limit of a job; it saves before, and is queued again", unit="[D-]HH:MM:SS")
    exclusive: bool = option(True, "`train` and `doctor` get whole nodes with all their memory")
    local_mounts: list[str] | None = option(
        None, "like `mounts`, for folders that are on the nodes alone, so that nobody looks for them before"
    )
    most_restarts: int = option(100, "how often a step is queued again at most", low=0, high=10_000)
    most_losses: int = option(5, "how often of these because a node was lost", low=0, high=1000)


@dataclass(frozen=True)
class OnKubernetes:
    """Keys of Kubernetes alone."""

    context: str | None = option(None, "context of kubectl", otherwise="the current one")
    namespace: str | None = option(None, "namespace", otherwise="the context's")
    queue: str | None = option(None, "Kueue's local queue", otherwise="none: no Kueue")
    trainer: bool = option(False, "a TrainJob of Kubeflow Trainer v2 instead of a JobSet, for a chain with one `train`")
    shared_memory: str = option("64Gi", "size of /dev/shm of `train` and `doctor`")
    restarts: int = option(5, "how often JobSet starts all pods again after an error", low=0, high=100)


@dataclass(frozen=True)
class Slurm(OnSlurm, Common):
    """All keys of a Slurm cluster."""


@dataclass(frozen=True)
class Kubernetes(OnKubernetes, Common):
    """All keys of a Kubernetes cluster."""


KINDS: dict[str, type[Slurm] | type[Kubernetes]] = {"slurm": Slurm, "kubernetes": Kubernetes}
TABLES = {"slurm": ("env", "sbatch", "step"), "kubernetes": ("env", "limits", "node_selector", "step")}
OF_A_STEP = ("image", "command", "nodes", "gpus_per_node", "cpus", "stop_before", "partition", "account", "qos", "time",
             "exclusive")  # fmt: skip
ONLY_FOR = {"cpus": "steps that do not take whole nodes", "exclusive": "`train` and `doctor`", "stop_before": "`train`"}
FOR_CPUS = {
    "slurm": ", and with exclusive = false give cpus-per-gpu in [step.train.sbatch]",
    "kubernetes": ", and give cpu in [limits]",
}


@dataclass(frozen=True)
class Lab:
    """A lab.toml that was read.

    Args:
        own: its keys.
        env: variables of every step.
        flags: [sbatch], as words of the command line.
        limits, node_selector: of the pods.
        steps: verb → the keys that it has otherwise; "flags" are those of its own [step.VERB.sbatch].
    """

    file: Path
    own: Slurm | Kubernetes
    env: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, verb: str, whole: bool) -> Any:
        """The keys as they are for one step.

        Args:
            whole: it takes all nodes and their GPUs; else it has one node and no GPU.
        """
        changed = {key: value for key, value in self.steps.get(verb, {}).items() if key != "flags"}
        alone = {} if whole else {"nodes": 1, "gpus_per_node": 0}
        return dataclasses.replace(self.own, **(alone | changed))

    def flags_of(self, verb: str) -> dict[str, str]:
        """The flags of sbatch for one step: its own come before those of all."""
        return self.flags | self.steps.get(verb, {}).get("flags", {})

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """(source, target) of every mount, without its flags."""
        listed = [*(self.own.mounts or []), *(getattr(self.own, "local_mounts", None) or [])]
        return [(one.split(":")[0], one.split(":")[1].rstrip("/") or "/") for one in listed]

    def on_the_host(self, path: str) -> str | None:
        """The path of a container as the cluster's own machines see it; None where no mount holds it."""
        if not self.own.image:
            return path
        for source, target in sorted(self.mounts, key=lambda mount: -len(mount[1])):
            if path == target or path.startswith(target.rstrip("/") + "/"):
                return source.rstrip("/") + path[len(target.rstrip("/")) :]
        return None


def read(file: Path, verbs: Mapping[str, bool]) -> Lab:
    """The lab.toml of a cluster, with everything checked that can be checked here.

    Args:
        verbs: what can be a step → whether it takes the whole cluster.

    Errors: UsageError for what it cannot be.
    """
    tables = _load(file)
    kind = tables.get("kind", "slurm")
    if not isinstance(kind, str) or kind not in KINDS:
        near = suggestion(str(kind), KINDS)
        raise UsageError(f"{file}: kind is {kind!r:.40}; it must be one of {', '.join(KINDS)}{near}")
    own = {key: value for key, value in tables.items() if key not in TABLES[kind]}
    lab = Lab(
        file,
        KINDS[kind](**_values(f"{file}:", own, kind, KINDS[kind])),
        _env(file, _table(file, tables, "env"), kind),
        _flags(f"{file}: [sbatch]", _table(file, tables, "sbatch")),
        _texts(f"{file}: [limits]", _table(file, tables, "limits")),
        _texts(f"{file}: [node_selector]", _table(file, tables, "node_selector"), may_be_empty=True),
        _steps(file, _table(file, tables, "step"), kind, verbs),
    )
    _check(lab)
    return lab


def seconds(time: str) -> int | None:
    """The seconds of Slurm's time, such as 1-12:00:00, 24:00:00 or 90 (minutes); None for what is none."""
    if not (match := TIME.fullmatch(time)):
        return None
    days, one, two, three = (int(part) if part else None for part in match.groups())
    if days is not None:
        return days * 86_400 + (one or 0) * 3600 + (two or 0) * 60 + (three or 0)
    if two is None:
        return (one or 0) * 60
    return (one or 0) * 60 + two if three is None else (one or 0) * 3600 + two * 60 + three


# ---------------------------------------------------------------------------- the file


def _load(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UsageError(
            f"there is no {file}; name the file of your cluster with --cluster (docs/launching.md shows one)"
        )
    try:
        return read_toml(file, "correct it, or give another --cluster")
    except DataError as error:
        raise UsageError(str(error)) from None


def _table(file: Path, tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found := tables.get(name, {}), dict):
        raise UsageError(f"{file}: {name} must be a table: write [{name}] and its keys below")
    return found


def _values(where: str, values: Mapping[str, Any], kind: str, group: type) -> dict[str, Any]:
    """The values, each a known key of its declared type and in its range."""
    known = parameters_of(group)
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{where} unknown key {key}{_hint(key, kind, [*known, *TABLES[kind]])}")
        _check_value(f"{where} {key}", known[key], value)
    return dict(values)


def _hint(key: str, kind: str, known: list[str]) -> str:
    for other, group in KINDS.items():
        if other != kind and key in (*parameters_of(group), *TABLES[other]):
            return f"; it belongs to kind = {other!r}"
    return suggestion(key, known) or f"; it takes {', '.join(sorted(known))}"


def _check_value(where: str, parameter: Parameter, value: Any) -> None:
    if typing.get_origin(parameter.kind) is list:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UsageError(f'{where} must be a list of texts, such as ["/data:/data"]')
        for one in value:
            _check_text(where, one)
        return
    check(where, parameter, value)
    if isinstance(value, str):
        _check_text(where, value)


def _check_text(where: str, text: str) -> None:
    """UsageError for a text that would end a line of a script, or that shows a password."""
    if HARMFUL.search(text) or not text:
        raise UsageError(f"{where} is {text[:40]!r}; it must be one line of ordinary characters")
    if without_credentials(text) != text and not names.WITH_A_USER.fullmatch(text):
        raise UsageError(f"{where} is a URL with a password; put it into the file of `secrets` and leave it out here")


def _texts(where: str, table: Mapping[str, Any], may_be_empty: bool = False) -> dict[str, str]:
    """The values of a table as texts: numbers too."""
    for key, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise UsageError(f"{where} {key} must be a text or a whole number")
        if value != "" or not may_be_empty:
            _check_text(f"{where} {key}", str(value))
    return {key: str(value) for key, value in table.items()}


def _env(file: Path, table: Mapping[str, Any], kind: str) -> dict[str, str]:
    for name in table:
        if not VARIABLE.fullmatch(name):
            raise UsageError(f"{file}: [env] {name!r:.40} is not the name of a variable")
        if name in OF_BASH or OF_THE_JOB[kind].fullmatch(name):
            raise UsageError(f"{file}: [env] {name} is set by the job itself; leave it out")
        if SECRET.search(name):
            raise UsageError(
                f"{file}: [env] {name} looks like a secret; put it into a file on the cluster that only you can read, "
                "and name that file with the key `secrets`"
            )
    return _texts(f"{file}: [env]", table, may_be_empty=True)


def _flags(where: str, table: Mapping[str, Any]) -> dict[str, str]:
    """Flags of sbatch → their values; "" for a flag without one."""
    found = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name in OURS:
            raise UsageError(f"{where} {key}: give it with the key `{OURS[name]}`")
        if name in NOT_OURS:
            raise UsageError(f"{where} {key}: `slipway submit` sets this flag itself; leave it out")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise UsageError(f'{where} {key!r:.40} is no long flag of sbatch, such as constraint = "h100"')
        if name in found:
            raise UsageError(f"{where} {name} is there twice, once with _; leave one out")
        if value is False:
            continue
        found[name] = "" if value is True else _texts(where, {key: value})[key]
    return found


def _steps(file: Path, table: Mapping[str, Any], kind: str, verbs: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    found = {}
    for verb, values in table.items():
        where = f"{file}: [step.{verb}]"
        if verb not in verbs:
            raise UsageError(f"{where} is for no step{suggestion(verb, verbs)}; there are {', '.join(verbs)}")
        if not isinstance(values, dict):
            raise UsageError(f"{file}: step.{verb} must be a table: write [step.{verb}] and its keys below")
        own = {key: value for key, value in values.items() if not (key == "sbatch" and kind == "slurm")}
        for key in own:
            if key in parameters_of(KINDS[kind]) and key not in OF_A_STEP:
                raise UsageError(f"{where} {key} is the same for all steps; give it above the tables")
        found[verb] = _values(where, own, kind, KINDS[kind])
        idle = {"cpus": verbs[verb], "exclusive": not verbs[verb], "stop_before": verb != "train"}
        for key in (key for key, is_idle in idle.items() if is_idle and key in own):
            more = FOR_CPUS[kind] if key == "cpus" else ""
            raise UsageError(f"{where} {key} has no meaning there; it is for {ONLY_FOR[key]}: leave it out{more}")
        if not verbs[verb] and own.get("nodes", 1) != 1:
            raise UsageError(f"{where} nodes is {own['nodes']}; `{verb}` runs on one node")
        if "sbatch" in values and kind == "slurm":
            found[verb]["flags"] = _flags(f"{where} sbatch", _table(file, values, "sbatch"))
    return found


# ---------------------------------------------------------------------------- what fits together


def _check(lab: Lab) -> None:
    own, file = lab.own, lab.file
    if not names.NAME.fullmatch(own.name) or len(own.name) > 30:
        raise UsageError(f"{file}: name is {own.name!r:.40}; it must have lower case letters, digits and - alone")
    if own.mounts and not own.image:
        raise UsageError(f"{file}: mounts have no meaning without an image; name one, or leave the mounts out")
    for verb in (verb for verb, keys in lab.steps.items() if "image" in keys and not own.image):
        raise UsageError(
            f"{file}: [step.{verb}] image has no meaning without an image for all steps, of which the mounts are: name "
            "one above the tables too"
        )
    _check_mounts(lab)
    for verb in ("", *lab.steps):
        _check_command(f"{file}: {f'[step.{verb}] ' if verb else ''}command", lab.of(verb, True).command)
    if isinstance(own, Slurm):
        _check_slurm(lab, own)
    else:
        _check_kubernetes(lab, own)


def _check_command(where: str, command: str) -> None:
    """UsageError for a command whose words a shell could not tell apart, or that has none."""
    try:
        words, why = shlex.split(command), "it has no word"
    except ValueError:
        words, why = [], "a quote is not closed, or nothing stands behind the last backslash"
    if not words or not words[0]:
        raise UsageError(f"{where} is {command!r:.60}: {why}; write it as in a shell, such as '/my venv/bin/slipway'")


def _check_mounts(lab: Lab) -> None:
    source = "/FOLDER" if isinstance(lab.own, Slurm) else "CLAIM"
    for one in [*(lab.own.mounts or []), *(getattr(lab.own, "local_mounts", None) or [])]:
        parts = one.split(":")
        good = 2 <= len(parts) <= (3 if isinstance(lab.own, Slurm) else 2) and parts[1].startswith("/")
        if not good or (isinstance(lab.own, Slurm) != parts[0].startswith("/")) or "," in one:
            raise UsageError(f"{lab.file}: mount {one!r} is not {source}:/WHERE, such as {source.lower()}:/shared")
        if ".." in re.split("[/:]", one):
            raise UsageError(f"{lab.file}: mount {one!r}: write it without ..")
    targets = [target for _, target in lab.mounts]
    for target in targets:
        if targets.count(target) > 1:
            raise UsageError(f"{lab.file}: two mounts have the target {target}")


def _check_slurm(lab: Lab, own: Slurm) -> None:
    file = lab.file
    if not (own.job_dir or "").startswith("/"):
        raise UsageError(
            f"{file}: job_dir is {own.job_dir!r}; it must be a whole path that all nodes of the cluster see"
        )
    if own.secrets and not own.secrets.startswith("/"):
        raise UsageError(f"{file}: secrets is {own.secrets!r}; it must be the whole path of a file on the cluster")
    if own.host is not None and not re.fullmatch(r"[\w:][\w.@:/%\[\]-]*", own.host):
        raise UsageError(f"{file}: host is {own.host!r}; it must be what `ssh` calls the login node")
    if own.host and "/" not in own.host and ":" in own.host and not names.is_ipv6(own.host.rpartition("@")[2]):
        raise UsageError(f"{file}: host is {own.host!r}; write ssh://USER@HOST:PORT, or give a port in ~/.ssh/config")
    for verb in ("", *lab.steps):
        here = lab.of(verb, True)
        if here.image and not here.image.startswith("/") and not names.is_image_of_enroot(here.image):
            where = f"[step.{verb}] image" if verb else "image"
            raise UsageError(
                f"{file}: {where} is {here.image!r:.80}; it must be the whole path of a squashfs file on the cluster, "
                "from /, or the name of an image in a registry, such as ghcr.io/org/slipway:1"
            )
        limit = seconds(here.time)
        if limit is None:
            raise UsageError(f"{file}: time is {here.time!r}; write it as 24:00:00 or 1-12:00:00")
        if limit <= here.stop_before:
            raise UsageError(f"{file}: stop_before is {here.stop_before} s, but time is only {limit} s; give more time")
        if here.stop_before > MOST_BEFORE:
            raise UsageError(f"{file}: stop_before is {here.stop_before} s; Slurm takes {MOST_BEFORE} s at most")
    # sbatch puts %j and the like into names of files.
    if "%" in (own.job_dir or "") or "\\" in (own.job_dir or ""):
        raise UsageError(f"{file}: job_dir is {own.job_dir!r}; it must have no % and no \\")


def _check_labels(lab: Lab) -> None:
    """UsageError for a label that no node can have: the server takes it within a JobSet, and no pod is ever made."""
    for key, value in lab.node_selector.items():
        if not names.is_qualified(key) or (value and not names.LABEL.fullmatch(value)):
            raise UsageError(
                f"{lab.file}: [node_selector] {key!r:.80} = {value!r:.80} is no label of a node: letters, digits, -, _ "
                "and ., 63 at most, as `kubectl get nodes --show-labels` shows them"
            )


def _check_quantities(lab: Lab) -> None:
    """UsageError for what no pod can ask for: the server takes it within a JobSet, and no pod is ever made."""
    for key, value in {"shared_memory": lab.own.shared_memory, **lab.limits}.items():  # type: ignore[union-attr]
        where = key if key == "shared_memory" else f"[limits] {key}"
        if not names.QUANTITY.fullmatch(value):
            raise UsageError(
                f"{lab.file}: {where} is {value!r:.40}; it must be a number with a unit, such as 64Gi or 500m"
            )
        if key == "nvidia.com/gpu":
            raise UsageError(f"{lab.file}: {where}: give it with the key `gpus_per_node`")
        if where != key and not names.is_resource(key):
            raise UsageError(
                f"{lab.file}: [limits] {key!r:.60} is nothing that a pod can ask for: cpu, memory, ephemeral-storage, "
                "hugepages-SIZE, or VENDOR/NAME of a device, as `kubectl describe nodes` shows them"
            )
        if key.startswith("hugepages-") and not {"cpu", "memory"} & lab.limits.keys():
            raise UsageError(f"{lab.file}: {where} needs cpu or memory beside it: Kubernetes takes no such pod without")
        if "/" in key and not value.isdecimal():
            raise UsageError(f"{lab.file}: {where} is {value!r:.40}; of a device it must be a whole number")


def _check_kubernetes(lab: Lab, own: Kubernetes) -> None:
    if len(own.name) > 12 or not own.name[0].isalpha():  # names of pods are made of it, and have 63 characters at most
        raise UsageError(
            f"{lab.file}: name is {own.name!r:.40}; it must begin with a letter and have at most 12 characters"
        )
    if not own.image:
        raise UsageError(f"{lab.file}: image is missing; pods need one")
    _check_labels(lab)
    _check_quantities(lab)
    for verb in ("", *lab.steps):
        image = lab.of(verb, True).image
        if not names.is_image(names.image_name(image)):
            where = f"[step.{verb}] image" if verb else "image"
            raise UsageError(
                f"{lab.file}: {where} is {image!r:.300}; pods need the name of an image in a registry, such as "
                "ghcr.io/org/slipway:1"
            )
    for key, most in {"namespace": 63, "queue": 63, "secrets": 253}.items():  # a queue's is that of a label
        value = getattr(own, key)
        if value is not None and not (names.DOMAIN.fullmatch(value) and len(value) <= most):
            raise UsageError(
                f"{lab.file}: {key} is {value!r:.60}; it must be a name of Kubernetes, of at most {most} characters: "
                "lower case letters, digits, - and ."
            )
    if "." in (own.namespace or ""):
        raise UsageError(f"{lab.file}: namespace is {own.namespace!r}; it must be a name of Kubernetes without .")
    for source, target in lab.mounts:
        if target in OF_THE_POD:
            raise UsageError(f"{lab.file}: a mount has the target {target}, where every pod has a folder of its own")
        claim, slash, folder = source.partition("/")
        if not names.DOMAIN.fullmatch(claim) or len(claim) > 253 or folder.startswith("/") or (slash and not folder):
            raise UsageError(f"{lab.file}: mount of {source!r:.60}; it must be the name of a claim, or CLAIM/FOLDER")
