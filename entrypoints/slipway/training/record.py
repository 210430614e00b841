"""What a person sees of a run while it goes: a line for each step, metrics.jsonl, status.json and the plot."""

from __future__ import annotations

import gc
import json
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from slipway.report import human_seconds, say
from slipway.training.curve import plot_losses
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder, now
from slipway.training.samples import Samples, computed_positions
from slipway.training.steps import shares_of_positions
from slipway.training.throughput import Arithmetic, Load, load_of, peak_tflops

STEPS_DONE = "steps_done"  # the metric that names checkpoints
PLOT_SECONDS, PLOT_SHARE = 20.0, 0.02  # the plot is drawn again after so long, and takes at most this share of the time
NO_SPEED = ("step", "loss", "lr", "tokens", "positions", "seconds")
PADDED = 1.05  # positions for each token from which on it is said how many positions are computed
MEAN_OF = 20  # steps whose time says how long the rest takes


class Record(Callback):
    """On rank 0: a line, an entry of the metrics and the status after each step, and the plot now and then."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, arithmetic: Arithmetic, samples: Samples, started: float
    ) -> None:
        """`started`: time.time() when the command began."""
        self.recipe, self.folder, self.started = recipe, folder, started
        self.arithmetic, self.samples = arithmetic, samples
        self.status: dict[str, Any] = folder.read_status()  # the command has written its beginning
        self._clock, self._lr = time.monotonic(), 0.0
        self._seconds: list[float] = []  # of the last steps
        self._plotted, self._plot_took = time.monotonic(), 0.0

    def __getstate__(self) -> dict[str, Any]:
        """NeMo writes its callbacks into the context of every checkpoint, where the samples have no use."""
        return {**vars(self), "samples": None}

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
        say(f"worker: {sum(trained):,} of {sum(every):,} weights on this rank are trained")

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.status["started_at_step"] + 1:
            # Model and optimizer are whole, and stay. Looking for garbage among them holds up what starts the kernels.
            gc.collect()
            gc.freeze()
        # On every rank: the ranks must agree on the name of a checkpoint.
        module.log(STEPS_DONE, float(trainer.global_step))
        if not trainer.is_global_zero:
            return
        entry = self._entry(trainer)
        if "seconds_to_first_step" not in self.status:
            self.status["seconds_to_first_step"] = round(time.time() - self.started, 1)
            say(f"worker: first step done {self.status['seconds_to_first_step']} s after the start")
        left = self._seconds_left(trainer.global_step)
        tokens = self.status.get("tokens", 0) + entry["tokens"]
        self.status |= {"step": trainer.global_step, "loss": entry["loss"], "tokens": tokens}
        self.status |= {"seconds_left": round(left, 1), "updated": now()}
        self.folder.write_status(self.status)  # first: a reader of the metrics must find the step in the status
        with self.folder.metrics.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        speed = {name: value for name, value in entry.items() if name not in NO_SPEED}
        trainer.logger.log_metrics({f"speed/{name}": value for name, value in speed.items()}, trainer.global_step)
        say(step_line(entry, self.recipe.steps, left), living=True)
        self._plot_now_and_then()

    def _entry(self, trainer: Trainer) -> dict[str, Any]:
        """The step that was done, as metrics.jsonl has it."""
        moment = time.monotonic()
        seconds, self._clock = moment - self._clock, moment
        self._seconds = [*self._seconds[-MEAN_OF + 1 :], seconds]
        load = self._load(trainer.global_step - 1)
        norm = trainer.callback_metrics.get("grad_norm")  # Megatron skips a step whose gradients are no numbers
        return {
            "step": trainer.global_step - 1,
            "loss": float(trainer.callback_metrics["reduced_train_loss"]),
            "lr": self._lr,
            **({"grad_norm": round(float(norm), 6)} if norm is not None else {}),
            "tokens": load.tokens,
            "positions": load.positions,
            "seconds": round(seconds, 4),
            **self._speed(load, seconds, trainer.world_size),
        }

    def _load(self, step: int) -> Load:
        """What a step computes on all ranks, which depends on the order of the samples alone."""
        first, size = step * self.recipe.global_batch_size, self.recipe.global_batch_size
        lengths = [self.samples.positions(number) for number in range(first, first + size)]
        whole, ranks = self.recipe.seq_length, shares_of_positions()
        return load_of(
            lengths,
            self.recipe.micro_batch_size,
            lambda longest: whole if self.recipe.pack else computed_positions(longest, whole, ranks),
        )

    def _seconds_left(self, step: int) -> float:
        """The first step of a start is slower than all others: it does not count once there are others."""
        known = self._seconds[1:] if 1 < len(self._seconds) < MEAN_OF else self._seconds
        return (self.recipe.steps - step) * sum(known) / len(known)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._clock = time.monotonic()  # the evaluation does not count as a part of the next step
        if not trainer.is_global_zero or trainer.should_stop:
            return
        loss = float(trainer.callback_metrics["val_loss"])
        self.status["eval_loss"] = loss
        with self.folder.evaluations.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step - 1, "loss": loss}) + "\n")
        say(f"evaluation after step {trainer.global_step}: loss {loss:.6f}")

    def _speed(self, load: Load, seconds: float, ranks: int) -> dict[str, float]:
        """Tokens per second of all GPUs and of one, without padding and with it; arithmetic in TFLOP/s, without
        padding; and the peak of rank 0's memory in GB."""
        rate = load.tokens / seconds
        operations = self.arithmetic.per_token(self.recipe.mode, load.length)
        speed = {
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_gpu": round(rate / ranks, 1),
            "positions_per_second": round(load.positions / seconds, 1),
            "tflops_per_gpu": round(rate / ranks * operations / 1e12, 4),
        }
        if torch.cuda.is_available():
            peak = peak_tflops(torch.cuda.get_device_name())
            speed |= {"mfu": round(speed["tflops_per_gpu"] / peak, 4)} if peak else {}
            speed["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return speed

    def _plot_now_and_then(self) -> None:
        """Draw the plot where that takes only a small share of the run's time."""
        before = time.monotonic()
        if before - self._plotted < max(PLOT_SECONDS, self._plot_took / PLOT_SHARE):
            return
        plot_losses(self.folder)
        self._plotted = self._clock = time.monotonic()  # drawing does not count as a part of the next step
        self._plot_took = self._plotted - before

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        done = trainer.global_step >= self.recipe.steps
        self.status["state"] = "done" if done else "stopped"
        if done:
            self.status["why"] = self.folder.why_done(self.recipe, trainer.global_step)
        self.status |= {"seconds_left": 0 if done else self.status.get("seconds_left"), "updated": now()}
        self.folder.write_status(self.status)
        say("")
        if trainer.global_step:
            plot_losses(self.folder)


def _is_padded(entry: dict[str, Any]) -> bool:
    """So much of a step is padding that its speed is not the tokens' speed."""
    return entry["positions"] > PADDED * entry["tokens"]


def step_line(entry: dict[str, Any], steps: int, seconds_left: float) -> str:
    """The line that a person reads after a step; what matters most comes first, a narrow terminal cuts the rest off."""
    line = f"step {entry['step'] + 1}/{steps} loss {entry['loss']:.6f} lr {entry['lr']:.3g}"
    line += f" {entry['tokens_per_second']:.0f} tokens/s {human_seconds(seconds_left)} left"
    line += f", grad norm {entry['grad_norm']:.3g}" if "grad_norm" in entry else ""
    line += f", {entry['seconds']:.3g} s, {entry['tokens_per_second_per_gpu']:.0f} tokens/s/GPU"
    line += f" {entry['tflops_per_gpu']:.3g} TFLOP/s/GPU"
    line += f" ({entry['positions_per_second']:.0f} tokens/s with padding)" if _is_padded(entry) else ""
    line += f" MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
    return line + (f" {entry['memory_gb']:.1f} GB" if "memory_gb" in entry else "")
