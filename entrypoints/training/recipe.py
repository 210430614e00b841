"""Everything that decides what a training run computes, in one object that is written beside its results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoints.errors import UsageError

COUNTS = ("steps", "seq_length", "save_every", "keep", "eval_every", "eval_batches")


@dataclass
class Recipe:
    """The defaults are those the heads were published with; sizes are in samples and tokens."""

    model: str  # NeMo checkpoint of the base
    data: str  # tokens: JSON lines of samples, or .bin with .idx beside it
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
    first_stage_layers: int = 0  # of the first pipeline stage and the last one; 0: as many as the others
    last_stage_layers: int = 0
    recompute: str = "none"  # or full: keep a layer's input alone and compute the rest again for its backward pass
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept
    seed: int = 1234
    lora_targets: str = "linear_qkv,linear_proj,linear_fc1,linear_fc2"  # Megatron's modules that get an adapter
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    pack: bool = False  # several samples in a sequence where they fit, each attending to itself alone
    eval_data: str = ""  # tokens to evaluate on
    eval_every: int = 100  # steps between evaluations
    eval_batches: int = 32  # global batches of an evaluation, at most
    wandb_project: str = ""  # log to this project of Weights & Biases too

    @property
    def is_frozen(self) -> bool:
        """The base stays as it is."""
        return self.mode in ("heads", "lora")

    def check(self, world_size: int, recipe: str = "") -> None:
        """UsageError unless the sizes fit each other and a world of `world_size` processes.

        Args:
            recipe: the name of the one that the sizes are from, for the message.
        """
        if self.recompute not in ("none", "full"):
            raise UsageError(f"recompute is {self.recompute!r}; it is none or full")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.name.endswith("size") or field.name in COUNTS
            if counts and value < 1:
                raise UsageError(f"--{field.name.replace('_', '-')} is {value}; it must be at least 1")
        model_parallel = self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size
        if world_size % model_parallel:
            raise UsageError(
                f"{world_size} processes cannot be split into tensor {self.tensor_parallel_size} × pipeline "
                f"{self.pipeline_parallel_size} × context {self.context_parallel_size} = {model_parallel}; "
                + (f"see --dry-run for the nodes that recipe {recipe} is for" if recipe else "")
                + ("" if recipe else "change the parallel sizes or the number of nodes")
            )
        experts_among = world_size // self.pipeline_parallel_size
        if experts_among % self.expert_parallel_size:
            raise UsageError(
                f"--expert-parallel-size {self.expert_parallel_size} does not divide the {experts_among} processes "
                "of a pipeline stage; change it or the number of nodes"
            )
        at_once = self.micro_batch_size * (world_size // model_parallel)
        if self.global_batch_size % at_once:
            raise UsageError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of micro batch size "
                f"{self.micro_batch_size} × {world_size // model_parallel} data-parallel ranks = {at_once}"
            )

        self._check_packing()

    def _check_packing(self) -> None:
        if not self.pack:
            return
        for path in filter(None, (self.data, self.eval_data)):
            if path.endswith(".bin"):
                raise UsageError(f"--pack is for samples of .jsonl files, and {path} has full sequences already")
        for name in ("micro_batch_size", "context_parallel_size"):
            if (value := getattr(self, name)) > 1:
                raise UsageError(
                    f"--pack puts many samples into one sequence, which takes --{name.replace('_', '-')} 1, not {value}"
                )

    def check_model(self, c: Mapping[str, Any]) -> None:
        """UsageError unless the parallel sizes divide what they share of the model with this config.json."""
        layers, first, last = c["num_hidden_layers"], self.first_stage_layers, self.last_stage_layers
        experts = next((c[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in c), 0)
        others = self.pipeline_parallel_size - 2 if first or last else self.pipeline_parallel_size
        shared = [
            ("tensor", self.tensor_parallel_size, "attention heads", c["num_attention_heads"]),
            ("tensor", self.tensor_parallel_size, "groups of keys and values", c["num_key_value_heads"]),
            ("expert", self.expert_parallel_size, "experts", experts),
            ("pipeline", max(others, 1), "layers of its stages", layers - first - last),
        ]
        for kind, size, what, count in shared:
            if count % size:
                raise UsageError(
                    f"--{kind}-parallel-size {getattr(self, f'{kind}_parallel_size')} does not divide the model's "
                    f"{count} {what}; change it"
                )
        if experts and self.mode == "lora" and self.tensor_parallel_size > 1 and "linear_fc" in self.lora_targets:
            raise UsageError(
                "adapters on experts cannot be shared by tensor parallel ranks, each of which sees other tokens: use "
                "--tensor-parallel-size 1 with --expert-parallel-size, or --lora-targets linear_qkv,linear_proj"
            )
        if self.pack and c["model_type"] == "gpt_oss":
            raise UsageError(
                "--pack cannot be used with gpt_oss: Transformer Engine has no attention with sinks for packed samples"
            )
        if self.pack and self.mode in ("sft", "pretrain") and c.get("num_nextn_predict_layers"):
            raise UsageError(
                f"--pack cannot be used with --mode {self.mode} and the model's MTP layer, which would predict one "
                "sample's tokens from another's"
            )
        if self.expert_parallel_size > 1 and not experts:
            raise UsageError(f"--expert-parallel-size is {self.expert_parallel_size}, and the model has no experts")

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))
