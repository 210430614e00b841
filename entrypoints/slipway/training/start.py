"""One start of a training run on this node: resolve, check, meet the other nodes, run the workers, report."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import locate
from slipway.checkpoint.lora import settings_of
from slipway.checkpoint.torch_dist import Reader
from slipway.errors import SlipwayError, Stopped, UsageError
from slipway.launch import torchrun
from slipway.launch.failure import FAILED, Failure
from slipway.launch.link import Link, meet
from slipway.launch.placement import Patience, Placement
from slipway.launch.token import Token
from slipway.launch.topology import ALONE, Topology, find_topology, gpus_here
from slipway.options import flag
from slipway.report import Summary
from slipway.signals import StopRequests
from slipway.tokens.blend import as_text, parts_of
from slipway.training import foreign, layout, memory, preflight, recipes, weights
from slipway.training.agreement import claims, is_trained_on
from slipway.training.claim import Claim
from slipway.training.outcome import Run, claim_folder, error_of, finish, note, result_of, stopped
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder
from slipway.training.targets import ALL
from slipway.training.targets import resolved as targets_of
from slipway.training.whole import newest_whole
from slipway.untrusted import tell

# Of warm-up and constant steps, the part of a run that they take by default.
SHARES = {"warmup_steps": Recipe.steps // Recipe.warmup_steps, "constant_steps": Recipe.steps // Recipe.constant_steps}
PATHS = ("model", "data", "out", "eval_data")


@dataclass(frozen=True)
class Request:
    """What a person asked `train` for.

    Args:
        given: the fields of Recipe that flags gave.
        resume: auto or never.
        measured: only the speed counts, see worker.run.
    """

    given: dict[str, Any]
    choice: recipes.Choice
    placement: Placement
    patience: Patience
    resume: str
    measured: bool = False


def plan(request: Request) -> str:
    """What --dry-run prints: recipe, topology, memory, environment and command. Nothing is written."""
    run, config = _prepare(request, dry_run=True)
    words = torchrun.command(run.topology, _worker_arguments(Path("SCRATCH"), run), _logs(run))
    lines = [json.dumps(vars(run.recipe), indent=1), str(run.topology)]
    if config:
        lines.append(str(memory.estimate(run.recipe, config, run.topology.world_size)))
    lines += [f"{name}={value}" for name, value in torchrun.shown_environment().items()]
    if run.topology.world_size == 1:
        lines.append("one process: no torchrun is started; the command does the same as")
    return "\n".join([*lines, shlex.join(words)])


def run(request: Request) -> Summary:
    """Train to the end, or to a request to stop.

    Errors: those of `train`, see errors.py; Stopped where it was stopped and saved.
    """
    run, _ = _prepare(request)
    if run.begins_at >= run.recipe.steps:
        if preflight.has_moved(run.recipe, run.folder):
            scanned = run.scanned or _scan(vars(run.recipe))
            preflight.check_inputs(run.folder, run.begins_at, _claims(run, scanned))
        return finish(run)
    topology = run.topology
    with (
        tempfile.TemporaryDirectory(prefix="slipway-train-") as scratch,
        StopRequests(Path(scratch) / "stop", request.patience.grace) as stop,
    ):
        scanned = run.scanned or _scan(vars(run.recipe))
        preflight.check_held_out(run.recipe, scanned)
        scanned.save(Path(scratch))
        tell(f"train: {scanned.epochs(run.recipe)}")
        tell(str(topology))
        preflight.make_folder(run.folder)
        agreed = _claims(run, scanned)
        preflight.check_inputs(run.folder, run.begins_at, agreed)
        if is_trained_on(agreed):
            tell(f"train: --eval-data {run.recipe.eval_data} is data that is trained on: its loss is not of new data")
        token = Token.of(run.folder.path, request.placement.run_token_file)
        with Claim(run.folder.owner) if topology.rank == 0 else contextlib.nullcontext():
            link = meet(topology, agreed, request.patience.rendezvous_timeout, token)
            if topology.rank == 0:
                claim_folder(run, agreed)
            try:
                failure = _work(run, Path(scratch), stop, link)
            except Stopped as error:  # between the claim and the first worker
                if topology.rank == 0:
                    note(run.folder, "stopped", stop.asked_by, Stopped.exit_code)
                raise stopped(run, str(error)) from None
            link.close()
            return result_of(run, failure, stop.grace_is_over)


def _claims(run: Run, scanned: preflight.Scanned) -> dict[str, str]:
    return claims(run.recipe, scanned.parts, scanned.held_out, run.topology, run.begins_at)


def settled(request: Request) -> Run:
    """What `run` would do, with every value of the recipe decided; nothing is said or written."""
    return _settle(request, dry_run=False)[0]


def _prepare(request: Request, dry_run: bool = False) -> tuple[Run, dict[str, Any] | None]:
    """(the run, config.json of its model where the checkpoint has one), everything checked that can be checked now."""
    run, config, said = _settle(request, dry_run)
    for line in said:
        tell(f"train: {line}")
    if not dry_run and run.begins_at < run.recipe.steps:
        preflight.check_base(run.recipe)
    return run, config


def _settle(request: Request, dry_run: bool) -> tuple[Run, dict[str, Any] | None, list[str]]:
    started = time.time()
    request.patience.check()
    chosen = request.given | recipes.parse_settings(request.choice.set or [], request.given)
    topology = find_topology(request.placement)
    given = locate.nemo_path(chosen["model"])
    preflight.check_out(chosen["out"], given)
    config_file = locate.config_file(request.choice.config)
    model, foreign_notes = foreign.with_own_context(given, Path(chosen["out"]).absolute(), config_file, dry_run)
    preflight.check_checkpoint(model)
    family, config = preflight.model_of(model) or ("", None)
    shipped, said = _recipe(request, family, config)
    if dry_run and shipped and topology.source == ALONE and request.placement.nproc_per_node is None:
        topology = _of_recipe(shipped, topology.master_port)
    values = (shipped.values if shipped else {}) | chosen | {"model": str(model)}
    preflight.check_idle(chosen, values)
    preflight.check_data(values["data"], values.get("eval_data", ""))
    packing, notes = _packing(values, config)
    values |= packing
    said += notes
    precision, notes = _precision(values, chosen, config, dry_run)
    values |= precision
    said += notes
    scanned = None
    if (epochs := request.choice.epochs) is not None:
        _check_epochs(values, chosen)
        scanned = _scan(values)
        values |= _steps_of(epochs, scanned, values)
    schedule = _fitting_schedule(values, chosen)
    values |= schedule
    if config:
        if values.get("mode") == "lora":
            lora, notes = _lora(values, chosen, config)
            values |= lora
            said += notes
        known = request.choice.gpu_memory or (recipes.gpu_memory() if dry_run or gpus_here() else None)
        before = values
        found = layout.fitted(values, chosen, config, topology.world_size, known)
        values = found.values
        said += [f"for {topology.world_size} processes: {', '.join(found.changes)}"] if found.changes else []
        if scanned and found.values.get("context_parallel_size") != before.get("context_parallel_size"):
            scanned = _scan(values)  # packed samples are shared in other parts
        if scanned and epochs is not None:  # the layout may have another global batch
            values |= _steps_of(epochs, scanned, values)
            schedule = _fitting_schedule(values, chosen)
            values |= schedule
    why = f"--steps is {values.get('steps', Recipe.steps)}" + (", and --min-lr is --lr" if _is_constant(values) else "")
    said += [f"{flag(name)} → {now}, since {why}" for name, now in schedule.items()]
    recipe = Recipe(**values)
    recipe.check(topology.world_size, shipped.name if shipped else "")
    preflight.check_logging(recipe)
    if not dry_run:
        preflight.check_precision(recipe)
        preflight.check_context(recipe)
        if config:
            preflight.check_gpus(config)
    for name in PATHS:
        if path := getattr(recipe, name):
            setattr(recipe, name, as_text(parts_of(path)) if name == "data" else str(Path(path).absolute()))
    folder = RunFolder.of(recipe)
    begins_at, damaged = newest_whole(folder)
    notes = preflight.check_continued(recipe, folder, begins_at, request.resume)
    notes += [
        f"{why}: {checkpoint.name} is kept as damaged-{checkpoint.name}, and the run goes on from step {begins_at}"
        for checkpoint, why in damaged.items()
    ]
    notes = [*foreign_notes, *said, *notes, *([] if request.measured else preflight.without_tokenizer(model))]
    return Run(recipe, topology, folder, begins_at, started, scanned, [*damaged], request.measured), config, notes


def _packing(values: Mapping[str, Any], config: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """(the fields of Recipe that say whether samples are packed, notes), where no flag says so."""
    if values.get("pack") is not None:
        return {}, []
    recipe = Recipe(**values)
    before = RunFolder.of(recipe).recipe
    if before.is_file():  # a run goes on as it began
        return {"pack": Recipe.load(before).pack}, []
    packs, problem = recipe.should_pack(config)
    if not packs:
        return {"pack": False}, [f"samples are not packed: --pack {problem}"] if problem else []
    said = "several samples share a sequence where they fit, and none sees another; --pack=false for one each"
    return {"pack": True}, [said]


def _precision(
    values: Mapping[str, Any], chosen: Collection[str], config: Mapping[str, Any] | None, dry_run: bool
) -> tuple[dict[str, Any], list[str]]:
    """(the field of Recipe that says in what is multiplied, notes), where no flag says so.

    A recipe's FP8 is a matter of speed: where it cannot be, the run does without. --dry-run plans for other machines.
    """
    if "precision" in chosen:
        return {}, []
    recipe = Recipe(**values)
    before = RunFolder.of(recipe).recipe
    if before.is_file():  # a run goes on as it began
        return {"precision": Recipe.load(before).precision}, []
    if recipe.precision != "fp8":
        return {}, []
    if problem := recipe.unfit_for_fp8(config) or ("" if dry_run else preflight.without_fp8()):
        return {"precision": "bf16"}, [f"large products are in BF16, because the recipe's fp8 {problem}"]
    return {}, ["large products are in FP8, as the recipe has it; --precision bf16 for BF16, which takes longer"]


def _scan(values: Mapping[str, Any]) -> preflight.Scanned:
    """Read the data that a run with these fields of Recipe is for."""
    return preflight.scan_data(
        values["data"],
        values.get("eval_data", ""),
        values.get("seq_length", Recipe.seq_length),
        preflight.vocab_size(Path(values["model"])),
        bool(values.get("pack")),
        Recipe(**values).shares_of_samples,
    )


def _check_epochs(values: Mapping[str, Any], chosen: Collection[str]) -> None:
    """UsageError where --epochs says what another flag says too, or nothing."""
    if "steps" in chosen:
        raise UsageError("--epochs and --steps both say how long the run is; leave one out")
    if len(parts_of(values["data"])) > 1:
        raise UsageError("--epochs has no meaning for several files, which are read at different rates; use --steps")


def _steps_of(epochs: float, scanned: preflight.Scanned, values: Mapping[str, Any]) -> dict[str, int]:
    """The steps that take so many epochs; the last step is a whole one."""
    batch = values.get("global_batch_size", Recipe.global_batch_size)
    return {"steps": max(1, math.ceil(epochs * len(scanned.parts[0]) / batch - 1e-9))}


def _lora(
    values: Mapping[str, Any], chosen: Collection[str], config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(the fields of Recipe that say which adapters there are, notes)."""
    found = _of_adapter(values, chosen)
    words = found.get("lora_targets") or values.get("lora_targets", Recipe.lora_targets)
    targets, notes = targets_of(words, config)
    if values.get("dora") and words == ALL and weights.has_experts(config):
        targets = ",".join(name for name in targets.split(",") if "fc" not in name)
        notes.append(f"--dora cannot be on experts, so its adapters are on {targets}")
    rank = found.get("lora_rank") or values.get("lora_rank", Recipe.lora_rank)
    alpha = found.get("lora_alpha") or values.get("lora_alpha") or rank
    return found | {"lora_targets": targets, "lora_alpha": alpha}, notes


