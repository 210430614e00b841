"""`slipway train`: from a NeMo checkpoint and token data to trained heads, adapters or weights."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from entrypoints.checkpoint import locate
from entrypoints.checkpoint.nemo_context import SOURCE_CONFIG
from entrypoints.errors import DataError, PreflightError, SlipwayError, Stopped, UsageError, WriteError
from entrypoints.launch import torchrun
from entrypoints.launch.failure import FAILED, Failure
from entrypoints.launch.link import Link, meet
from entrypoints.launch.signals import StopRequests
from entrypoints.launch.topology import ALONE, Topology, find_topology
from entrypoints.report import Summary
from entrypoints.training import recipes
from entrypoints.training.agreement import claims
from entrypoints.training.recipe import Recipe
from entrypoints.training.run_folder import RunFolder

if TYPE_CHECKING:
    from entrypoints.tokens.scan import Index


def train(
    *,
    model: str,
    data: str,
    out: str,
    recipe: str | None = None,
    mode: Literal["heads", "sft", "lora", "pretrain"] = "heads",
    steps: int | None = None,
    seq_length: int | None = None,
    micro_batch_size: int | None = None,
    global_batch_size: int | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
    constant_steps: int | None = None,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    expert_parallel_size: int | None = None,
    context_parallel_size: int | None = None,
    save_every: int | None = None,
    keep: int | None = None,
    seed: int | None = None,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    lora_targets: str | None = None,
    pack: bool | None = None,
    eval_data: str | None = None,
    eval_every: int | None = None,
    eval_batches: int | None = None,
    wandb_project: str | None = None,
    set: list[str] | None = None,
    gpu_memory: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    nproc_per_node: int | None = None,
    resume: Literal["auto", "never"] = "auto",
    grace: float = 600.0,
    rendezvous_timeout: float = 300.0,
    dry_run: bool = False,
) -> Summary | str:
    """Train with NeMo, in this process or under torchrun, on one node or many.

    On SIGTERM, SIGINT or SIGUSR1 it saves after the current step and exits with 75; the same command goes on from
    there, with the same order of the data. Run it on every node with the same flags but --node-rank.

    Args:
        model: NeMo checkpoint of the base model, as `import` writes it: a folder or nemo://name.
        data: tokens as `preprocess` writes them: samples in a .jsonl file, or texts in a .bin with its .idx.
        out: folder of the run: checkpoints, status.json, metrics.jsonl, loss.png, TensorBoard.
        mode: what is trained; heads = temperature and top-p heads on a frozen base, sft = all weights on responses,
            lora = low-rank adapters on a frozen base, pretrain = all weights on all tokens.
        recipe: what is not given by flags: the name of a recipe that ships (deepseek_v3, gpt_oss_120b, gpt_oss_20b,
            llama31_8b, qwen25_500m, qwen25_7b, qwen3_235b_a22b, qwen3_30b_a3b) or a .toml file like them.
        steps: optimiser steps in all (400).
        seq_length: tokens per sample; longer samples are dropped and counted (6144).
        micro_batch_size: samples per rank and forward pass (1).
        global_batch_size: samples per step over all ranks (32).
        lr: peak learning rate (5e-6).
        min_lr: learning rate at the end of the cosine (2e-8).
        warmup_steps: steps of linear warm-up (20).
        constant_steps: steps at min_lr at the end (50).
        tensor_parallel_size: ranks that share each layer (1).
        pipeline_parallel_size: stages the layers are split into (1).
        expert_parallel_size: ranks that share the experts (1).
        context_parallel_size: ranks that share each sequence (1).
        save_every: steps between checkpoints (100).
        keep: newest checkpoints that are kept (2).
        seed: of the first weights of what is attached, the order of the data and the dropped tokens (1234).
        lora_rank: inner size of an adapter (32).
        lora_alpha: an adapter's output is multiplied by alpha / rank (32).
        lora_dropout: share of an adapter's inputs that are dropped (0).
        lora_targets: Megatron's modules that get an adapter, with commas between (all four linear layers).
        pack: put several samples of a .jsonl file into one sequence where they fit; none of them sees another.
        eval_data: tokens that are held out, for an evaluation now and then.
        eval_every: steps between evaluations (100).
        eval_batches: global batches of an evaluation, at most (32).
        wandb_project: log to this project of Weights & Biases as well, with WANDB_API_KEY from the environment.
        set: KEY=VALUE of any key of a recipe, once or more; wins over the recipe.
        gpu_memory: GB of a GPU, for the recipe's layout; without it, what nvidia-smi says, else 80.
        nodes: number of nodes; without it, what the launcher says, else 1.
        node_rank: number of this node, from 0.
        master_addr: address of node 0.
        master_port: port on node 0 (29500); the one after it is used as well.
        nproc_per_node: processes per node; without it, one per GPU.
        resume: auto = go on from the newest checkpoint in OUT; never = refuse if there is one.
        grace: seconds to save in after a request to stop.
        rendezvous_timeout: seconds until it is an error that a node is missing at the start.
        dry_run: print the recipe, the topology and the torchrun command, and do nothing.
    """
    started = time.time()
    given = {name: value for name, value in locals().items() if name in recipes.schema() and value is not None}
    shipped = recipes.load(recipe, mode, gpu_memory or recipes.gpu_memory()) if recipe else None
    given = (shipped.values if shipped else {}) | given | recipes.parse_settings(set or [])
    topology = find_topology(nodes, node_rank, master_addr, master_port, nproc_per_node)
    if dry_run and shipped and topology.source == ALONE and nproc_per_node is None:
        topology = Topology(
            shipped.nodes, shipped.processes_per_node, 0, "MASTER", topology.master_port, f"recipe {shipped.name}"
        )
    recipe = Recipe(model=str(locate.nemo_path(model)), data=data, out=out, mode=mode, **given)
    recipe.check(topology.world_size, shipped.name if shipped else "")
    vocab_size = _check_paths(recipe)
    folder = RunFolder(Path(out).absolute())
    config = _check_model(recipe, shipped)
    for name in ("model", "data", "out", "eval_data"):
        if path := getattr(recipe, name):
            setattr(recipe, name, str(Path(path).absolute()))
    begins_at = _begin(recipe, folder, resume)
    run = Run(recipe, topology, folder, begins_at, started)
    if dry_run:
        return _plan(run, config)
    if begins_at >= recipe.steps:
        return _result(run, None, False)

    with (
        tempfile.TemporaryDirectory(prefix="slipway-train-") as scratch,
        StopRequests(Path(scratch) / "stop", grace) as stop,
    ):
        index, held_out = _scan(recipe, vocab_size, Path(scratch))
        print(topology, file=sys.stderr)
        _make_folder(folder)
        link = meet(topology, claims(recipe, index, held_out, topology, begins_at), rendezvous_timeout)
        if topology.rank == 0:
            _claim_folder(run)
        try:
            failure = _work(run, Path(scratch), stop, link)
        except Stopped:  # between the claim and the first worker
            if topology.rank == 0:
                _note(folder, "stopped", stop.asked_by)
            raise
        link.close()
        return _result(run, failure, stop.grace_is_over)


@dataclass(frozen=True)
class Run:
    """One start of `train`: what is computed, where, from which step, and when it began (time.time())."""

    recipe: Recipe
    topology: Topology
    folder: RunFolder
    begins_at: int
    started: float


def _plan(run: Run, config: dict[str, Any] | None) -> str:
    """What --dry-run prints."""
    from entrypoints.training import memory

    words = torchrun.command(run.topology, _worker_arguments(Path("SCRATCH"), run), _logs(run))
    lines = [json.dumps(vars(run.recipe), indent=1), str(run.topology)]
    if config:
        lines.append(str(memory.estimate(run.recipe, config, run.topology.world_size)))
    lines += [f"{name}={value}" for name, value in torchrun.shown_environment().items()]
    if run.topology.world_size == 1:
        lines.append("one process: the worker runs in this one, which does the same as")
    return "\n".join([*lines, shlex.join(words)])


def _check_model(recipe: Recipe, shipped: recipes.Shipped | None) -> dict[str, Any] | None:
    """The model's config.json, where its checkpoint has one; UsageError for sizes or a recipe that do not fit it."""
    path = Path(recipe.model) / "context" / SOURCE_CONFIG
    if not path.is_file():
        return None
    from entrypoints.families import family_of

    config = json.loads(path.read_text())
    family = family_of(config, path).NAME
    if shipped and shipped.family != family:
        raise UsageError(f"--recipe {shipped.name} is for {shipped.family}, and --model {recipe.model} is {family}")
    recipe.check_model(config)
    return config


