"""How fast a recipe trains on the machine at hand: `train` itself for a few steps, on random weights and tokens."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import locate
from slipway.checkpoint.hollow import write_hollow
from slipway.errors import UsageError
from slipway.families import read_config, understood
from slipway.launch.placement import Patience, Placement
from slipway.launch.topology import find_topology
from slipway.tokens.lines import as_line
from slipway.training import memory, recipes, start
from slipway.training.layout import SHARE
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

WORTH_COMPUTING_AGAIN = 0.7  # of the time that the GPU works: with every layer computed again it works a third more
WARM_UP = 2  # steps that do not count: kernels are compiled and chosen in them
PROFILE = "profile.json"  # profile.FILE, which needs torch
CHAT_MEAN, CHAT_SPREAD = 600, 1.0  # tokens of a chat, lognormal: its mean, and the deviation of its logarithm


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Args:
        config: config.json of the model.
        given: fields of Recipe.
        lengths: full = samples as long as a sequence, chat = as chats are.
    """

    name: str
    config: dict[str, Any]
    given: dict[str, Any]
    choice: recipes.Choice
    placement: Placement
    lengths: str
    steps: int


@dataclass
class Measured:
    """What `slipway bench` found; rates are medians over the steps after the warm-up."""

    name: str
    mode: str
    gpu: str
    gpus: int
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    seconds_per_step: float
    tflops_per_gpu: float
    seconds_to_first_step: float
    memory_gb: float
    estimated_gb: float
    reachable_tflops: float = 0.0
    busy: float = 0.0
    launches: int = 0
    kinds: dict[str, float] = field(default_factory=dict)
    largest: list[Any] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.name}, {self.mode}, on {self.gpus} × {self.gpu}",
            f"{self.tokens_per_second:,.0f} tokens/s, {self.tokens_per_second_per_gpu:,.0f} of each GPU; "
            f"{self.seconds_per_step:.3f} s a step, the first one {self.seconds_to_first_step:.0f} s after the start",
        ]
        if not self.reachable_tflops:
            return "\n".join(lines)
        lines += [
            f"{self.tflops_per_gpu:.0f} TFLOP/s of each GPU, {self.tflops_per_gpu / self.reachable_tflops:.0%} of the "
            f"{self.reachable_tflops:.0f} that a product of 8192 × 8192 matrices reaches here",
            f"memory {self.memory_gb:.1f} GB, estimated {self.estimated_gb:.1f} GB "
            f"({self.estimated_gb / self.memory_gb - 1:+.0%})",
            f"the GPU works {self.busy:.0%} of a step, {self.launches} kernels: "
            + ", ".join(f"{kind} {part:.0%}" for kind, part in self.kinds.items()),
            *(f"  {part:6.1%} {count:6d} × {name}" for name, part, count in self.largest),
        ]
        return "\n".join([*lines, *self.advice])


def run(wanted: Wanted) -> Measured:
    """Train for a few steps in a folder that is removed afterwards.

    Errors: those of `train`; UsageError for more than one node.
    """
    if (wanted.placement.nodes or find_topology(wanted.placement).nodes) > 1:
        raise UsageError("bench measures one machine; leave out --nodes")
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        model, data, out = (Path(scratch) / name for name in ("model", "data.jsonl", "out"))
        write_hollow(model, wanted.config)
        steps = wanted.steps + WARM_UP + 1  # the last one is profiled
        paths = {"model": str(model), "data": str(data), "out": str(out), "steps": steps, "keep": 1}
        request = start.Request(
            given={**wanted.given, **paths, "warmup_steps": 0, "constant_steps": 0},
            choice=wanted.choice,
            placement=wanted.placement,
            patience=Patience(),
            resume="never",
            measured=True,
        )
        # Twice: the recipe says how long samples are, and needs data to be checked.
        data.write_bytes(as_line([1, 2], [3]))
        settled = start.settled(request)
        recipe, topology = settled.recipe, settled.topology
        write_samples(data, recipe, wanted.config["vocab_size"], wanted.lengths)
        start.run(request)
        return _found(wanted, recipe, topology.world_size, RunFolder.of(recipe))


