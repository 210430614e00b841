"""The steps of a chain: words, checked as the commands themselves check them, and paths that the cluster has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.arguments import arguments_of, parse
from slipway.cluster.settings import Lab, Slurm
from slipway.errors import UsageError
from slipway.options import flag, suggestion
from slipway.tokens.blend import parts_of
from slipway.untrusted import HARMFUL, without_credentials

THEN = "then"
OF_THE_CLUSTER = ("node_rank", "master_addr")  # what the launcher says


@dataclass(frozen=True)
class Kind:
    """What a command is as a step.

    Args:
        function: the command.
        paths: its arguments that name something on the cluster: folders, files, hf:// and nemo:// names.
        whole: it runs on all nodes of the cluster with their GPUs; else on one node without.
    """

    function: Callable[..., Any]
    paths: tuple[str, ...]
    whole: bool = False


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Args:
        number: from 1.
        words: the command line after the verb.
        arguments: the same, parsed.
        keys: the keys of lab.toml as they are for this step: a Slurm or Kubernetes.
    """

    number: int
    verb: str
    words: list[str]
    arguments: dict[str, Any]
    kind: Kind
    keys: Any

    @property
    def name(self) -> str:
        return f"{self.number}-{self.verb}"

    @property
    def saves(self) -> bool:
        """It saves when it is told to stop, and goes on from there."""
        return self.verb == "train"


def steps_of(words: list[str], lab: Lab, kinds: Mapping[str, Kind]) -> list[Step]:
    """The steps that a person wrote: VERB … then VERB …

    Args:
        kinds: verb → what it is as a step.

    Errors: UsageError for words that a command does not take, and for paths that the cluster's containers do not have.
    """
    return [_step(number, part, lab, kinds) for number, part in enumerate(_split(words), 1)]


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            parts.append([])
        else:
            parts[-1].append(word)
    if not all(parts):
        raise UsageError(f"submit: a step is empty; write it as: import SRC OUT {THEN} train --model …")
    return parts


def _step(number: int, words: list[str], lab: Lab, kinds: Mapping[str, Kind]) -> Step:
    verb, rest = words[0].replace("_", "-"), words[1:]
    if verb not in kinds:
        raise UsageError(f"submit: {words[0]!r} is no step{suggestion(verb, kinds)}; there are {', '.join(kinds)}")
    kind = kinds[verb]
    try:
        arguments = parse(verb, kind.function, rest)[1]
        for word in rest:
            _check_word(verb, word)
        keys = lab.of(verb, kind.whole)
        _check_recipe(arguments.get("recipe"))
        positional = arguments_of(kind.function)[1]
        given = arguments | _settings(verb, arguments)
        for name in kind.paths:
            for path in _paths(given, name):
                check_path(f"{verb}: {name.upper() if name in positional else flag(name)}", path, lab)
        _check_placement(verb, arguments, keys)
        if verb == "train":
            rest = _of_train(rest, arguments, keys)
    except UsageError as error:
        raise UsageError(f"submit: step {number}: {error}") from None
    return Step(number, verb, rest, arguments, kind, keys)


def _check_word(verb: str, word: str) -> None:
    if HARMFUL.search(word):
        raise UsageError(f"{verb}: {word[:40]!r} has a character that no line of a script can have")
    if without_credentials(word) != word:
        raise UsageError(f"{verb}: a URL has a password, which everybody could read; put it into the file of `secrets`")


def _check_recipe(name: str | None) -> None:
    """UsageError for the name of a recipe that does not ship; files of recipes are on the cluster."""
    from slipway.training import recipes

    if name and not name.endswith(".toml") and name not in recipes.names():
        raise recipes.unknown(name)