def _worker_arguments(scratch: Path, run: Run) -> list[str]:
    files = [f"{scratch}/recipe.json", "--indices", str(scratch), "--stop-file", f"{scratch}/stop"]
    return [*files, "--nodes", str(run.topology.nodes), "--started", str(run.started)]


def _logs(run: Run) -> Path:
    """The folder that the workers of this start log to."""
    return run.folder.logs / f"node{run.topology.node_rank}" / time.strftime("%Y%m%d-%H%M%S")


def _scan(recipe: Recipe, vocab_size: int, scratch: Path) -> tuple[Index, Index | None]:
    """The indices of the data and of what is held out, saved in `scratch`; DataError for what cannot be used."""
    from entrypoints.tokens.scan import scan

    index = scan(Path(recipe.data), recipe.seq_length, vocab_size, recipe.pack)
    index.save(scratch / "train.npz")
    print(f"train: {index.describe(recipe.seq_length)}", file=sys.stderr)
    if not recipe.eval_data:
        return index, None
    held_out = scan(Path(recipe.eval_data), recipe.seq_length, vocab_size, recipe.pack)
    held_out.save(scratch / "eval.npz")
    print(f"train: evaluation on {held_out.describe(recipe.seq_length)}", file=sys.stderr)
    if len(held_out) < recipe.global_batch_size:
        raise DataError(
            f"--eval-data {recipe.eval_data} fills {len(held_out)} sequences, and a global batch takes "
            f"{recipe.global_batch_size}; give more of it or lower --global-batch-size"
        )
    return index, held_out


