"""`slipway train`: from a NeMo checkpoint and token data to trained heads."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from entrypoints.checkpoint import locate
from entrypoints.errors import DataError, SlipwayError, Stopped, UsageError, WriteError
from entrypoints.launch import torchrun
from entrypoints.launch.topology import find_topology
from entrypoints.report import Summary
from entrypoints.training.recipe import Recipe
from entrypoints.training.run_folder import RunFolder


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
    dry_run: bool = False,
) -> Summary | str:
    """Train with NeMo under torchrun, on one node or many.

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
        master_port: port on node 0 (29500).
        nproc_per_node: processes per node; without it, one per GPU.
        resume: auto = go on from the newest checkpoint in OUT; never = refuse if there is one.
        grace: seconds to save in after a request to stop.
        dry_run: print the recipe, the topology and the torchrun command, and do nothing.
    """
    topology = find_topology(nodes, node_rank, master_addr, master_port, nproc_per_node)
    model = str(locate.nemo_path(model))
    recipe = Recipe(**{name: value for name, value in locals().items() if name in Recipe.__dataclass_fields__})
    recipe.check(topology.world_size)
    vocab_size = _check_paths(recipe)
    folder = RunFolder(Path(out).absolute())
    recipe.model, recipe.data, recipe.out = (str(Path(path).absolute()) for path in (model, data, out))
    begins_at = _begin(recipe, folder, resume)
    worker = [str(folder.recipe), "--index", "INDEX", "--stop-file", "STOP", "--nodes", str(topology.nodes)]
    if dry_run:
        shown = json.dumps(vars(recipe), indent=1)
        return f"{shown}\n{topology}\n{shlex.join(torchrun.command(topology, worker))}"
    if begins_at >= recipe.steps:
        return _result(recipe, folder, 0, False, begins_at, 0.0)

    from entrypoints.training.lines import index_lines

    index = index_lines(Path(recipe.data), recipe.seq_length, vocab_size)
    print(topology, file=sys.stderr)
    print(
        f"train: {len(index.offsets)} samples, {index.too_long} dropped for {recipe.seq_length} tokens or more",
        file=sys.stderr,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slipway-train-") as scratch:
        import numpy

        worker[2], worker[4] = f"{scratch}/index.npy", f"{scratch}/stop"
        numpy.save(worker[2], index.offsets)
        _write_recipe(recipe, folder, topology.node_rank)
        code = torchrun.launch(topology, worker, Path(worker[4]), grace)
        stop_asked = Path(worker[4]).exists()
    return _result(recipe, folder, code, stop_asked, begins_at, time.monotonic() - started)


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


def _write_recipe(recipe: Recipe, folder: RunFolder, node_rank: int) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if node_rank == 0:
            folder.remove_incomplete()
        recipe.save(folder.recipe)
    except OSError as error:
        raise WriteError(f"{folder.path} cannot be written: {error.strerror}; choose another --out") from None


def _result(recipe: Recipe, folder: RunFolder, code: int, stop_asked: bool, begins_at: int, seconds: float) -> Summary:
    status = folder.read_status()
    if code == 0 and status.get("state") == "done":
        size = sum(f.stat().st_size for f in folder.latest_checkpoint()[1].rglob("*") if f.is_file())
        details = {"steps": f"{begins_at}→{status['step']}", "loss": f"{status['loss']:.6f}"}
        return Summary("train", str(folder.latest_checkpoint()[1]), size, seconds, details, streamed=False)
    if code == 0 and status.get("state") == "stopped":
        raise Stopped(f"train: stopped and saved at step {status['step']} of {recipe.steps}; run the same again")
    if stop_asked:
        latest = folder.latest_checkpoint()
        raise SlipwayError(
            f"train: ended before a checkpoint could be saved; the last one is at step {latest[0] if latest else 0}: "
            "allow more --grace"
        )
    raise SlipwayError(f"train: the workers failed (torchrun exit code {code}); their last lines stand above")
