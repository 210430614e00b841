"""What is checked before a run starts: paths, the model's sizes, the run's folder, the data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import handover, locate
from slipway.checkpoint.lora import BASE_NOTE, Adapters, has_adapters, noted_base
from slipway.checkpoint.nemo_context import SOURCE_CONFIG, has_tokenizer
from slipway.checkpoint.torch_dist import Reader
from slipway.errors import DataError, PreflightError, UsageError, WriteError
from slipway.families import read_config, understood
from slipway.launch.topology import gpus_here
from slipway.options import flag
from slipway.tokens.blend import parts_of
from slipway.tokens.scan import Index, check_beginning, scan
from slipway.tokens.tokenise import MOST_LOST
from slipway.training import weights
from slipway.training.agreement import DIGESTS, NONE, changed
from slipway.training.recipe import Recipe
from slipway.training.recipes import asked_of_gpus
from slipway.training.run_folder import RunFolder
from slipway.untrusted import read_object, read_text, tell, without_credentials

NOTE_BYTES = 1 << 20
FP8_SINCE = 9.0  # compute capability: Hopper
LARGEST_ON_CPU = 3e8  # weights: a step of more takes minutes in float32
OF_ADAPTERS = ("lora_targets", "lora_rank", "lora_alpha", "lora_dropout", "dora", "rslora", "adapter")
OF_EVALUATIONS = ("eval_every", "eval_batches")
# What may change between two starts of one run, beside its own path: it is said.
AROUND = ("save_every", "keep", "wandb_project", *OF_EVALUATIONS)
FOR_SPEED = ("micro_batch_size", "recompute", "cuda_graphs")
SCHEDULE = ("steps", "warmup_steps", "constant_steps")  # these too, where the run is made longer


def check_checkpoint(model: Path) -> None:
    """UsageError or DataError unless this is a NeMo checkpoint."""
    if not model.is_dir():
        wrong = "is a file, and a folder is expected" if model.exists() else "does not exist"
        raise UsageError(f"--model {model} {wrong}; `slipway import` makes it from a Hugging Face model")
    if not (model / "weights" / "metadata.json").exists() or not (model / "context").is_dir():
        raise DataError(
            f"{model} is no NeMo checkpoint (weights/metadata.json and context/ are missing); `slipway import` makes "
            "it from a Hugging Face model"
        )
    if (note := model / "weights" / BASE_NOTE).is_file():
        raise UsageError(
            f"--model {model} holds only what was trained on a base: give the base, {noted_base(note)}, and with "
            "--mode lora the adapters to go on with as --adapter"
        )


def check_out(out: str, model: Path) -> None:
    """UsageError for a folder of a run that is none, or that is the model's own, which is to stay as it is."""
    folder, base = Path(out).resolve(), model.resolve()
    if out.startswith((locate.HUB, locate.NEMO)):
        raise UsageError(f"--out {out} is the name of a model, and a run is in a folder; give its path")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {out} is a file, and a folder is expected; choose another --out")
    own = {base / "weights", base / "context"} & {folder, *folder.parents}
    if own or folder == base:  # beside these, a folder of the model's may hold runs
        how = "lies in" if own else "is"
        raise UsageError(f"--out {out} {how} --model {model}, which stays as it is; choose another --out")


def check_base(recipe: Recipe) -> None:
    """DataError unless the base and its adapters may be handed to NeMo, which would say so after a minute."""
    handover.check(Path(recipe.model))
    if recipe.adapter:
        handover.check_weights(Path(recipe.adapter))


def check_data(data: str, eval_data: str) -> None:
    """UsageError for data that is not a file, DataError for one that is empty or does not begin as tokens do."""
    if eval_data and len(parts_of(eval_data, "--eval-data")) > 1:
        raise UsageError(f"--eval-data {eval_data} names several files; evaluate on one")
    for name, paths in (("--data", data), ("--eval-data", eval_data)):
        for part in parts_of(paths, name) if paths else ():
            if not part.path.is_file():
                wrong = "is a folder, and a file is expected" if part.path.is_dir() else "does not exist"
                raise UsageError(f"{name} {part.path} {wrong}; `slipway preprocess` makes it from text")
            if not part.path.stat().st_size:
                raise DataError(f"{name} {part.path} is empty; `slipway preprocess` makes it from text")
            check_beginning(part.path)


