"""Spoils good inputs of every reader at random, and looks for tracebacks, hangs and memory: python tests/fuzz.py --help

A seed gives the same inputs again. What is found is kept, with the command that shows it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fuzz_inputs
from arena import MEMORY, Arena, Outcome
from spoiling import spoiled

SAID = (0, 1, 2, 65, 73, 78)  # exit codes for what a person, or an input, did; 1: models that differ


@dataclass(frozen=True)
class Target:
    """A reader: what is copied for it, which of its files is spoiled, and the command that reads it."""

    source: str
    files: tuple[str, ...]
    words: Callable[[Path], list[object]]
    code: int = 0  # of the good input


def targets() -> list[Target]:
    return [*of_models(), *of_megatron(), *of_adapters(), *of_data(), *of_runs()]


def of_models() -> list[Target]:
    weights = ("config.json", "*.safetensors", "model.safetensors.index.json")
    hf = (*weights, "tokenizer_config.json", "hf_quant_config.json")
    nemo = tuple(f"weights/{name}" for name in (".metadata", "common.pt", "metadata.json"))
    nemo += tuple(f"context/{name}" for name in ("io.json", "hf_config.json", "model.yaml"))
    return [
        Target("hf", hf, lambda at: ["inspect", at]),
        Target("hf", hf, lambda at: ["import", at, at.parent / "out"]),
        Target("hf", ("config.json", "tokenizer.json"), lambda at: ["init", at, at.parent / "out"]),
        Target("nemo", nemo, lambda at: ["@handover", at]),
        Target("nemo", nemo, lambda at: ["inspect", at]),
        Target("nemo", nemo, lambda at: ["export", at, at.parent / "out"]),
        Target("bin", ("config.json", "pytorch_model.bin"), lambda at: ["inspect", at]),
        Target("bin", ("config.json", "pytorch_model.bin"), lambda at: ["import", at, at.parent / "out"]),
        Target("old-bin", ("pytorch_model.bin",), lambda at: ["inspect", at], 65),
        Target("fp8", weights, lambda at: ["import", at, at.parent / "out"]),
        Target("mxfp4", weights, lambda at: ["dequant", at, at.parent / "out"]),
        Target("bnb", weights[:2], lambda at: ["dequant", at, at.parent / "out"]),
        Target("both", ("hf/config.json", "nemo/weights/.metadata"), lambda at: ["verify", at / "hf", at / "nemo"]),
    ]


def of_megatron() -> list[Target]:
    rank = "iter_0000001/mp_rank_0*/model_optim_rng.pt"
    noted = ("latest_checkpointed_iteration.txt", "slipway/layout.json", "slipway/hf/config.json", rank)
    bridge = tuple(f"iter_0000000/{name}" for name in ("run_config.yaml", ".metadata", "*.distcp", "metadata.json"))
    dist = ("latest_checkpointed_iteration.txt", "iter_0000000/common.pt", "iter_0000000/.metadata")
    made = ("context/io.json", "context/model.yaml")
    return [
        Target("classic", noted, lambda at: ["inspect", at]),
        Target("classic", noted, lambda at: ["export", at, at.parent / "out"]),
        Target("lm", (rank,), lambda at: ["inspect", at]),
        Target("lm", (rank,), lambda at: ["import", at, at.parent / "out"]),
        Target("old", (rank,), lambda at: ["inspect", at], 65),
        Target("nf4-bitsandbytes", noted, lambda at: ["export", at, at.parent / "out"]),
        Target("nf4-npu", noted, lambda at: ["export", at, at.parent / "out"]),
        Target("mindspeed", (f"ckpt/{rank}", "hf/config.json"), with_config),
        Target("bridge", bridge, lambda at: ["inspect", at]),
        Target("bridge", bridge, lambda at: ["export", at, at.parent / "out"]),
        Target("dist", dist, lambda at: ["export", at, at.parent / "out"]),
        Target("made", made, lambda at: ["inspect", at]),
        Target("made", made, lambda at: ["export", at, at.parent / "out"]),
    ]


def with_config(folder: Path) -> list[object]:
    """Export a checkpoint that does not say which model it is."""
    return ["export", folder / "ckpt", folder / "out", "--config", folder / "hf"]


def of_adapters() -> list[Target]:
    rank = "ckpt/iter_0000001/mp_rank_0*/model_optim_rng.pt"
    peft = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    lora = tuple(f"ckpt/weights/{name}" for name in (".metadata", "*.distcp", "adapter_metadata.json"))
    lora += ("ckpt/context/model.yaml",)
    heads = ("trained/weights/.metadata", "trained/weights/__0_0.distcp", "trained/weights/adapter_metadata.json")
    heads += ("trained/context/hf_config.json",)
    merged = ("heads/config.json", "heads/heads.safetensors", "hf/config.json")
    return [
        Target("adapted", peft, lambda at: ["import", at / "hf", at / "out", "--adapter", at / "adapter"]),
        Target("tuned", (rank,), lambda at: [*with_config(at), "--lora-alpha", 8]),
        Target("tuned", (rank,), lambda at: [*with_config(at), "--lora-alpha", 8, "--adapter"]),
        Target("lora", lora, lambda at: ["export", at / "ckpt", at / "out", "--base", at / "nemo"]),
        Target("lora", lora, lambda at: ["export", at / "ckpt", at / "out", "--base", at / "nemo", "--adapter"]),
        Target("heads", heads, lambda at: ["extract-heads", at / "trained", at / "out"]),
        Target("heads", merged, lambda at: ["merge-heads", at / "heads", at / "hf", at / "out"]),
    ]


def of_data() -> list[Target]:
    tokens = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    tokens = tuple(f"tok/{name}" for name in tokens)
    tables = tuple(f"data/{name}" for name in ("a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.txt"))
    rows = tuple(f"data/{name}" for name in ("chats.jsonl", "a.csv", "a.json"))
    card = ("data/README.md", ".o.jsonl.partial/journal.json")
    said = ["--seq-length", 64, "--show", 0, "--tokenizer"]
    return [
        Target("rows", tokens, lambda at: ["preprocess", at / "data", at / "o.jsonl", *said, at / "tok"]),
        Target("rows", rows, lambda at: ["preprocess", at / "data", at / "o.jsonl", *said, at / "tok"]),
        Target("carded", card, lambda at: ["preprocess", at / "data", at / "o.jsonl", *said, at / "tok"]),
        Target("tables", tables, lambda at: ["preprocess", at / "data", at / "o.bin", *said, at / "tok"]),
        Target("tokens", ("a.bin", "a.idx", "b.jsonl"), lambda at: ["@scan", at / "a.bin", at / "b.jsonl"]),
    ]


def of_runs() -> list[Target]:
    work = (".out.partial/journal", ".out.partial/plan.json")
    nemo = tuple(f"nemo/context/{name}" for name in ("hf_config.json", "io.json", "model.yaml"))
    made = ("made/context/io.json", "made/context/model.yaml")
    steps = ["--steps", 9, "--warmup-steps", 1]
    return [
        Target("begun", work, lambda at: ["import", at / "hf", at / "out"]),
        Target("done", (".out.slipway.json", "out/config.json"), lambda at: ["dequant", at / "mxfp4", at / "out"], 2),
        Target("run", ("recipe.json", "status.json", "metrics.jsonl", "owner.json"), lambda at: ["@run", at]),
        Target("run", ("status.json", "metrics.jsonl"), lambda at: ["watch", at, "--once"]),
        Target("recipe", ("own.toml",), lambda at: train(at / "nemo", at / "data.jsonl", "--recipe", at / "own.toml")),
        Target("recipe", nemo, lambda at: train(at / "nemo", at / "data.jsonl", *steps)),
        Target("recipe", made, lambda at: train(at / "made", at / "data.jsonl", *steps)),
        Target("packets", ("greeting", "report"), lambda at: ["@packet", at / "greeting"]),
        Target("cluster", ("lab.toml",), lambda at: ["submit", "--cluster", at / "lab.toml", *CHAIN]),
        Target("cluster", ("status.json", "answer.tsv"), lambda at: ["@told", at / "lab.toml", at / "answer.tsv"]),
    ]


def train(model: Path, data: Path, *words: object) -> list[object]:
    """All of a run that is read before NeMo is."""
    return ["train", "--model", model, "--data", data, "--out", data.parent / "out", "--dry-run", *words]


CHAIN = ["--dry-run", "--", "import", "/shared/a", "nemo://b", "then", "inspect", "nemo://b"]
LAUNCHERS = {
    "SLURM_STEP_NODELIST": "a[08-10,12]-ib,b1", "SLURM_STEP_NUM_NODES": "5", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x5)", "SLURM_GPUS_ON_NODE": "2", "PET_NNODES": "2", "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "host", "PET_MASTER_PORT": "29500", "PET_NPROC_PER_NODE": "auto", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "JOB_COMPLETION_INDEX": "1", "NNODES": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip


def attempts(seed: int, count: int, folder: Path, arena: Arena) -> Iterator[tuple[str, Outcome]]:
    """(what was spoiled, what came of it) of each input."""
    every = targets()
    for target in every:
        assert all(list((folder / target.source).glob(name)) for name in target.files), f"a file of {target} is missing"
        words = target.words(_copy(folder, target))
        assert (good := arena.run(*words)).code == target.code, (words, good.out, good.err)
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        if chance.random() < 0.15:
            names = chance.sample(sorted(LAUNCHERS), chance.randint(1, len(LAUNCHERS)))
            found = {name: LAUNCHERS[name] for name in names}
            name = chance.choice(names)
            text = spoiled(found[name].encode(), chance).replace(b"\0", b"").decode(errors="replace")
            yield f"{number}: {name}", arena.run("@topology", environment=found | {name: text})
            continue
        target = chance.choice(every)
        at = _copy(folder, target)
        file = chance.choice(sorted(at.glob(chance.choice(target.files))))
        file.write_bytes(spoiled(file.read_bytes(), chance, file.suffix))
        words = target.words(at)
        yield f"{number}: {words[0]} {file.relative_to(at)}", arena.run(*words)


def _copy(folder: Path, target: Target) -> Path:
    """What the target reads, to be spoiled."""
    place = folder / "tried"
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder / target.source, place / target.source))


def is_wrong(found: Outcome) -> bool:
    unknown = any(words in found.err for words in ("Traceback", "an error that Slipway does not know"))
    return found.code not in SAID or unknown or found.memory > MEMORY


def run(seed: int, count: int, keep: Path | None = None) -> tuple[Counter[int], list[str]]:
    """(exit code → how often, what was wrong)."""
    codes, wrong = Counter[int](), list[str]()
    # In memory where that is possible: most of the time would go into waiting for a disk to have what is written.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as scratch, Arena() as arena:
        fuzz_inputs.make_seeds(Path(scratch))
        for what, found in attempts(seed, count, Path(scratch), arena):
            codes[found.code] += 1
            if is_wrong(found):
                wrong.append(
                    f"{what}: code {found.code}, {found.seconds:.1f} s, {found.memory >> 20} MB: {found.err[-400:]}"
                )
                if keep and (tried := Path(scratch) / "tried").exists():
                    shutil.copytree(tried, keep / f"{seed}-{what.partition(':')[0]}", dirs_exist_ok=True)
    return codes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--keep", type=Path, help="folder for the inputs that show something")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    codes, wrong = run(options.seed, options.count, options.keep)
    print(*wrong, sep="\n")
    print(f"{options.count} inputs, {len(wrong)} wrong; exit codes {dict(codes)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
