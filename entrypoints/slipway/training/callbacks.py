"""What happens around the steps: checkpoints, a stop on request, and the proof that a base is as it was."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state, tensor_parallel
from nemo.lightning.ckpt_utils import ckpt_to_dir
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import functional

from slipway.checkpoint.nemo_context import HF_FILES, SOURCE_CONFIG
from slipway.checkpoint.source import NAME
from slipway.errors import DataError, SlipwayError
from slipway.families import read_config
from slipway.garbage import uncollected
from slipway.training.checkpoint_times import say_saved
from slipway.training.patches import LIGHTNING, NEMO, replace
from slipway.training.recipe import Recipe
from slipway.training.record import Record
from slipway.training.run_folder import RunFolder
from slipway.training.troubles import cannot_write
from slipway.training.whole import seal

ZIP_WRITER = re.compile(r"inline_container|PytorchStreamWriter")  # in the RuntimeError of torch.save on a full disk


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any."""
    word = torch.tensor([int(flag)], device=torch.cuda.current_device())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    return bool(word.item())


class Checkpoints(nl.ModelCheckpoint):
    """NeMo's checkpoints, and in their context the files of the base that `export` needs.

    The last file written is the mark that `RunFolder.latest_checkpoint` looks for. NeMo's own marker of an unfinished
    checkpoint does not serve: it is removed before the context is written.

    Older checkpoints are removed here. NeMo would remove only those whose paths it has noted, which are others once the
    folder has moved, and none any more once `keep` was lowered.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = recipe

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        begun = time.monotonic()
        try:
            with uncollected():
                super()._save_checkpoint(trainer, filepath)
            if trainer.is_global_zero:
                keep_source(self.recipe, ckpt_to_dir(filepath) / "context")
                size = seal(ckpt_to_dir(filepath))
                say_saved(ckpt_to_dir(filepath), size, time.monotonic() - begun)
                RunFolder.of(self.recipe).remove_older(self.recipe.keep)
        except (OSError, CheckpointException, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError like any other; only its text tells.
            if isinstance(error, RuntimeError) and not ZIP_WRITER.search(str(error)):
                raise
            raise cannot_write(str(ckpt_to_dir(filepath)), error, self.recipe) from None


def keep_source(recipe: Recipe, context: Path) -> None:
    """Copy the Hugging Face files from the base's context, if it has any; weights that were trained have its name no
    more, by which peft would load the base of later adapters."""
    base = Path(recipe.model) / "context"
    if (base / HF_FILES).is_dir():
        shutil.copytree(base / HF_FILES, context / HF_FILES, dirs_exist_ok=True)
    if (base / SOURCE_CONFIG).is_file():
        config = read_config(base / SOURCE_CONFIG)
        known = config if recipe.is_frozen else {key: value for key, value in config.items() if key != NAME}
        (context / SOURCE_CONFIG).write_text(json.dumps(known, indent=2) + "\n")


class StopOnRequest(Callback):
    """Saves and stops after the step in which the stop file appears on any node; before the first step only stops."""

    def __init__(self, stop_file: Path, record: Record) -> None:
        self.stop_file, self.record = stop_file, record
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._stop_if_asked(trainer)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._stop_if_asked(trainer)
        if trainer.should_stop:
            raise StopIteration  # Lightning's evaluation loop has no other way to be ended

    def _stop_if_asked(self, trainer: Trainer) -> None:
        # All ranks must stop at the same step: one that went on would wait for the others for ever.
        if agree(self.stop_file.exists()):
            trainer.should_stop = True
            # It may have come after this rank's look, and before that of another rank of this node.
            here = self.stop_file.exists()
            self.record.status["why"] = self.stop_file.read_text() if here else "a request to stop on another node"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        # Unless no step was done, or the last one was saved as usual.
        checkpoint = trainer.checkpoint_callback
        if trainer.global_step not in (self._first_step, checkpoint._last_global_step_saved):
            checkpoint._save_topk_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


class Evaluations(Callback):
    """Lets a run that goes on evaluate whenever one does that nobody stopped.

    That is first of all at its step, where it was stopped or killed in that evaluation: Lightning would begin with it
    even where it was done, and NeMo leaves it out even where it was not. And after the last step, which Lightning does
    not take for the last where a run goes on.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if agree(trainer.is_global_zero and self.folder.misses_evaluation(self.recipe, trainer.global_step)):
            loop = trainer.fit_loop.epoch_loop
            replace(loop, "skip_val_on_restart", False, NEMO)
            loop.val_loop.restarting = False  # with the first batch, whatever the checkpoint has of an earlier one

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.recipe.steps:
            replace(trainer.fit_loop.epoch_loop.batch_progress, "is_last_batch", True, LIGHTNING)


