"""A run at the true shape of a recipe's model, stopped in the middle and gone on with, beside the same run unstopped.

python -m benchmarks.stopping RECIPE [--mode lora] [--steps 8] [--layers N] [--set key=value ...] [--scratch FOLDER]

Weights and tokens are random. The model is written as Hugging Face has it and imported, the run gets SIGTERM after half
of the steps, and what `train` says of loading and saving is shown. Ends with 1 where the curves differ.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from slipway.errors import Stopped
from slipway.training import bench, recipes
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

from benchmarks.common import slipway
from benchmarks.synthetic import write

WITHIN = 1e-3  # of the loss: a GPU adds in another order each time
SHOWN = re.compile(r"^worker: (loaded|saved) .*|^worker: first step done .*", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--mode", default="lora", choices=["heads", "lora", "sft", "pretrain"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="the model is cut to so many")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--port", type=int, default=29500, help="of the master, where several run at a time")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder to work in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slipway-bench-", dir=options.scratch) as folder:
        sys.exit(compare(Path(folder), options))


def compare(folder: Path, options: argparse.Namespace) -> int:
    """Make the model, run and show. 0 where the losses are the same."""
    _, config = bench.config_for(options.recipe, None, options.layers)
    write(folder / "hf", config, "bf16")
    begun = time.monotonic()
    slipway("import", folder / "hf", folder / "model")
    size = sum(path.stat().st_size for path in (folder / "model" / "weights").iterdir())
    print(f"import: {size / 1e9:.1f} GB in {time.monotonic() - begun:.1f} s", flush=True)
    shutil.rmtree(folder / "hf")
    write_data(folder / "data.jsonl", options, config["vocab_size"])
    whole = train(folder, "whole", options)
    shutil.rmtree(folder / "whole")
    train(folder, "stopped", options, stop_after=options.steps // 2)
    stopped = train(folder, "stopped", options)
    apart = max(abs(one / other - 1) for one, other in zip(whole, stopped, strict=True))
    print("losses, never stopped " + " ".join(f"{loss:.6f}" for loss in whole))
    print("losses, stopped       " + " ".join(f"{loss:.6f}" for loss in stopped))
    print(f"largest difference {apart:.1e} of the loss ({'ok' if apart <= WITHIN else f'above {WITHIN}'})")
    return int(apart > WITHIN)


def write_data(data: Path, options: argparse.Namespace, vocabulary: int) -> None:
    """Samples as long as a sequence of the run."""
    shipped = recipes.load(options.recipe, options.mode, recipes.gpu_memory())
    given = {**shipped.values, **recipes.parse_settings(options.set)}
    known = {name: given[name] for name in ("seq_length", "global_batch_size") if name in given}
    bench.write_samples(data, Recipe(model="", data="", out="", **known), vocabulary, "full")


def train(folder: Path, name: str, options: argparse.Namespace, stop_after: int = 0) -> list[float]:
    """Loss of every step that the run has done so far. With `stop_after` it is sent SIGTERM after so many."""
    words = [
        *("train", "--model", folder / "model", "--data", folder / "data.jsonl", "--out", folder / name),
        *("--mode", options.mode, "--recipe", options.recipe, "--steps", options.steps, "--keep", 1),
        *("--master-port", options.port),
        *(word for one in ("warmup_steps=0", "constant_steps=0", *options.set) for word in ("--set", one)),
    ]
    ended, output = run(words, stop_after)
    if ended != (Stopped.exit_code if stop_after else 0):
        sys.exit(f"train ended with {ended}:\n{output}")
    said = f"SIGTERM after step {stop_after}" if stop_after else name
    print(f"{said}:", *(f"  {found.group()}" for found in SHOWN.finditer(output)), sep="\n", flush=True)
    steps = RunFolder(folder / name).read_metrics()
    if not stop_after:
        rate = statistics.median(step["tokens_per_second_per_gpu"] for step in steps[1:])
        print(f"  {rate:,.0f} tokens/s of each GPU, {steps[-1].get('memory_gb', 0)} GB", flush=True)
    return [step["loss"] for step in steps]


def run(words: Sequence[object], stop_after: int) -> tuple[int, str]:
    """Exit status and output of one command of ours, which is sent SIGTERM once it has shown so many steps."""
    command = [sys.executable, "-m", "slipway.cli", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if stop_after and line.startswith(f"step {stop_after}/"):
                process.send_signal(signal.SIGTERM)
    return process.returncode, "".join(lines)


if __name__ == "__main__":
    main()
