"""Everything that decides what a training run computes, in one object that is written beside its results."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from entrypoints.errors import UsageError


@dataclass
class Recipe:
    """The defaults are those the heads were published with; sizes are in samples and tokens."""

    model: str  # NeMo checkpoint of the base
    data: str  # JSON lines of tokens
    out: str  # where checkpoints, status, metrics and the plot go
    mode: str = "heads"  # heads, sft, lora or pretrain
    steps: int = 400
    seq_length: int = 6144
    micro_batch_size: int = 1
    global_batch_size: int = 32
    lr: float = 5e-6
    min_lr: float = 2e-8
    warmup_steps: int = 20
    constant_steps: int = 50
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    context_parallel_size: int = 1
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept
    seed: int = 1234
    lora_targets: str = "linear_qkv,linear_proj,linear_fc1,linear_fc2"  # Megatron's modules that get an adapter
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_dropout: float = 0.0

    @property
    def is_frozen(self) -> bool:
        """The base stays as it is."""
        return self.mode in ("heads", "lora")

    def check(self, world_size: int) -> None:
        """UsageError unless the sizes fit each other and a world of `world_size` processes."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.name.endswith("size") or field.name in ("steps", "seq_length", "save_every", "keep")
            if counts and value < 1:
                raise UsageError(f"--{field.name.replace('_', '-')} is {value}; it must be at least 1")
        model_parallel = self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size
        if world_size % model_parallel:
            raise UsageError(
                f"{world_size} processes cannot be split into tensor {self.tensor_parallel_size} × pipeline "
                f"{self.pipeline_parallel_size} × context {self.context_parallel_size} = {model_parallel}; "
                "change the parallel sizes or the number of nodes"
            )
        at_once = self.micro_batch_size * (world_size // model_parallel)
        if self.global_batch_size % at_once:
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of micro batch size "
                f"{self.micro_batch_size} × {world_size // model_parallel} data-parallel ranks = {at_once}"
            )

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))