def check_idle(chosen: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """UsageError for a flag that would do nothing; to say that there is none of something is no such flag.

    Args:
        chosen: what flags and --set gave. A recipe may say how to evaluate where nobody gives data for it.
        values: all fields of Recipe that are not at their defaults.
    """
    mode = values.get("mode", Recipe.mode)
    for name in OF_ADAPTERS if mode != "lora" else ():
        if values.get(name):
            raise UsageError(f"{flag(name)} is for --mode lora, and --mode is {mode}; leave it out")
    for name in OF_EVALUATIONS if not values.get("eval_data") else ():
        if chosen.get(name):
            raise UsageError(f"{flag(name)} is for --eval-data, which is not given; leave it out")


def check_logging(recipe: Recipe) -> None:
    """UsageError where Weights & Biases would write a password into its logs, or ask for a key that is not there."""
    if not recipe.wandb_project:
        return
    address = os.environ.get("WANDB_BASE_URL", "")
    if without_credentials(address) != address:
        raise UsageError(
            "WANDB_BASE_URL has a user or a password, which the client of Weights & Biases writes into its logs; leave "
            "them out and set WANDB_API_KEY"
        )
    if os.environ.get("WANDB_API_KEY"):
        return
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not (netrc.is_file() and "wandb" in netrc.read_text(errors="replace")):
        raise UsageError(
            "--wandb-project is given, but there is no key: set WANDB_API_KEY, or WANDB_MODE=offline to keep the log "
            "in OUT"
        )


def check_adapter(adapter: Path, model: Path) -> None:
    """UsageError where there are no adapters, DataError where they do not fit the base to train them on."""
    reader = Reader(adapter)
    if not has_adapters(reader):
        raise UsageError(f"--adapter {adapter} has no low-rank adapters; give a checkpoint of a run of --mode lora")
    Adapters(reader, Reader(model).tensors, model)


def without_tokenizer(model: Path) -> list[str]:
    """What to say where a checkpoint has no tokenizer: training needs none, but what is exported later has none."""
    if has_tokenizer(model):
        return []
    return [f"{model} has no tokenizer, so an export of this run will have none; import the model again to have it"]


def vocab_size(model: Path) -> int:
    """The vocabulary of a NeMo checkpoint's model, from its model.yaml."""
    for line in read_text(model / "context" / "model.yaml", 16 << 20).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "vocab_size" and value.isdecimal() and len(value) < 12:
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
    parameters = weights.parts_of(config).total
    if parameters > LARGEST_ON_CPU and not gpus_here():
        raise PreflightError(
            f"this machine shows no GPU, and the model has {parameters / 1e9:.1f} billion weights, too many for the "
            "CPU; start on a machine with GPUs: docker run --gpus all, srun --gpus-per-node, Kubernetes nvidia.com/gpu"
        )


def check_context(recipe: Recipe) -> None:
    """PreflightError where GPUs are to share sequences, and there is none: plain attention knows no other ranks."""
    if recipe.context_parallel_size > 1 and not gpus_here():
        raise PreflightError(
            f"--context-parallel-size {recipe.context_parallel_size} needs GPUs, and this machine shows none; use 1"
        )


def check_precision(recipe: Recipe) -> None:
    """PreflightError where a GPU here cannot multiply FP8, or there is none."""
    if recipe.precision == "fp8" and (problem := without_fp8()):
        raise PreflightError(f"--precision fp8 {problem}; use bf16")


def without_fp8() -> str:
    """Why nothing can be multiplied in FP8 here; "" where it can."""
    if not gpus_here():
        return "needs GPUs from Hopper (H100) on, and this machine shows none"
    oldest = min(map(float, asked_of_gpus("compute_cap")), default=FP8_SINCE)
    return f"needs GPUs of compute capability {FP8_SINCE}, and there is one of {oldest}" if oldest < FP8_SINCE else ""


def check_continued(recipe: Recipe, folder: RunFolder, step: int, resume: str) -> list[str]:
    """What to say of a run that goes on from this step; UsageError where the folder belongs to another run."""
    if not step:
        return []
    if resume == "never":
        raise UsageError(f"{folder.path} holds a run at step {step}; choose another --out or --resume auto")
    before = Recipe.load(folder.recipe)
    longer = before.steps != recipe.steps
    moved = _moved(before, recipe, folder)
    may_change = ("out", *moved, *(SCHEDULE if longer else ()))
    changed = {
        name: f"{flag(name)} was {_shown(vars(before)[name])} and is {_shown(now)}"
        for name, now in vars(recipe).items()
        if name not in may_change and vars(before)[name] != now
    }
    if others := [said for name, said in changed.items() if name not in (*AROUND, *FOR_SPEED)]:
        raise UsageError(f"{folder.path} holds another run: {'; '.join(others)}; restore it or choose another --out")
    if longer and recipe.steps < step:
        raise UsageError(f"{folder.path} holds a run at step {step}, more than --steps {recipe.steps}; raise --steps")
    if step == recipe.steps:  # nothing is computed any more
        return [f"--steps was {before.steps} and is {step}, which is done: the run ends there"] if longer else []
    notes = [*moved.values()]
    for name, said in changed.items():
        notes.append(f"{said}: from step {step} on{' time and memory are others' if name in FOR_SPEED else ''}")
    if longer:
        notes.append(
            f"--steps was {before.steps} and is {recipe.steps}: from step {step} on the learning rate is that of a run "
            f"of {recipe.steps} steps"
        )
    return notes


def _shown(value: Any) -> Any:
    return NONE if value == "" else value


def _moved(before: Recipe, now: Recipe, folder: RunFolder) -> dict[str, str]:
    """Fields of a recipe that are other paths than before, and whose content is compared later → what to say of it."""
    noted = read_object(folder.inputs, NOTE_BYTES) if folder.inputs.is_file() else {}
    found = {}
    for name, digest in DIGESTS.items():
        old, new = getattr(before, name), getattr(now, name)
        if old == new or (name == "data" and _shares(old) != _shares(new)):
            continue
        if name == "eval_data" and not (old and new):
            found[name] = f"{flag(name)} was {old or NONE} and is {new or NONE}: the steps are the same"
        elif old and new and digest in noted:
            found[name] = f"{flag(name)} was {old} and is {new}: its content must be the same, and is compared"
    return found


def _shares(data: str) -> list[float]:
    return [part.share for part in parts_of(data)]


def has_moved(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether inputs of a run have other paths than it has noted, so that their content is to be compared."""
    return bool(_moved(Recipe.load(folder.recipe), recipe, folder))


def check_inputs(folder: RunFolder, begins_at: int, now: dict[str, str]) -> None:
    """UsageError where a run goes on with other data, another model or tokenizer than it began with.

    Args:
        now: the claims of this start (agreement.py).
    """
    if not begins_at or not folder.inputs.is_file():
        return
    if differences := changed(read_object(folder.inputs, NOTE_BYTES), now):
        raise UsageError(
            f"{folder.path} holds a run on other inputs: {'; '.join(differences)}; restore them or choose another --out"
        )


@dataclass(frozen=True)
class Scanned:
    """The indices of the files of data, and of what is held out."""

    parts: list[Index]
    held_out: Index | None

    def save(self, folder: Path) -> None:
        """Write them for the workers, who find them by `index_file`."""
        for number, index in enumerate(self.parts):
            index.save(index_file(folder, "train", number))
        if self.held_out is not None:
            self.held_out.save(index_file(folder, "eval", 0))

    def epochs(self, recipe: Recipe) -> str:
        """How often a run reads the data, in words."""
        count = recipe.steps * recipe.global_batch_size
        said = f"{recipe.steps} steps of {recipe.global_batch_size} sequences"
        if len(self.parts) == 1:
            return f"{said} are {count / len(self.parts[0]):.3g} epochs"
        parts = zip(parts_of(recipe.data), self.parts, strict=True)
        return f"{said} are " + ", ".join(
            f"{count * part.share / len(index):.3g} epochs of {part.path.name} ({part.share:.1%})"
            for part, index in parts
        )


def index_file(folder: Path, purpose: str, number: int) -> Path:
    """The index of file `number` of the data; `purpose` is train or eval."""
    return folder / f"{purpose}{number or ''}.npz"


def scan_data(data: str, eval_data: str, seq_length: int, vocab_size: int, pack: bool, multiple: int = 1) -> Scanned:
    """Check every token, and say what there is; DataError for what cannot be used. The last two are as in `scan`."""
    found = []
    for part in parts_of(data):
        index = scan(part.path, seq_length, vocab_size, pack, multiple)
        tell(f"train: {part.path.name}: {index.describe(seq_length)}")
        _check_lost(part.path, index, seq_length)
        found.append(index)
    if not eval_data:
        return Scanned(found, None)
    held_out = scan(Path(eval_data), seq_length, vocab_size, pack, multiple)
    tell(f"train: evaluation on {Path(eval_data).name}: {held_out.describe(seq_length)}")
    _check_lost(Path(eval_data), held_out, seq_length)
    return Scanned(found, held_out)


def _check_lost(path: Path, index: Index, seq_length: int) -> None:
    """DataError where so much is too long that the data would not be what it was."""
    share = index.lost / (index.lost + int(index.lengths.sum(dtype="int64")))
    if share > MOST_LOST:
        raise DataError(
            f"{path}: {index.too_long} samples have {seq_length} tokens or more: {share:.0%} of all tokens would be "
            f"lost, more than {MOST_LOST:.0%}; use a larger --seq-length, or make the data with "
            f"`slipway preprocess --seq-length {seq_length}` and --long cut or drop"
        )


def check_held_out(recipe: Recipe, scanned: Scanned) -> None:
    """DataError where what is held out does not fill a global batch."""
    if scanned.held_out is not None and len(scanned.held_out) < recipe.global_batch_size:
        raise DataError(
            f"--eval-data {recipe.eval_data} fills {len(scanned.held_out)} sequences, and a global batch takes "
            f"{recipe.global_batch_size}; give more of it or lower --global-batch-size"
        )


def make_folder(folder: RunFolder) -> None:
    """Make the folder of a run; WriteError where it, or what an earlier start has made in it, cannot be written to."""
    place = folder.path
    try:
        place.mkdir(parents=True, exist_ok=True)
        for place in (folder.path, folder.checkpoints, folder.logs):
            if place.exists():
                with tempfile.TemporaryFile(dir=place):
                    pass
    except OSError as error:
        raise WriteError(f"{place} cannot be written: {error.strerror}; choose another --out") from None
