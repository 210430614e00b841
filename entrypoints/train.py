"""`slipway train`: from a NeMo checkpoint and token data to trained heads."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from entrypoints.checkpoint import locate
from entrypoints.errors import DataError, PreflightError, SlipwayError, Stopped, UsageError, WriteError
from entrypoints.launch import torchrun
from entrypoints.launch.failure import FAILED, Failure
from entrypoints.launch.link import Link, meet
from entrypoints.launch.topology import Topology, find_topology
from entrypoints.report import Summary
from entrypoints.training.agreement import claims
from entrypoints.training.recipe import Recipe
from entrypoints.training.run_folder import RunFolder

if TYPE_CHECKING:
    from entrypoints.training.lines import Index


def train(
    *,
    model: str,
    data: str,
    out: str,
    mode: Literal["heads", "sft", "lora", "pretrain"] = "heads",
    steps: int = Recipe.steps,
    seq_length: int = Recipe.seq_length,
    micro_batch_size: int = Recipe.micro_batch_size,
    global_batch_size: int = Recipe.global_batch_size,
    lr: float = Recipe.lr,
    min_lr: float = Recipe.min_lr,
    warmup_steps: int = Recipe.warmup_steps,
    constant_steps: int = Recipe.constant_steps,
    tensor_parallel_size: int = Recipe.tensor_parallel_size,
    pipeline_parallel_size: int = Recipe.pipeline_parallel_size,
    expert_parallel_size: int = Recipe.expert_parallel_size,
    context_parallel_size: int = Recipe.context_parallel_size,
    save_every: int = Recipe.save_every,
    keep: int = Recipe.keep,
    seed: int = Recipe.seed,
    lora_rank: int = Recipe.lora_rank,
    lora_alpha: int = Recipe.lora_alpha,
    lora_dropout: float = Recipe.lora_dropout,
    lora_targets: str = Recipe.lora_targets,
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
        data: JSON lines of tokens, as `preprocess` writes them.
        out: folder of the run: checkpoints, status.json, metrics.jsonl, loss.png, TensorBoard.
        mode: what is trained; heads = temperature and top-p heads on a frozen base, sft = all weights on responses,
            lora = low-rank adapters on a frozen base, pretrain = all weights on all tokens.
        steps: optimiser steps in all.
        seq_length: tokens per sample; longer samples are dropped and counted.
        micro_batch_size: samples per rank and forward pass.
        global_batch_size: samples per step over all ranks.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup_steps: steps of linear warm-up.
        constant_steps: steps at min_lr at the end.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: stages the layers are split into.
        expert_parallel_size: ranks that share the experts.
        context_parallel_size: ranks that share each sequence.
        save_every: steps between checkpoints.
        keep: newest checkpoints that are kept.
        seed: of the first weights of what is attached, the order of the data and the dropped tokens.
        lora_rank: inner size of an adapter.
        lora_alpha: an adapter's output is multiplied by alpha / rank.
        lora_dropout: share of an adapter's inputs that are dropped.
        lora_targets: Megatron's modules that get an adapter, with commas between.
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
    topology = find_topology(nodes, node_rank, master_addr, master_port, nproc_per_node)
    model = str(locate.nemo_path(model))
    recipe = Recipe(**{name: value for name, value in locals().items() if name in Recipe.__dataclass_fields__})
    recipe.check(topology.world_size)
    vocab_size = _check_paths(recipe)
    folder = RunFolder(Path(out).absolute())
    recipe.model, recipe.data, recipe.out = (str(Path(path).absolute()) for path in (model, data, out))
    begins_at = _begin(recipe, folder, resume)
    if dry_run:
        return _plan(recipe, topology, folder)
    if begins_at >= recipe.steps:
        return _result(recipe, folder, None, False, begins_at, 0.0)

    from entrypoints.training.lines import index_lines

    index = index_lines(Path(recipe.data), recipe.seq_length, vocab_size)
    print(topology, file=sys.stderr)
    print(
        f"train: {len(index.offsets)} samples, {index.too_long} dropped for {recipe.seq_length} tokens or more",
        file=sys.stderr,
    )
    _make_folder(folder)
    link = meet(topology, claims(recipe, index, topology, begins_at), rendezvous_timeout)
    if topology.rank == 0:
        recipe.save(folder.recipe)
    with tempfile.TemporaryDirectory(prefix="slipway-train-") as scratch:
        failure = _work(recipe, topology, folder, index, Path(scratch), grace, started, link)
        stop_asked = (Path(scratch) / "stop").exists()
    link.close()
    return _result(recipe, folder, failure, stop_asked, begins_at, time.time() - started)


def _plan(recipe: Recipe, topology: Topology, folder: RunFolder) -> str:
    """What --dry-run prints."""
    words = torchrun.command(topology, _worker_arguments(Path("SCRATCH"), topology, 0.0), _logs(folder, topology))
    alone = "one process: the worker runs in this one, which does the same as\n" if topology.world_size == 1 else ""
    return f"{json.dumps(vars(recipe), indent=1)}\n{topology}\n{alone}{shlex.join(words)}"


def _worker_arguments(scratch: Path, topology: Topology, started: float) -> list[str]:
    files = [f"{scratch}/recipe.json", "--index", f"{scratch}/index.npy", "--stop-file", f"{scratch}/stop"]
    return [*files, "--nodes", str(topology.nodes), "--started", str(started)]


def _logs(folder: RunFolder, topology: Topology) -> Path:
    """The folder that the workers of this start log to."""
    return folder.logs / f"node{topology.node_rank}" / time.strftime("%Y%m%d-%H%M%S")


def _work(
    recipe: Recipe,
    topology: Topology,
    folder: RunFolder,
    index: Index,
    scratch: Path,
    grace: float,
    started: float,
    link: Link,
) -> Failure | None:
    """Run the workers of this command to their end; why they failed, if they did."""
    import numpy

    numpy.save(scratch / "index.npy", index.offsets)
    recipe.save(scratch / "recipe.json")
    if topology.world_size > 1:
        logs = _logs(folder, topology)
        logs.mkdir(parents=True, exist_ok=True)
        words = _worker_arguments(scratch, topology, started)
        return torchrun.launch(topology, words, scratch / "stop", grace, logs, link)

    def run() -> None:
        from entrypoints.training import worker

        worker.run(recipe, scratch / "index.npy", scratch / "stop", 1, started)

    try:
        torchrun.run_here(topology, run, scratch / "stop", grace)
    except torchrun.GraceIsOver as error:
        return Failure("rank 0", str(error), FAILED)
    return None


def _check_paths(recipe: Recipe) -> int:
    """The model's vocabulary size; UsageError or DataError for paths that cannot be what they are given as."""
    model = Path(recipe.model)
    if not model.is_dir():
        raise UsageError(f"--model {model} does not exist; `slipway import` makes it from a Hugging Face model")
    if not (model / "weights" / "metadata.json").exists() or not (model / "context").is_dir():
        raise DataError(f"{model} is no NeMo checkpoint (weights/metadata.json and context/ are missing)")
    if not Path(recipe.data).is_file():
        raise UsageError(f"--data {recipe.data} does not exist; `slipway preprocess` makes it from text")
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
        if name not in ("out", "save_every", "keep") and (before := vars(Recipe.load(folder.recipe))[name]) != now
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


