"""What happens around each step: the record for people, stopping on request, the proof that the base is unchanged."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.lightning.ckpt_utils import ckpt_to_dir
from torch.distributed.checkpoint.api import CheckpointException

from slipway.checkpoint.nemo_context import HF_FILES, SOURCE_CONFIG
from slipway.training.recipe import Recipe
from slipway.training.run_folder import COMPLETE, RunFolder
from slipway.training.throughput import peak_tflops
from slipway.training.troubles import cannot_write

STEPS_DONE = "steps_done"  # the metric that names checkpoints
ZIP_WRITER = re.compile(r"inline_container|PytorchStreamWriter")  # in the RuntimeError of torch.save on a full disk


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any."""
    word = torch.tensor([int(flag)], device=torch.cuda.current_device())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    return bool(word.item())


class Record(Callback):
    """On rank 0: a line, an entry of the metrics and the status after each step, and the plot at the end."""

    def __init__(self, recipe: Recipe, folder: RunFolder, flops_per_token: float, started: float) -> None:
        """`started`: time.time() when the command began."""
        self.recipe, self.folder, self.flops_per_token, self.started = recipe, folder, flops_per_token, started
        self.status: dict[str, Any] = folder.read_status()  # the command has written its beginning
        self._clock, self._lr = time.monotonic(), 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.status |= {"state": "running", "started_at_step": trainer.global_step}
        if trainer.is_global_zero:
            self.folder.forget_from(trainer.global_step)
            self.folder.write_status(self.status)
        self._clock = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is the next one's
        # Not earlier: NeMo attaches adapters and freezes the base after on_train_start.
        if "trained_weights" in self.status or not trainer.is_global_zero:
            return
        every = [parameter.numel() for parameter in module.parameters()]
        trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
        self.status |= {"trained_weights": sum(trained), "weights": sum(every)}
        print(f"worker: {sum(trained):,} of {sum(every):,} weights on this rank are trained", flush=True)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # On every rank: the ranks must agree on the name of a checkpoint.
        module.log(STEPS_DONE, float(trainer.global_step))
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        tokens = self.recipe.global_batch_size * self.recipe.seq_length
        speed = self._speed(tokens / seconds, trainer.world_size)
        entry = {
            "step": trainer.global_step - 1,
            "loss": float(trainer.callback_metrics["reduced_train_loss"]),
            "lr": self._lr,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            **speed,
        }
        if "seconds_to_first_step" not in self.status:
            self.status["seconds_to_first_step"] = round(time.time() - self.started, 1)
            print(f"worker: first step done {self.status['seconds_to_first_step']} s after the start", flush=True)
        self.status |= {"step": trainer.global_step, "loss": entry["loss"], "tokens": trainer.global_step * tokens}
        self.folder.write_status(self.status)  # first: a reader of the metrics must find the step in the status
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        trainer.logger.log_metrics({f"speed/{name}": value for name, value in speed.items()}, trainer.global_step)
        print(step_line(entry, self.recipe.steps), flush=True)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._clock = time.monotonic()  # the evaluation does not count as a part of the next step
        if not trainer.is_global_zero or trainer.should_stop:
            return
        loss = float(trainer.callback_metrics["val_loss"])
        self.status["eval_loss"] = loss
        with self.folder.evaluations.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step - 1, "loss": loss}) + "\n")
        print(f"evaluation after step {trainer.global_step}: loss {loss:.6f}", flush=True)

    def _speed(self, tokens_per_second: float, ranks: int) -> dict[str, float]:
        """Tokens per second of all GPUs and of one, arithmetic in TFLOP/s, and the peak of rank 0's memory in GB."""
        per_gpu = tokens_per_second / ranks
        speed = {
            "tokens_per_second": round(tokens_per_second, 1),
            "tokens_per_second_per_gpu": round(per_gpu, 1),
            "tflops_per_gpu": round(per_gpu * self.flops_per_token / 1e12, 4),
        }
        if torch.cuda.is_available():
            peak = peak_tflops(torch.cuda.get_device_name())
            speed |= {"mfu": round(speed["tflops_per_gpu"] / peak, 4)} if peak else {}
            speed["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return speed

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        done = trainer.global_step >= self.recipe.steps
        self.status |= {"state": "done", "why": "all steps are done"} if done else {"state": "stopped"}
        self.folder.write_status(self.status)
        if trainer.global_step:
            plot_losses(self.folder)


def step_line(entry: dict[str, Any], steps: int) -> str:
    """The line that a person reads after a step."""
    line = f"step {entry['step'] + 1}/{steps} loss {entry['loss']:.6f} lr {entry['lr']:.3g}"
    line += f" {entry['tokens_per_second']:.0f} tokens/s {entry['tokens_per_second_per_gpu']:.0f}/GPU"
    line += f" {entry['tflops_per_gpu']:.3g} TFLOP/s/GPU"
    line += f" MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
    return line + (f" {entry['memory_gb']:.1f} GB" if "memory_gb" in entry else "")


class Checkpoints(nl.ModelCheckpoint):
    """NeMo's checkpoints, and in their context the files of the base that `export` needs.

    The last file written is the one that `RunFolder.latest_checkpoint` looks for. NeMo's own marker of an unfinished
    checkpoint does not serve: it is removed before the context is written.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        super().__init__(**options)
        self.recipe = recipe

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        try:
            super()._save_checkpoint(trainer, filepath)
            if trainer.is_global_zero:
                keep_source(Path(self.recipe.model) / "context", ckpt_to_dir(filepath) / "context")
        except (OSError, CheckpointException, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError like any other; only its text tells.
            if isinstance(error, RuntimeError) and not ZIP_WRITER.search(str(error)):
                raise
            raise cannot_write(str(ckpt_to_dir(filepath)), error, self.recipe) from None


def keep_source(base: Path, context: Path) -> None:
    """Copy the Hugging Face files from the base's context, if it has any, and mark the context as complete."""
    if (base / HF_FILES).is_dir():
        shutil.copytree(base / HF_FILES, context / HF_FILES, dirs_exist_ok=True)
    if (base / SOURCE_CONFIG).is_file():
        shutil.copyfile(base / SOURCE_CONFIG, context / SOURCE_CONFIG)
    (context / COMPLETE).touch()


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
        asked = self.stop_file.exists()
        if agree(asked):
            trainer.should_stop = True
            self.record.status["why"] = self.stop_file.read_text() if asked else "a request to stop on another node"

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        # Unless no step was done, or the last one was saved as usual.
        checkpoint = trainer.checkpoint_callback
        if trainer.global_step not in (self._first_step, checkpoint._last_global_step_saved):
            checkpoint._save_topk_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


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
    bytes, weighted by their place in an element.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if ".adapter." in name or not tensor.numel():
            continue
        words = tensor.detach().contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())
        weights = torch.arange(1, 1 + tensor.element_size(), device=tensor.device) * 257
        total = sum((chunk.long() * weights).sum() for chunk in words.split(1 << 24))
        digest.update(f"{name} {tuple(tensor.shape)} {int(total)}\n".encode())
    return digest.hexdigest()


def plot_losses(folder: RunFolder) -> None:
    """Write loss.png: the loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = folder.read_metrics()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([m["step"] + 1 for m in metrics], [m["loss"] for m in metrics], marker=".", label="training")
    if evaluations := folder.read_evaluations():
        axes.plot(
            [e["step"] + 1 for e in evaluations], [e["loss"] for e in evaluations], marker="o", label="evaluation"
        )
        axes.legend()
    axes.set(xlabel="step", ylabel="loss per token", title=f"{folder.path.name}: {Recipe.load(folder.recipe).mode}")
    axes.grid(alpha=0.3)
    figure.savefig(folder.plot, dpi=120)
    pyplot.close(figure)