def _recipe(
    request: Request, family: str, config: Mapping[str, Any] | None
) -> tuple[recipes.Shipped | None, list[str]]:
    """(the recipe that was asked for, else the shipped one that fits the checkpoint; what is to be said of it)."""
    mode, gpu_gb = request.given.get("mode", Recipe.mode), request.choice.gpu_memory or recipes.gpu_memory()
    if name := request.choice.recipe:
        shipped = recipes.load(name, mode, gpu_gb)
        others = family and shipped.family not in ("", family)
        if others and not (
            config and shipped.name in recipes.names() and layout.is_alike(shipped.name, family, config)
        ):
            raise UsageError(
                f"--recipe {shipped.name} is for {shipped.family}, but --model {request.given['model']} is {family}; "
                "choose a recipe of that family"
            )
        return shipped, []
    if config is None:
        return None, []
    parameters = weights.parts_of(config).total
    size = f"{family} with {parameters / 1e9:.3g} billion weights"
    if (name := layout.recipe_for(family, config, parameters)) is None:
        there = ", ".join(f"{one} {of / 1e9:.3g}" for one, of in layout.sizes_of(family, config).items())
        return None, [f"no shipped recipe is for {size} (there are: {there}); the defaults are used"]
    said = [f"recipe {name}, since the model is {size}; --recipe chooses another"]
    return recipes.load(name, mode, max(gpu_gb, min(recipes.GPUS))), said