def _work(run: Run, scratch: Path, stop: StopRequests, link: Link) -> Failure | None:
    """Run the workers of this command to their end; why they failed, if they did."""
    run.recipe.save(scratch / "recipe.json")
    if run.topology.world_size > 1:
        logs = _logs(run)
        logs.mkdir(parents=True, exist_ok=True)
        failure = torchrun.launch(run.topology, _worker_arguments(scratch, run), stop, logs, link)
        if failure and run.topology.rank == 0:
            _note(run.folder, "failed", failure.said or str(failure))
        return failure

    def work() -> None:
        from entrypoints.training import worker

        worker.run(run.recipe, scratch, stop.stop_file, 1, run.started)

    try:
        torchrun.run_here(run.topology, work, stop)
    except Stopped:
        raise
    except BaseException as error:
        _note(run.folder, "failed", f"{type(error).__name__}: {error}")
        if isinstance(error, torchrun.GraceIsOver):
            return Failure("rank 0", str(error), FAILED)
        raise
    return None


def _note(folder: RunFolder, state: str, why: str) -> None:
    """Say in the status why it ended. A full disk gets room for that from the checkpoint that did not fit."""
    with contextlib.suppress(OSError):
        folder.remove_incomplete()
    with contextlib.suppress(OSError):
        folder.write_status(folder.read_status() | {"state": state, "why": why})


def _check_paths(recipe: Recipe) -> int:
    """The model's vocabulary size; UsageError or DataError for paths that cannot be what they are given as."""
    model = Path(recipe.model)
    if not model.is_dir():
        raise UsageError(f"--model {model} does not exist; `slipway import` makes it from a Hugging Face model")
    if not (model / "weights" / "metadata.json").exists() or not (model / "context").is_dir():
        raise DataError(f"{model} is no NeMo checkpoint (weights/metadata.json and context/ are missing)")
    for name in ("data", "eval_data"):
        path = getattr(recipe, name)
        if path and not Path(path).is_file():
            raise UsageError(
                f"--{name.replace('_', '-')} {path} does not exist; `slipway preprocess` makes it from text"
            )
    return _vocab_size(model)


