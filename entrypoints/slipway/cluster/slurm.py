"""The scripts of a chain for Slurm, and what one call of ssh does with them. remote.sh runs on the login node."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from slipway.cluster.chain import Step
from slipway.cluster.settings import Lab, Slurm
from slipway.errors import UsageError
from slipway.options import flag

HERE = Path(__file__).parent
LETTERS = "bcdfghjkmnpqrstvwxz"
BEFORE_THE_END = 60  # seconds that a step which does not save has, to end


def new_name() -> str:
    """The name of a run: its time, so that names sort, and letters by which two of one second differ."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + "".join(secrets.choice(LETTERS) for _ in range(3))


def folder(lab: Lab, run: str) -> str:
    """The folder of a run on the cluster."""
    return f"{_own(lab).job_dir}/{run}"


def script(step: Step, lab: Lab, run: str) -> str:
    """The sbatch script of one step."""
    variables = {
        "STATE": f"{folder(lab, run)}/{step.name}",
        "VERB": step.verb,
        "SECRETS": _own(lab).secrets or "",
        "MOST_RESTARTS": str(_own(lab).most_restarts),
        "MOST_LOSSES": str(_own(lab).most_losses),
        "NAMES": ",".join(lab.env),
    }
    lines = [
        "#!/bin/bash",
        f"# Step {step.number} of the run {run}, made by `slipway submit`.",
        *(f"#SBATCH {word}" for word in _flags(step, lab, run)),
        "",
        *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        "",
        *_step(step, lab),
        "",
    ]
    return "\n".join(lines) + (HERE / "step.sh").read_text("utf-8")


def _step(step: Step, lab: Lab) -> list[str]:
    """The function `step` of a script, which becomes srun.

    It runs in a process of its own. Only there the variables of [env] and of the file of secrets are set: they may have
    any names, and the script's own stay as they are.
    """
    secrets = _own(lab).secrets
    return [
        "step() {",
        f"    set -- {_srun(step, lab)} \\",
        f"        {shlex.join([*shlex.split(step.keys.command), step.verb, *step.words])}",
        *(f"    export {name}={shlex.quote(value)}" for name, value in lab.env.items()),
        *([f"    set -a && . {shlex.quote(secrets)} && set +a || exit 78"] if secrets else []),
        '    exec "$@"',
        "}",
    ]


def _own(lab: Lab) -> Slurm:
    assert isinstance(lab.own, Slurm)
    return lab.own


def _flags(step: Step, lab: Lab, run: str) -> list[str]:
    """What stands behind #SBATCH, one flag each."""
    keys, state = step.keys, f"{folder(lab, run)}/{step.name}"
    before = keys.stop_before if step.saves else BEFORE_THE_END
    flags = {
        "job-name": f"{keys.name}-{step.verb}",
        "comment": f"slipway {run}",
        "nodes": str(keys.nodes),
        "ntasks-per-node": "1",
        "time": keys.time,
        "signal": f"USR1@{before}",
        "requeue": "",
        "output": f"{state}.log",
        "open-mode": "append",
        "chdir": keys.job_dir,
    }
    flags |= {name: value for name in ("partition", "account", "qos") if (value := getattr(keys, name))}
    flags |= {"gpus-per-node": str(keys.gpus_per_node)} if keys.gpus_per_node else {}
    if step.kind.whole:
        flags |= {"exclusive": "", "mem": "0"} if keys.exclusive else {}
    else:
        flags |= {"cpus-per-task": str(keys.cpus)}
    own = lab.flags_of(step.verb)
    _refuse_gpus_twice(step, lab, own)
    if {"mem-per-cpu", "mem-per-gpu"} & own.keys():
        flags.pop("mem", None)  # sbatch takes one of the three
    flags |= own
    return [flag(name) + (f"={_quoted(value)}" if value else "") for name, value in flags.items()]


