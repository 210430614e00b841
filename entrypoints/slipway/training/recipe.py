"""Everything that decides what a training run computes, in one object that is written beside its results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError, UsageError
from slipway.options import LARGEST, check_group, option
from slipway.tokens.blend import parts_of
from slipway.training.weights import experts_of
from slipway.untrusted import read_object, replace_file

MODES = ("heads", "lora", "sft", "pretrain")
FP8_MULTIPLE = 16  # of the sides of matrices whose product is in FP8


def _size(default: int, help: str, unit: str = "", low: int = 1) -> Any:
    return option(default, help, unit=unit, low=low, high=LARGEST)


@dataclass
class Recipe:
    """Every value that decides what is computed; the defaults are those the heads were published with.

    This is the one declaration of each: the flags of `train`, its help, the keys of a recipe's file and of --set, their
    ranges and the table in docs/training.md are made from it.
    """

    model: str = option(..., "NeMo checkpoint of the base model, as `import` writes it: a folder or nemo://name")
    data: str = option(
        ...,
        "tokens as `preprocess` writes them: samples in a .jsonl file, or texts in a .bin with its .idx; several files "
        "as PATH:WEIGHT,PATH:WEIGHT",
    )
    out: str = option(..., "folder of the run: checkpoints, status.json, metrics.jsonl, loss.png, TensorBoard")
    mode: str = option(
        "heads",
        "what is trained; heads = temperature and top-p heads on a frozen base, lora = low-rank adapters on a frozen "
        "base, sft = all weights on responses, pretrain = all weights on all tokens",
        choices=MODES,
    )
    steps: int = _size(400, "optimizer steps in total")
    seq_length: int = _size(6144, "length of a sequence; longer samples are dropped and counted", "tokens", low=2)
    micro_batch_size: int = _size(1, "samples per GPU and forward pass")
    global_batch_size: int = _size(32, "samples per step over all GPUs")
    lr: float = option(5e-6, "peak learning rate", above=0, high=10)
    min_lr: float = option(2e-8, "learning rate at the end of the cosine", low=0, high=10)
    warmup_steps: int = _size(20, "steps of linear warm-up", low=0)
    constant_steps: int = _size(50, "steps at min_lr at the end", low=0)
    weight_decay: float = option(0.0, "weight decay of Adam", low=0, high=1)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 = no limit", low=0, high=LARGEST)
    tensor_parallel_size: int = _size(1, "GPUs that share each layer")
    pipeline_parallel_size: int = _size(1, "stages that the layers are split into")
    expert_parallel_size: int = _size(1, "GPUs that share the experts")
    context_parallel_size: int = _size(1, "GPUs that share each sequence")
    first_stage_layers: int = _size(0, "layers of the first pipeline stage; 0 = as many as the others", low=0)
    last_stage_layers: int = _size(0, "layers of the last pipeline stage; 0 = as many as the others", low=0)
    recompute: str = option(
        "none",
        "full = keep only the input of each layer and compute the rest again in the backward pass",
        choices=("none", "full"),
    )
    cuda_graphs: bool = option(
        True,
        "record the kernels of the layers once and start them as one, up to the experts where GPUs share these, where "
        "nothing else of a model is shared and all micro batches are alike; takes a little more memory",
    )
    precision: str = option(
        "bf16",
        "of the factors of large products; fp8 = FP8 with a scale for each tensor, on GPUs from Hopper (H100) on",
        choices=("bf16", "fp8"),
    )
    base_precision: str = option(
        "bf16",
        "of the frozen base of --mode lora; nf4 = four bits for a weight and a scale for each 64 (QLoRA), in all "
        "matrices of the layers but the routers'",
        choices=("bf16", "nf4"),
    )
    save_every: int = _size(100, "steps between checkpoints")
    keep: int = _size(2, "number of checkpoints to keep, the newest ones")
    seed: int = option(1234, "seed of the new weights, the order of the data and dropout", low=0, high=2**32 - 1)
    lora_targets: str = option(
        "all-linear",
        "modules that get an adapter, separated by commas; names of Megatron (linear_qkv) or Hugging Face (q_proj)",
    )
    lora_rank: int = option(32, "rank of an adapter", low=1, high=65536)
    lora_alpha: float = option(
        0.0,
        "the output of an adapter is multiplied by lora_alpha / lora_rank",
        low=0,
        high=LARGEST,
        otherwise="lora_rank",
    )
    lora_dropout: float = option(0.0, "share of an adapter's inputs that are dropped", low=0, below=1)
    dora: bool = option(False, "adapters of DoRA, which also learn the size of each row of a weight")
    rslora: bool = option(
        False, "rank-stabilised: the output of an adapter is multiplied by lora_alpha / √lora_rank, as in peft"
    )
    adapter: str = option(
        "",
        "NeMo checkpoint of adapters to continue from, see `import --adapter`; gives rank, alpha and targets",
    )
    pack: bool | None = option(
        None,
        "put several samples of a .jsonl file into one sequence if they fit; none of them sees another",
        otherwise="true for sft and lora where the model and the layout allow it",
    )
    eval_data: str = option("", "tokens that are held out, for evaluations during the training")
    eval_every: int = _size(100, "steps between evaluations")
    eval_batches: int = _size(32, "largest number of global batches of an evaluation")
    wandb_project: str = option(
        "", "log to this project of Weights & Biases too, with WANDB_API_KEY from the environment"
    )

    @property
    def is_frozen(self) -> bool:
        """The base stays as it is."""
        return self.mode in ("heads", "lora")

    @property
    def adapts_feed_forward(self) -> bool:
        """Adapters are on the feed-forward layers: on the experts where there are any."""
        return "linear_fc" in self.lora_targets or self.lora_targets == "all-linear"

    def learning_rate(self, step: int) -> float:
        """That of a step, which is counted from 0: a linear warm-up, half a cosine, and constant steps at the end.

        The first step trains with lr / warmup_steps, the step warmup_steps - 1 with lr.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        falling = self.steps - self.warmup_steps - self.constant_steps
        done = min(1.0, (step - self.warmup_steps + 1) / (falling + 1))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2

    def check(self, world_size: int, recipe: str = "") -> None:
        """UsageError unless the sizes fit each other and a world of `world_size` processes.

        Args:
            recipe: the name of the one that the sizes are from, for the message.
        """
        check_group(self)
        self._check_schedule()
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
                f"{self.micro_batch_size} × {world_size // model_parallel} data-parallel ranks = {at_once}; change "
                "--global-batch-size, --micro-batch-size or the number of GPUs"
            )

        self._check_positions()
        self._check_base_precision()
        if self.precision == "fp8" and (problem := self.unfit_for_fp8(None)):
            raise UsageError(f"--precision fp8 {problem}; use bf16")
        if self.pack and (problem := self.unpackable_data()):
            raise UsageError(f"--pack {problem}")

    def _check_positions(self) -> None:
        """UsageError unless the positions of a sequence can be shared by the ranks that share them."""
        shares = self.tensor_parallel_size * self.shares_of_samples
        if self.seq_length % shares:
            raise UsageError(
                f"--seq-length {self.seq_length} is not a multiple of {shares}, the equal parts that "
                f"--tensor-parallel-size {self.tensor_parallel_size} and --context-parallel-size "
                f"{self.context_parallel_size} share a sequence in; change one of them"
            )

    def unfit_for_fp8(self, c: Mapping[str, Any] | None) -> str:
        """Why nothing can be multiplied in FP8, as a part of a sentence; "" where it can.

        Args:
            c: config.json of the model, if it is known.
        """
        if self.base_precision != "bf16":
            return f"does not go with --base-precision {self.base_precision}, which is unpacked to BF16"
        ranks = self.tensor_parallel_size * self.context_parallel_size
        if self.seq_length * self.micro_batch_size % (FP8_MULTIPLE * ranks):
            return (
                f"takes micro batches of a multiple of {FP8_MULTIPLE * ranks} tokens, not {self.micro_batch_size} × "
                f"--seq-length {self.seq_length}"
            )
        sizes = {key: c[key] for key in ("hidden_size", "intermediate_size", "moe_intermediate_size") if c and key in c}
        odd = [f"{key} {size}" for key, size in sizes.items() if size % (FP8_MULTIPLE * self.tensor_parallel_size)]
        return f"takes matrices whose sides are multiples of {FP8_MULTIPLE}, not {odd[0]}" if odd else ""

    def _check_base_precision(self) -> None:
        """UsageError where a base in NF4 would be trained, or cannot be what it is needed for."""
        if self.base_precision == "bf16":
            return
        given = f"--base-precision {self.base_precision}"
        if self.mode != "lora":
            raise UsageError(f"{given} is for adapters on a frozen base: use --mode lora, or --base-precision bf16")
        if self.dora:
            raise UsageError(f"{given} keeps no matrix whose rows --dora could measure: leave out one of them")

    def _check_schedule(self) -> None:
        """UsageError where warm-up and constant steps take more than there is, or the curve would rise."""
        taken = self.warmup_steps + self.constant_steps
        if taken > self.steps:
            raise UsageError(
                f"--warmup-steps {self.warmup_steps} and --constant-steps {self.constant_steps} are {taken} steps, "
                f"more than --steps {self.steps}; lower them or increase --steps"
            )
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr is {self.min_lr:g}, larger than --lr {self.lr:g}; lower --min-lr")

    def unpackable_data(self) -> str:
        """Why the samples of the data cannot be packed; "" where they can."""
        for path in (part.path for data in (self.data, self.eval_data) if data for part in parts_of(data)):
            if path.suffix == ".bin":
                return f"is for samples of .jsonl files, and {path} has full sequences already"
        return ""

    @property
    def shares_of_samples(self) -> int:
        """How many equal parts a packed sample is shared in: a light and a heavy one for each context parallel rank."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    def unpackable_model(self, c: Mapping[str, Any]) -> str:
        """Why samples cannot be packed for the model with this config.json; "" where they can."""
        if self.mode in ("sft", "pretrain") and c.get("num_nextn_predict_layers"):
            return (
                f"cannot be used with --mode {self.mode} and the model's MTP layer, which would predict one sample's "
                "tokens from another's"
            )
        return ""

    def should_pack(self, c: Mapping[str, Any] | None) -> tuple[bool, str]:
        """(whether samples are packed where nobody said so, why they are not where one would expect it).

        Args:
            c: config.json of the model, if it is known.
        """
        if self.mode not in ("sft", "lora") or self.unpackable_data():
            return False, ""
        problem = self.unpackable_model(c) if c else "needs to know the model's config.json: give --config"
        return not problem, problem

    def _check_shared_heads(self, groups: int) -> None:
        """UsageError where context parallel ranks cannot share the heads of attention with sinks, see sinks.py."""
        if not self.pack:
            raise UsageError(
                f"attention with sinks takes --context-parallel-size {self.context_parallel_size} for packed samples "
                "only: use --pack, or --context-parallel-size 1"
            )
        if groups % (ranks := self.tensor_parallel_size * self.context_parallel_size):
            raise UsageError(
                f"the ranks of --tensor-parallel-size {self.tensor_parallel_size} and --context-parallel-size "
                f"{self.context_parallel_size} share the heads of attention with sinks, and {ranks} does not divide "
                f"the model's {groups} groups of keys and values; change one of them"
            )

    def check_model(self, c: Mapping[str, Any]) -> None:
        """UsageError unless the parallel sizes divide what they share of the model with this config.json."""
        self.stages(c["num_hidden_layers"])
        experts = experts_of(c)
        shared = [
            ("tensor", "attention heads", c["num_attention_heads"]),
            ("tensor", "groups of keys and values", c["num_key_value_heads"]),
            ("tensor", "tokens of the vocabulary", c["vocab_size"]),
            *(("tensor", "values in a feed-forward layer", width) for width in _shared_widths(c, experts)),
            ("expert", "experts", experts),
        ]
        if self.mode == "lora":  # the ranks share both matrices of an adapter
            shared += [("tensor", "hidden values, which adapters share", c["hidden_size"])]
            if self.lora_rank % self.tensor_parallel_size:
                raise UsageError(
                    f"--lora-rank {self.lora_rank} is not a multiple of --tensor-parallel-size "
                    f"{self.tensor_parallel_size}, whose ranks share an adapter; change one of them"
                )
        for kind, what, count in shared:
            if count % (size := getattr(self, f"{kind}_parallel_size")):
                raise UsageError(f"--{kind}-parallel-size {size} does not divide the model's {count} {what}; change it")
        if c["model_type"] == "gpt_oss" and self.context_parallel_size > 1:
            self._check_shared_heads(c["num_key_value_heads"])
        if self.mode == "lora" and self.dora and self.tensor_parallel_size > 1:
            raise UsageError("--dora takes --tensor-parallel-size 1: NeMo saves its sizes in the order of the ranks")
        if experts and self.mode == "lora" and self.dora and "linear_fc" in self.lora_targets:
            raise UsageError(
                "--dora cannot be on experts, for which NeMo has no such adapters: choose --lora-targets among "
                "the modules of attention"
            )
        if experts and self.mode == "lora" and self.tensor_parallel_size > 1 and self.adapts_feed_forward:
            raise UsageError(
                "adapters on experts cannot be shared by tensor parallel ranks, each of which sees other tokens: use "
                "--tensor-parallel-size 1 with --expert-parallel-size, or choose --lora-targets among the modules of "
                "attention, such as linear_proj"
            )
        if self.precision == "fp8" and (problem := self.unfit_for_fp8(c)):
            raise UsageError(f"--precision fp8 {problem}; use bf16")
        if self.pack and (problem := self.unpackable_model(c)):
            raise UsageError(f"--pack {problem}")
        if self.expert_parallel_size > 1 and not experts:
            raise UsageError(f"--expert-parallel-size is {self.expert_parallel_size}, and the model has no experts")

    def stages(self, layers: int) -> list[int]:
        """Number of layers of each pipeline stage; UsageError where they cannot be split so."""
        count, first, last = self.pipeline_parallel_size, self.first_stage_layers, self.last_stage_layers
        if count == 1 and (first or last):
            raise UsageError(
                "--first-stage-layers and --last-stage-layers are for --pipeline-parallel-size 2 or more; leave them "
                "out"
            )
        others = count - bool(first) - bool(last)
        rest = layers - first - last
        if rest < others or (rest % others if others else rest):
            own = "".join(
                f", of which the {name} has {size}" for name, size in (("first", first), ("last", last)) if size
            )
            raise UsageError(
                f"--pipeline-parallel-size {count} does not divide the model's {layers} layers: {count} stages{own} "
                f"leave {rest} for {others} others, which must have equally many and at least one"
            )
        each = rest // others if others else 0
        return [each] if count == 1 else [first or each, *[each] * (count - 2), last or each]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        replace_file(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read what `save` wrote; DataError for a file that it did not write."""
        values = read_object(path, 1 << 20, "restore it or choose another --out")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := next((name for name in values if name not in known), ""):
            raise DataError(f"{path}: there is no {unknown!r} in a recipe; restore the file or choose another --out")
        try:
            return cls(**values)
        except TypeError:
            raise DataError(f"{path} is not a whole recipe; restore it or choose another --out") from None


def _shared_widths(c: Mapping[str, Any], experts: int) -> list[int]:
    """The widths of feed-forward layers that tensor parallel ranks share: dense layers and shared experts.

    Args:
        experts: number of the routed experts, each of which is whole on its rank.
    """
    dense = [c["intermediate_size"]] if not experts or c.get("first_k_dense_replace") else []
    shared = [c["moe_intermediate_size"] * c["n_shared_experts"]] if c.get("n_shared_experts") else []
    return dense + shared