def write_samples(data: Path, recipe: Recipe, vocabulary: int, lengths: str) -> None:
    """Random samples for one global batch and more, as `preprocess` would write them."""
    random = np.random.default_rng(0)
    full = recipe.seq_length - 1  # samples of as many tokens or more are dropped
    if lengths == "full":
        sizes = np.full(max(64, recipe.global_batch_size), full)
    else:
        sizes = chat_lengths(recipe.global_batch_size * max(1, full // CHAT_MEAN if recipe.pack else 1) * 8, full, 0)
    with data.open("wb") as file:
        for size in sizes:
            ids = random.integers(0, vocabulary, size).tolist()
            prompt = 1 if lengths == "full" else max(1, size // 4)
            file.write(as_line(ids[:prompt], ids[prompt:]))


def chat_lengths(count: int, longest: int, seed: int) -> np.ndarray:
    """Lengths as chats have them, in tokens: int [count], 16 to `longest`."""
    drawn = np.random.default_rng(seed).lognormal(math.log(CHAT_MEAN) - CHAT_SPREAD**2 / 2, CHAT_SPREAD, count)
    return np.clip(drawn, 16, longest).astype(int)


def _found(wanted: Wanted, recipe: Recipe, world_size: int, folder: RunFolder) -> Measured:
    steps = folder.read_metrics()[WARM_UP:-1]
    profile = folder.path / PROFILE
    about = json.loads(profile.read_text()) if profile.is_file() else {}
    peak = about.pop("peak", 0)
    estimated = memory.estimate(recipe, wanted.config, world_size).total / 1e9
    seconds = statistics.median(step["seconds"] for step in steps)
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    found = Measured(
        name=wanted.name,
        mode=recipe.mode,
        gpu=about.pop("gpu", "CPU"),
        gpus=world_size,
        tokens_per_second=rate,
        tokens_per_second_per_gpu=rate / world_size,
        seconds_per_step=seconds,
        tflops_per_gpu=statistics.median(step["tflops_per_gpu"] for step in steps),
        seconds_to_first_step=folder.read_status().get("seconds_to_first_step", 0.0),
        memory_gb=round(peak / 1e9, 2),
        estimated_gb=round(estimated, 2),
        **about,
    )
    found.advice = advice(found, recipe, wanted.config)
    return found


def advice(found: Measured, recipe: Recipe, config: Mapping[str, Any]) -> list[str]:
    """What to change for more tokens per second, in whole sentences."""
    if not found.reachable_tflops:
        return []
    said = []
    limit = SHARE * recipes.gpu_memory()

    def takes(**changes: Any) -> float:
        """GB of the fullest GPU with other values."""
        return memory.estimate(Recipe(**{**vars(recipe), **changes}), config, found.gpus).total / 1e9

    size = recipe.micro_batch_size
    micro_batches = recipe.global_batch_size // size * recipe.context_parallel_size
    waits = f"The GPU waits {1 - found.busy:.0%} of the time for the host"
    if found.busy < 0.9 and micro_batches % 2 == 0 and (larger := takes(micro_batch_size=2 * size)) < limit:
        said.append(f"{waits}: --micro-batch-size {2 * size} gives it more at once, and takes about {larger:.0f} GB.")
    elif (
        found.busy < WORTH_COMPUTING_AGAIN
        and micro_batches % 4 == 0
        and recipe.recompute == "none"
        and (larger := takes(micro_batch_size=4 * size, recompute="full")) < limit
    ):
        said.append(
            f"{waits}: --micro-batch-size {4 * size} --recompute full gives it more at once, although every layer is "
            f"computed again, and takes about {larger:.0f} GB."
        )
    if recipe.recompute == "full" and (plain := takes(recompute="none")) < limit:
        said.append(f"--recompute none takes about {plain:.0f} GB, which fits, and a quarter less time.")
    return said


def config_for(recipe: str, file: str | None, layers: int | None) -> tuple[str, dict[str, Any]]:
    """(name, config.json) of the model that is measured.

    Args:
        recipe: a shipped one, whose model is taken unless a file is given.
        file: config.json of a model as every command takes it, or None.
        layers: how many layers the model is cut to; None = all.
    """
    if path := locate.config_file(file):
        name, (_, config) = path.parent.name or path.name, understood(read_config(path), path)
    elif recipe in recipes.names() and not recipes.has_shape(recipe):
        raise UsageError(f"bench: the recipe {recipe} does not say the shape of its model; give --config")
    elif recipe in recipes.names():
        name, config = recipe, recipes.config_of(recipe)
    else:
        raise UsageError(
            f"bench needs a model: name a shipped recipe ({', '.join(recipes.names())}), or give its config.json with "
            "--config"
        )
    if layers is None:
        return name, dict(config)
    if layers > config["num_hidden_layers"]:
        raise UsageError(f"--layers is {layers}, and the model has {config['num_hidden_layers']}")
    cut = {**config, "num_hidden_layers": layers}
    if "layer_types" in cut:
        cut["layer_types"] = cut["layer_types"][:layers]
    return f"{name} with {layers} layers", cut
