"""Tiny models are trained for a step each, and what Triton has compiled is compared with what is compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from slipway.families import FAMILIES
from slipway.training.precompile import Kernels
from slipway.training.preflight import model_of
from slipway.training.recipe import Recipe

MODES = {
    "lora": ["--mode", "lora"],
    "attention": ["--mode", "lora", "--lora-targets", "linear_proj"],
    "nf4": ["--mode", "lora", "--base-precision", "nf4"],
    "padded": ["--mode", "lora", "--pack=false"],
    "sft": ["--mode", "sft"],
    "heads": ["--mode", "heads"],
}
# Multiples of 16, as all widths of real models: Triton compiles anew for others.
WIDTHS = {"deepseek_v3": {"kv_lora_rank": 48, "qk_nope_head_dim": 32}}


def run(words: list[str], cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not done.returncode and "could not be compiled ahead" not in done.stdout, (words, done.stdout[-3000:])


def compiled(cache: Path) -> set[str]:
    """Name and key of each kernel."""
    return {f"{found.stem} {found.parent.name}" for found in cache.glob("*/*.cubin")}


def compare(family: str, mode: str, model: Path, scratch: Path) -> list[str]:
    """What a run compiled and was not compiled ahead, or the other way round."""
    name = f"{family}-{mode}"
    out, of_run, ahead = scratch / name, scratch / f"{name}.run", scratch / f"{name}.ahead"
    samples = ["--seq-length", "64", "--global-batch-size", "2", "--micro-batch-size", "1", "--steps", "1"]
    where = ["--model", str(model), "--data", str(scratch / "data.jsonl"), "--out", str(out)]
    run(["slipway.cli", "train", *where, *samples, *MODES[mode]], of_run)
    kernels = Kernels.of(Recipe.load(out / "recipe.json"), *model_of(model))
    run(["slipway.training.precompile", json.dumps(asdict(kernels))], ahead)
    both = compiled(of_run), compiled(ahead)
    print(f"{name}: {len(both[0])} kernels, {len(both[0] & both[1])} of them ahead", flush=True)
    return sorted(both[0] ^ both[1]) if both[0] else ["no kernel at all"]


def compare_all(family: str, scratch: Path) -> list[str]:
    folder = scratch / family
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].tiny_config() | WIDTHS.get(family, {})))
    model = scratch / f"{family}.nemo"
    run(["slipway.cli", "init", str(folder), str(model)], scratch / "unused")
    return [f"{family} {mode}: {one}" for mode in MODES for one in compare(family, mode, model, scratch)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        scratch = Path(folder)
        sample = json.dumps({"inputs": {"p_ids": [*range(5, 20)], "r_ids": [*range(30, 70)]}})
        (scratch / "data.jsonl").write_text(f"{sample}\n" * 8)
        different = [one for found in pool.map(lambda name: compare_all(name, scratch), FAMILIES) for one in found]
    assert not different, different


if __name__ == "__main__":
    main()