def _vocab_size(model: Path) -> int:
    for line in (model / "context" / "model.yaml").read_text().splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "vocab_size" and value.isdigit():
            return int(value)
    raise DataError(f"{model / 'context' / 'model.yaml'} has no vocab_size; import the model again")


def _begin(recipe: Recipe, folder: RunFolder, resume: str) -> int:
    """The step to go on from; UsageError where the folder belongs to another run."""
    latest = folder.latest_checkpoint()
    if latest is None:
        return 0
    if resume == "never":
        raise UsageError(f"{folder.path} holds a run at step {latest[0]}; choose another --out or --resume auto")
    changed = [
        f"--{name.replace('_', '-')} was {before} and is {now}"
        for name, now in vars(recipe).items()
        if name not in ("out", "save_every", "keep", "wandb_project", "eval_data", "eval_every", "eval_batches")
        and (before := vars(Recipe.load(folder.recipe))[name]) != now
    ]
    if changed:
        raise UsageError(f"{folder.path} holds another run: {'; '.join(changed)}; restore it or choose another --out")
    return latest[0]


def _make_folder(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):
            pass
    except OSError as error:
        raise WriteError(f"{folder.path} cannot be written: {error.strerror}; choose another --out") from None


def _claim_folder(run: Run) -> None:
    """Rank 0 says what is computed here from now on, and takes away what an earlier start left half done."""
    try:
        run.folder.remove_incomplete()
        run.recipe.save(run.folder.recipe)
        before = run.folder.read_status()
        known = {"loss": before["loss"]} if run.begins_at and "loss" in before else {}
        tokens = run.begins_at * run.recipe.global_batch_size * run.recipe.seq_length
        begun = {"state": "starting", "step": run.begins_at, "steps": run.recipe.steps, "tokens": tokens, "why": ""}
        run.folder.write_status(known | begun)
    except OSError as error:
        raise WriteError(f"{run.folder.path} cannot be written: {error.strerror}; make room in it") from None


def _result(run: Run, failure: Failure | None, grace_is_over: bool) -> Summary:
    """What the run came to; its errors are those of `train`."""
    status, latest = run.folder.read_status(), run.folder.latest_checkpoint()
    if not failure and status.get("state") == "done":
        return _summary(run, latest[1], status)
    saved = latest[0] if latest else 0
    if not failure and status.get("state") == "stopped":
        raise Stopped(f"train: stopped and saved at step {saved} of {run.recipe.steps}; run the same again")
    if grace_is_over and status.get("step", 0) == saved:
        raise Stopped(f"train: stopped at step {saved} of {run.recipe.steps}, nothing is lost; run the same again")
    if grace_is_over:
        raise SlipwayError(
            f"train: ended before a checkpoint could be saved; the last one is at step {saved}: allow more --grace"
        )
    if failure is None:
        raise SlipwayError(f"train: the workers ended without a result; {run.folder.status} says {status}")
    if failure.lines:
        print(f"train: last lines of {failure.who}:", *failure.lines, sep="\n", file=sys.stderr)
    raise _error(failure)


def _summary(run: Run, checkpoint: Path, status: dict[str, Any]) -> Summary:
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    details = {"steps": f"{run.begins_at}→{status['step']}", "loss": f"{status['loss']:.6f}"}
    return Summary("train", str(checkpoint), size, time.time() - run.started, details, streamed=False)


def _error(failure: Failure) -> SlipwayError:
    """What a worker said itself where it knew its error, else who failed and how."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, WriteError, PreflightError)}
    if failure.said and failure.code in kinds:
        return kinds[failure.code](f"{failure.said} ({failure.who})")
    return SlipwayError(f"train: {failure.said or failure}")