def _refuse_gpus_twice(step: Step, lab: Lab, own: Mapping[str, str]) -> None:
    """UsageError where --gres asks for GPUs beside those of gpus_per_node: Slurm would give both, or none."""
    gres = own.get("gres", "")
    if step.keys.gpus_per_node and re.search(r"(^|[,:/])gpu(:|,|$)", gres):
        raise UsageError(
            f"{lab.file}: [sbatch] gres is {gres!r}, and gpus_per_node is {step.keys.gpus_per_node} for {step.verb}: "
            "set gpus_per_node = 0 where gres asks for the GPUs, or leave gres out"
        )


def _quoted(value: str) -> str:
    """As sbatch reads it: not a shell, but quotes hold a value with spaces together."""
    return value if not set(value) & set(" '\"\\#") else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _srun(step: Step, lab: Lab) -> str:
    """srun and its flags, as shell words: what the nodes need to be one step, and the container."""
    words = ["--wait=60", "--kill-on-bad-exit=1"]
    if image := step.keys.image:
        mounts = ",".join([*(lab.own.mounts or []), *(_own(lab).local_mounts or [])])
        words += [f"--container-image={pyxis_name(image)}", *([f"--container-mounts={mounts}"] if mounts else [])]
        words += ["--no-container-mount-home"]
    quoted = f'"$(type -P srun)" {shlex.join(words)}'  # by its path: [env] may have another PATH
    # Where the image sets a variable too, the job's counts.
    return quoted + (' ${NAMES:+"--container-env=$NAMES"}' if step.keys.image else "")


def is_file(image: str) -> bool:
    """The image is a squashfs file of the cluster; else it has a name in a registry."""
    return image.startswith("/")


def pyxis_name(image: str) -> str:
    """An image as pyxis names it: REGISTRY#IMAGE:TAG where people write REGISTRY/IMAGE:TAG."""
    image = image.removeprefix("docker://")
    registry, slash, rest = image.partition("/")
    is_name = slash and "#" not in image and not is_file(image)
    return f"{registry}#{rest}" if is_name and (set(registry) & {".", ":"} or registry == "localhost") else image


# ---------------------------------------------------------------------------- what the login node gets


def call(function: str, lab: Lab, **variables: str | Sequence[str]) -> str:
    """The text of one call: remote.sh, variables, and a function of it.

    Args:
        variables: each a text or a list of texts, by the name that remote.sh has for it.
    """
    lines = [f"{name}={_assigned(value)}" for name, value in variables.items()]
    lines = [f"JOB_DIR={shlex.quote(_own(lab).job_dir or '')}", *lines, f"main {function}", ""]
    return (HERE / "remote.sh").read_text("utf-8") + "\n".join(lines)


def _assigned(value: str | Sequence[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({' '.join(map(shlex.quote, value))})"


def submission(steps: Sequence[Step], lab: Lab, run: str) -> str:
    """The call that submits a chain: whole, or not at all."""
    own = _own(lab)
    images = sorted({step.keys.image for step in steps if step.keys.image and is_file(step.keys.image)})
    return call(
        "submit",
        lab,
        DIR=folder(lab, run),
        NAMES=[step.name for step in steps],
        SCRIPTS=[script(step, lab, run) for step in steps],
        CPUS=["" if step.kind.whole else str(step.keys.cpus) for step in steps],
        OUTS=[run_folder(step, lab) for step in steps],
        IDS=[],
        SOURCES=[mount.split(":")[0] for mount in own.mounts or []],
        IMAGES=images,
        SECRETS=own.secrets or "",
        PARTITIONS=[step.keys.partition or "" for step in steps],
        META=json.dumps(meta(steps, lab)),
    )


def run_folder(step: Step, lab: Lab) -> str:
    """The --out of a `train` as the login node sees it; empty for other steps."""
    return (lab.on_the_host(step.arguments["out"]) or "") if step.saves else ""


def meta(steps: Sequence[Step], lab: Lab) -> Mapping[str, object]:
    """What is kept beside a run, for people and for `status`."""
    return {"name": lab.own.name, "steps": [{"name": step.name, "words": [step.verb, *step.words]} for step in steps]}
