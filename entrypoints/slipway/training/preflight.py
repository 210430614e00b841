"""What is checked before a run starts: paths, the model's sizes, the run's folder, the data."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint.nemo_context import SOURCE_CONFIG
from slipway.errors import DataError, PreflightError, UsageError, WriteError
from slipway.families import read_config, understood
from slipway.launch.topology import gpus_here
from slipway.options import flag
from slipway.tokens.scan import Index, scan
from slipway.training import memory
from slipway.training.agreement import changed
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

LARGEST_ON_CPU = 3e8  # weights: a step of more takes minutes in float32
# What may change between two starts of one run.
MAY_CHANGE = ("out", "save_every", "keep", "wandb_project", "eval_data", "eval_every", "eval_batches")


def check_checkpoint(model: Path) -> None:
    """UsageError or DataError unless this is a NeMo checkpoint."""
    if not model.is_dir():
        raise UsageError(f"--model {model} does not exist; `slipway import` makes it from a Hugging Face model")
    if not (model / "weights" / "metadata.json").exists() or not (model / "context").is_dir():
        raise DataError(f"{model} is no NeMo checkpoint (weights/metadata.json and context/ are missing)")


def check_data(recipe: Recipe) -> None:
    """UsageError for a file of data that is not there."""
    for name in ("data", "eval_data"):
        path = getattr(recipe, name)
        if path and not Path(path).is_file():
            raise UsageError(f"{flag(name)} {path} does not exist; `slipway preprocess` makes it from text")


def vocab_size(model: Path) -> int:
    """The vocabulary of a NeMo checkpoint's model, from its model.yaml."""
    for line in (model / "context" / "model.yaml").read_text().splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "vocab_size" and value.isdigit():
            return int(value)
    raise DataError(f"{model / 'context' / 'model.yaml'} has no vocab_size; import the model again")


def model_of(checkpoint: Path) -> tuple[str, dict[str, Any]] | None:
    """(family, config.json in its canonical form) of a NeMo checkpoint; None where it has no such file."""
    path = checkpoint / "context" / SOURCE_CONFIG
    if not path.is_file():
        return None
    family, config = understood(read_config(path), path)
    return family.NAME, config


def check_gpus(config: Mapping[str, Any]) -> None:
    """PreflightError where there is no GPU and the model is too large for the CPU."""
    parameters = memory.parts_of(config).total
    if parameters > LARGEST_ON_CPU and not gpus_here():
        raise PreflightError(
            f"this machine shows no GPU, and the model has {parameters / 1e9:.1f} billion weights, too many for the "
            "CPU; start on a machine with GPUs: docker run --gpus all, srun --gpus-per-node, Kubernetes nvidia.com/gpu"
        )


def first_step(recipe: Recipe, folder: RunFolder, resume: str) -> int:
    """The step to go on from; UsageError where the folder belongs to another run."""
    latest = folder.latest_checkpoint()
    if latest is None:
        return 0
    if resume == "never":
        raise UsageError(f"{folder.path} holds a run at step {latest[0]}; choose another --out or --resume auto")
    changed = [
        f"{flag(name)} was {before} and is {now}"
        for name, now in vars(recipe).items()
        if name not in MAY_CHANGE and (before := vars(Recipe.load(folder.recipe))[name]) != now
    ]
    if changed:
        raise UsageError(f"{folder.path} holds another run: {'; '.join(changed)}; restore it or choose another --out")
    return latest[0]


def check_inputs(folder: RunFolder, begins_at: int, now: dict[str, str]) -> None:
    """UsageError where a run goes on with other data, another model or tokenizer than it began with.

    Args:
        now: the claims of this start (agreement.py).
    """
    if not begins_at or not folder.inputs.is_file():
        return
    if differences := changed(json.loads(folder.inputs.read_text()), now):
        raise UsageError(
            f"{folder.path} holds a run on other inputs: {'; '.join(differences)}; restore them or choose another --out"
        )


def scan_data(recipe: Recipe, vocab_size: int, scratch: Path) -> tuple[Index, Index | None]:
    """The indices of the data and of what is held out, saved in `scratch`; DataError for what cannot be used."""
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


def make_folder(folder: RunFolder) -> None:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):
            pass
    except OSError as error:
        raise WriteError(f"{folder.path} cannot be written: {error.strerror}; choose another --out") from None