class OwnDraws(Callback):
    """Gives every step random numbers of its own, so that a run that goes on drops what it would have dropped.

    NeMo seeds once, at each start. The ranks that share a layer draw the same, as Megatron has it; stages of a pipeline
    and ranks with other samples draw others.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        key = hashlib.sha256(f"{self.seed} {trainer.global_step} {stage} {rank}".encode()).digest()
        seed = int.from_bytes(key[:7], "little")
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


class Finite(Callback):
    """Ends a run whose numbers are no numbers any more, with the tensor that shows it first."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._is_looked_at = False

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # Not earlier: NeMo loads the model after on_train_start.
        if not self._is_looked_at:
            self._is_looked_at = True
            self._end_if(
                first_not_finite(module),
                lambda name: DataError(
                    f"{self.recipe.model}: {name} has values that are no numbers (NaN or infinite) before the first "
                    "step; import the model again"
                ),
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # All ranks know the same loss, so that all of them come here or none.
        if torch.isfinite(trainer.callback_metrics["reduced_train_loss"]):
            return
        step, loss = trainer.global_step, float(trainer.callback_metrics["reduced_train_loss"])
        cure = f"lower --lr, which is {self.recipe.lr:g}, or --clip-grad, and start again in another --out"
        found = self._end_if(
            first_not_finite(module),
            lambda name: SlipwayError(
                f"the loss of step {step} is {loss}, and {name} has values that are no numbers; {cure}"
            ),
        )
        if not found:
            raise SlipwayError(f"the loss of step {step} is {loss}, and every weight is still a number; {cure}")

    def _end_if(self, name: str, error: Callable[[str], SlipwayError]) -> bool:
        """Raise the error on a rank that has such a tensor. True on the others if there is one: they are ended then."""
        found = agree(bool(name))
        if name:
            raise error(name)
        return found


def first_not_finite(module: torch.nn.Module) -> str:
    """The name of the first weight of this rank with a value that is NaN or infinite; "" where there is none."""
    sums = [_values(parameter).sum(dtype=torch.float32) for parameter in module.parameters()]
    if not sums or torch.isfinite(torch.stack(sums)).all():  # asked of the GPU once, not for each of 12,000 experts
        return ""
    wrong = (name for name, parameter in module.named_parameters() if not torch.isfinite(_values(parameter)).all())
    return next(wrong, "").replace("module.", "")


def _values(parameter: torch.nn.Parameter) -> Tensor:
    """The weight; in NF4 the scales of its blocks, where a number that is none makes one too."""
    packed = getattr(parameter, "packed_in", None)
    return packed.scales_of(parameter) if packed else parameter.detach()


class FrozenBase(Callback):
    """Compares every bit of the base before the first and after the last step."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._before = ""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # Not earlier: NeMo loads, transforms and wraps the model after on_train_start.
        self._before = self._before or checksum(module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._before:
            return  # stopped before the first step
        after = checksum(module)
        self.record.status["base_checksum"] = after
        self.record.status["base_changed"] = agree(after != self._before)


def checksum(module: torch.nn.Module) -> str:
    """SHA-256 over all tensors of this rank except the trained ones.

    Copying a model from the GPU would take minutes. So each tensor is reduced there to one integer, the sum of its
    bytes read as integers of 64 bits: it changes with every bit.
    """
    digest, sums = hashlib.sha256(), []
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if ".adapter." in name or tensor.is_meta or not tensor.numel():
            continue  # a matrix in NF4 is a buffer, and its parameter has no memory
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        stored = getattr(tensor, "_data", tensor).detach()  # in FP8, Transformer Engine's bytes
        sums.append(_sum_of_bits(stored.contiguous().view(-1).view(torch.uint8)))
    if sums:  # from the GPU at once
        digest.update(torch.stack([one.to(sums[0].device) for one in sums]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sum_of_bits(stored: Tensor) -> Tensor:
    """The sum of the bytes, read as integers of 64 bits, modulo 2⁶⁴."""
    if stored.storage_offset() % 8:  # a part of a larger tensor, which torch does not read so
        stored = stored.clone()
    whole = stored.numel() // 8 * 8
    total = stored[:whole].view(torch.int64).sum()
    if whole == stored.numel():
        return total
    return total + functional.pad(stored[whole:], (0, whole + 8 - stored.numel())).view(torch.int64).sum()