def _result(
    recipe: Recipe, folder: RunFolder, failure: Failure | None, stop_asked: bool, begins_at: int, seconds: float
) -> Summary:
    status = folder.read_status()
    if not failure and status.get("state") == "done":
        size = sum(f.stat().st_size for f in folder.latest_checkpoint()[1].rglob("*") if f.is_file())
        details = {"steps": f"{begins_at}→{status['step']}", "loss": f"{status['loss']:.6f}"}
        return Summary("train", str(folder.latest_checkpoint()[1]), size, seconds, details, streamed=False)
    if not failure and status.get("state") == "stopped":
        raise Stopped(f"train: stopped and saved at step {status['step']} of {recipe.steps}; run the same again")
    if stop_asked:
        latest = folder.latest_checkpoint()
        raise SlipwayError(
            f"train: ended before a checkpoint could be saved; the last one is at step {latest[0] if latest else 0}: "
            "allow more --grace"
        )
    if failure is None:
        raise SlipwayError(f"train: the workers ended without a result; {folder.status} says {status}")
    if failure.lines:
        print(f"train: last lines of {failure.who}:", *failure.lines, sep="\n", file=sys.stderr)
    raise _error(failure)


def _error(failure: Failure) -> SlipwayError:
    """What a worker said itself where it knew its error, else who failed and how."""
    said = [line.removeprefix("slipway: ") for line in failure.lines if line.startswith("slipway: ")]
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, WriteError, PreflightError)}
    if said and failure.code in kinds:
        return kinds[failure.code](f"{said[-1]} ({failure.who})")
    return SlipwayError(f"train: {failure}")
