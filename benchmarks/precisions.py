"""Losses of the same run in several precisions, on a small Llama that was trained first.

python -m benchmarks.precisions [--steps 200] [--runs "lora bf16" "lora nf4"]

Tokens are a random walk over 512 words, each with four that can follow it. All weights are trained on one walk in BF16,
then adapters on another one, of which half is new: in BF16, on a base in NF4, and with products in FP8, which needs a
GPU. Heads are trained on the same walk as the adapters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from slipway.tokens.lines import as_line

from benchmarks.common import slipway

WORDS, FOLLOWERS = 512, 4
LENGTH = 256
CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
RUNS = {
    "lora bf16": (),
    "lora nf4": ("--base-precision", "nf4"),
    "lora fp8": ("--precision", "fp8"),
    "heads bf16": (),
    "heads fp8": ("--precision", "fp8"),
}
WITHIN = 0.01  # of the loss in BF16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the training of all weights, and of each other run")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slipway-bench-") as scratch:
        losses = measure(Path(scratch), options.steps, options.runs)
    show(losses, options.steps)


def measure(folder: Path, steps: int, runs: list[str]) -> dict[str, list[float]]:
    """Loss of every step: of the base's training, and of each run after it."""
    write_model(folder / "hf")
    slipway("import", folder / "hf", folder / "random")
    first, other = (np.random.default_rng(seed).integers(0, WORDS, (WORDS, FOLLOWERS)) for seed in (1, 2))
    half = FOLLOWERS // 2
    for name, followers in (("first", first), ("second", np.hstack([first[:, :half], other[:, half:]]))):
        (folder / f"{name}.jsonl").write_bytes(b"".join(walk(followers, samples=8 * steps)))
    base = train(folder, "base", folder / "random", "first", steps, "--mode", "sft")
    found = {"base": base}
    for name in runs:
        mode = name.partition(" ")[0]
        out = name.replace(" ", "-")
        found[name] = train(folder, out, folder / "base", "second", steps, "--mode", mode, *RUNS[name])
    return found


def write_model(folder: Path) -> None:
    """A Llama with random weights, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16().save_pretrained(folder)


def walk(followers: np.ndarray, samples: int) -> Iterator[bytes]:
    """Samples as `preprocess` writes them; [WORDS, FOLLOWERS] says which words can follow each."""
    random = np.random.default_rng(3)
    words = random.integers(0, WORDS, samples)
    steps = [words := followers[words, random.integers(0, FOLLOWERS, samples)] for _ in range(LENGTH - 1)]
    for sample in np.stack(steps, axis=1).tolist():
        yield as_line(sample[:1], sample[1:])


def train(folder: Path, name: str, model: Path, data: str, steps: int, *flags: str) -> list[float]:
    slipway(
        *("train", "--model", model, "--data", folder / f"{data}.jsonl", "--out", folder / name, "--steps", steps),
        *("--seq-length", LENGTH, "--global-batch-size", 8, "--micro-batch-size", 4, "--lr", "1e-3"),
        *("--warmup-steps", 10, "--constant-steps", 0, *flags),
    )
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def show(losses: dict[str, list[float]], steps: int) -> None:
    at = [steps * part // 4 for part in (1, 2, 3, 4)]
    print(f"loss at step {'':10}" + "".join(f"{step:>9}" for step in at) + "   largest difference, means of 10 steps")
    for name, found in losses.items():
        line = f"{name:<23}" + "".join(f"{found[step - 1]:9.4f}" for step in at)
        plain = f"{name.partition(' ')[0]} bf16"
        if name != plain and plain in losses:
            apart = np.abs(means(found) / means(losses[plain]) - 1).max()
            line += f"   {apart:.2%} of BF16's {'(ok)' if apart <= WITHIN else f'(above {WITHIN:.0%})'}"
        print(line)


def means(losses: list[float], of: int = 10) -> np.ndarray:
    """Of so many steps each: single steps differ by what the samples are."""
    return np.array(losses[: len(losses) // of * of]).reshape(-1, of).mean(axis=1)


if __name__ == "__main__":
    main()