def _check_placement(verb: str, arguments: Mapping[str, Any], keys: Any) -> None:
    """UsageError for what the cluster decides, in the words of any command that runs on several nodes."""
    for name in OF_THE_CLUSTER:
        if name in arguments:
            raise UsageError(f"{verb}: {flag(name)} is given by the cluster; leave it out")
    if (nodes := arguments.get("nodes", keys.nodes)) != keys.nodes:
        given = f"nodes in lab.toml is {keys.nodes}" if keys.nodes > 1 else "this step has one node"
        raise UsageError(f"{verb}: --nodes is {nodes}, but {given}; leave it out")
    if (processes := arguments.get("nproc_per_node", 0)) > keys.gpus_per_node > 0:
        raise UsageError(
            f"{verb}: --nproc-per-node is {processes}, but gpus_per_node in lab.toml is {keys.gpus_per_node}; each "
            "process needs a GPU: leave it out"
        )


def _of_train(words: list[str], arguments: Mapping[str, Any], keys: Any) -> list[str]:
    """The words of `train` with the time to save; UsageError for what a job that is queued again cannot do."""
    if arguments.get("resume") == "never":
        raise UsageError("train: --resume never would end a run that was queued again; leave it out")
    longest = keys.stop_before - 60
    if arguments.get("grace", 0) > keys.stop_before:
        raise UsageError(f"train: --grace is {arguments['grace']:g} s, more than stop_before, {keys.stop_before} s")
    return words if "grace" in arguments else [*words, "--grace", str(longest)]


# ---------------------------------------------------------------------------- paths


def _settings(verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that --set gives to a command that trains; UsageError for what is none."""
    from slipway.training.recipes import parse_settings

    return parse_settings(arguments.get("set") or [], arguments) if verb in ("train", "bench") else {}


def _paths(arguments: Mapping[str, Any], name: str) -> list[str]:
    """The paths of one argument; a recipe by its name is none, and a blend is several."""
    value = arguments.get(name)
    if not value or (name == "recipe" and not value.endswith(".toml")):
        return []
    if name in ("data", "eval_data") and "://" not in value:
        return [str(part.path) for part in parts_of(value)]
    return [value]


def check_path(where: str, path: str, lab: Lab) -> None:
    """UsageError for what the jobs of a cluster cannot read or keep.

    Args:
        where: what the message begins with.
        path: a folder or file as the container sees it, hf://org/name, hf:///folder or nemo://name.
    """
    if path.startswith(("hf:///", "nemo:///")):
        path = path.partition("://")[2]
    elif path.startswith("hf://"):
        _check_home(where, path, lab, "HF_HOME", ("HF_HUB_CACHE",))
        return
    elif path.startswith("nemo://"):
        if not path.removeprefix("nemo://") or ".." in Path(path).parts:
            raise UsageError(f"{where} is {path}, which does not name a model; give nemo://NAME")
        _check_home(where, path, lab, "NEMO_HOME", ("NEMO_MODELS_CACHE",))
        return
    if not path.startswith("/"):
        raise UsageError(f"{where} is {path}; give the whole path, from /, as the jobs see it")
    if ".." in Path(path).parts:
        raise UsageError(f"{where} is {path}; write it without ..")
    if lab.on_the_host(path) is None:
        raise UsageError(f"{where} is {path}, which no mount of {lab.file} holds{_nearest(path, lab)}")


def _check_home(where: str, name: str, lab: Lab, variable: str, others: tuple[str, ...]) -> None:
    """UsageError unless the place that a name stands for outlives the container: a variable under a mount."""
    if not lab.own.image:
        return  # ~/.cache is the user's own
    for one in (*others, variable):
        if one in lab.env:
            if lab.on_the_host(lab.env[one]) is None:
                raise UsageError(f"{where} is {name}, but {one} is {lab.env[one]}{_nearest(lab.env[one], lab)}")
            return
    raise UsageError(
        f"{where} is {name}: set {variable} in [env] of {lab.file} to a folder under a mount, else it is gone with the "
        "container"
    )


def _nearest(path: str, lab: Lab) -> str:
    """What a path outside the mounts may have meant, or where they are."""
    for source, target in lab.mounts:
        if isinstance(lab.own, Slurm) and (path + "/").startswith(source.rstrip("/") + "/"):
            return f"; the containers see it as {target}{path.removeprefix(source.rstrip('/'))}"
    return f"; there are {', '.join(target for _, target in lab.mounts) or 'none'}"