def _fitting_schedule(values: Mapping[str, Any], chosen: Collection[str]) -> dict[str, int]:
    """Warm-up and constant steps for a run that is shorter than those nobody asked for, or constant; {} where they fit.

    Args:
        values: the fields of Recipe that are not at their defaults.
        chosen: the fields that flags and --set gave.
    """
    if _is_constant(values):
        return {name: 0 for name in SHARES if name not in chosen}
    schedule = {name: values.get(name, getattr(Recipe, name)) for name in SHARES}
    steps = values.get("steps", Recipe.steps)
    if sum(schedule.values()) <= steps:
        return {}
    return {name: min(schedule[name], steps // share) for name, share in SHARES.items() if name not in chosen}


def _is_constant(values: Mapping[str, Any]) -> bool:
    """The learning rate has one value."""
    return values.get("lr", Recipe.lr) == values.get("min_lr", Recipe.min_lr)


def _of_adapter(values: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """Rank, alpha and targets of the adapters to continue from; {} where there are none.

    Errors: UsageError where a flag says otherwise, or there is no such checkpoint.
    """
    if not values.get("adapter"):
        return {}
    folder = locate.nemo_path(values["adapter"])
    if not (folder / "weights" / ".metadata").is_file():
        raise UsageError(
            f"--adapter {folder} is not a NeMo checkpoint; `slipway import --adapter` makes one from peft's"
        )
    preflight.check_adapter(folder, Path(values["model"]))
    settings = settings_of(Reader(folder))
    found: dict[str, Any] = {
        "lora_rank": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_targets": ",".join(settings.targets),
        "dora": settings.kind == "DoRA",
        "rslora": False,  # alpha is already the one that is divided by the rank
    }
    for name, value in found.items():
        if name in chosen and values[name] != value:
            raise UsageError(
                f"{flag(name)} is {values[name]}, but --adapter {folder} has {value}; leave out {flag(name)}"
            )
    return {name: value for name, value in found.items() if value} | {"adapter": str(folder.absolute())}


def _of_recipe(shipped: recipes.Shipped, port: int) -> Topology:
    """The nodes that a recipe is for, whatever is here."""
    return Topology(shipped.nodes, shipped.processes_per_node, 0, "MASTER", port, f"recipe {shipped.name}")


def _worker_arguments(scratch: Path, run: Run) -> list[str]:
    files = [f"{scratch}/recipe.json", "--indices", str(scratch), "--stop-file", f"{scratch}/stop"]
    measured = ["--measured"] if run.measured else []
    return [*files, "--nodes", str(run.topology.nodes), "--started", str(run.started), *measured]


def _logs(run: Run) -> Path:
    """The folder that the workers of this start log to."""
    return run.folder.logs / f"node{run.topology.node_rank}" / time.strftime("%Y%m%d-%H%M%S")


def _work(run: Run, scratch: Path, stop: StopRequests, link: Link) -> Failure | None:
    """Run the workers of this command to their end; why they failed, if they did."""
    run.recipe.save(scratch / "recipe.json")
    if run.topology.world_size > 1:
        logs = _logs(run)
        logs.mkdir(parents=True, exist_ok=True)
        failure = torchrun.launch(run.topology, _worker_arguments(scratch, run), stop, logs, link)
        if failure and run.topology.rank == 0:
            note(run.folder, "failed", failure.said or str(failure), error_of(failure).exit_code)
        return failure

    def work() -> None:
        from slipway.training import worker

        worker.run(run.recipe, scratch, stop.stop_file, 1, run.started, measured=run.measured)

    try:
        torchrun.run_here(run.topology, work, stop)
    except Stopped:
        raise
    except BaseException as error:
        known = isinstance(error, SlipwayError)
        why = str(error) if known else f"{type(error).__name__}: {error}"
        note(run.folder, "failed", why, error.exit_code if isinstance(error, SlipwayError) else SlipwayError.exit_code)
        if isinstance(error, torchrun.GraceIsOver):
            return Failure("rank 0", str(error), FAILED)
        raise
    return None
