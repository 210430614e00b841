"""Spoils good inputs of every reader at random, and looks for tracebacks, hangs and memory: python tests/fuzz.py --help

A seed gives the same inputs again. What is found is kept, with the command that shows it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arena import MEMORY, Arena, Outcome

SAID = (0, 2, 65, 73, 78)  # exit codes for what a person, or an input, did
NASTY = [
    None, True, -1, 0, 1 << 31, 1 << 63, 10**30, 1e308, -0.0, 5e-324, "", "a" * 5000, "\x1b[2J", "\u202e", "../../x",
    "/", "/dev/zero", "é\U0001f600", "__class__", [], {}, [[]], {"": {}}, [None] * 50, "9" * 5000, "²", "nan",
    {"a": [1, {}]},
]  # fmt: skip
BYTES = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"[" * 2000,
    b"{",
    b'"',
    b"\n",
    b"1e999",
    b"\xed\xa0\x80",
    b"-",
    b"\x80\x05\x96",
    b"\\u0000",
]


def spoiled(content: bytes, chance: random.Random) -> bytes:
    """The content with some of it changed: as JSON where it is, inside of what packs it, as bytes else."""
    if content[:2] == b"\x1f\x8b" and chance.random() < 0.6:
        return gzip.compress(spoiled(gzip.decompress(content), chance))
    header = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and header < len(content) and chance.random() < 0.6:  # safetensors
        changed = spoiled(content[8 : 8 + header], chance)
        return len(changed).to_bytes(8, "little") + changed + content[8 + header :]
    if chance.random() < 0.6:
        try:
            value = json.loads(content)
        except ValueError:
            pass
        else:
            for _ in range(chance.randint(1, 3)):
                value = _in_json(value, chance)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(content) + 1), chance.choice([1, 1, 2, 8, 100])
        part = content[at : at + size]
        new = chance.choice([b"", part * 2, bytes(chance.randrange(256) for _ in part), chance.choice(BYTES)])
        content = content[:at] + new + content[at + size :]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.1 else content


def _in_json(value: Any, chance: random.Random) -> Any:
    """The value with one part of it, at any depth, replaced, left out or moved."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if chance.random() < 0.1:
            return {**value, chance.choice(["x", "", key + key, "__proto__"]): chance.choice(NASTY)}
        return {**value, key: _in_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], *([] if chance.random() < 0.2 else [_in_json(value[at], chance)]), *value[at + 1 :]]
    return chance.choice(NASTY)


@dataclass(frozen=True)
class Target:
    """A reader: what is copied for it, which of its files is spoiled, and the command that reads it."""

    source: str
    files: tuple[str, ...]
    words: Callable[[Path], list[object]]
    code: int = 0  # of the good input


def targets() -> list[Target]:
    weights = ("config.json", "*.safetensors", "model.safetensors.index.json")
    hf = (*weights, "tokenizer_config.json", "hf_quant_config.json")
    nemo = tuple(f"weights/{name}" for name in (".metadata", "common.pt", "metadata.json"))
    nemo += tuple(f"context/{name}" for name in ("io.json", "hf_config.json", "model.yaml"))
    tokens = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    tokens = tuple(f"tok/{name}" for name in tokens)
    said = ["--seq-length", 64, "--show", 0, "--tokenizer"]
    adapter = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    tables = tuple(f"data/{name}" for name in ("a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.txt"))
    rows = tuple(f"data/{name}" for name in ("chats.jsonl", "a.csv", "a.json"))
    trained = tuple(f"nemo/context/{name}" for name in ("hf_config.json", "io.json", "model.yaml"))
    heads = ("trained/weights/.metadata", "trained/weights/__0_0.distcp", "trained/weights/adapter_metadata.json")
    heads += ("trained/context/hf_config.json",)
    merged = ("heads/config.json", "heads/heads.safetensors", "hf/config.json")
    return [
        Target("hf", hf, lambda at: ["inspect", at]),
        Target("hf", hf, lambda at: ["import", at, at.parent / "out"]),
        Target("nemo", nemo, lambda at: ["@handover", at]),
        Target("nemo", nemo, lambda at: ["inspect", at]),
        Target("nemo", nemo, lambda at: ["export", at, at.parent / "out"]),
        Target("rows", tokens, lambda at: ["preprocess", at / "data", at / "o.jsonl", *said, at / "tok"]),
        Target("rows", rows, lambda at: ["preprocess", at / "data", at / "o.jsonl", *said, at / "tok"]),
        Target(
            "begun", (".out.partial/journal", ".out.partial/plan.json"), lambda at: ["import", at / "hf", at / "out"]
        ),
        Target("run", ("recipe.json", "status.json", "metrics.jsonl", "owner.json"), lambda at: ["@run", at]),
        Target("run", ("status.json", "metrics.jsonl"), lambda at: ["watch", at, "--once"]),
        Target("bin", ("config.json", "pytorch_model.bin"), lambda at: ["inspect", at]),
        Target("bin", ("config.json", "pytorch_model.bin"), lambda at: ["import", at, at.parent / "out"]),
        Target("fp8", weights, lambda at: ["import", at, at.parent / "out"]),
        Target("mxfp4", weights, lambda at: ["dequant", at, at.parent / "out"]),
        Target("adapted", adapter, lambda at: ["import", at / "hf", at / "out", "--adapter", at / "adapter"]),
        Target("tables", tables, lambda at: ["preprocess", at / "data", at / "o.bin", *said, at / "tok"]),
        Target("recipe", ("own.toml",), lambda at: train(at / "nemo", at / "data.jsonl", "--recipe", at / "own.toml")),
        Target("recipe", trained, lambda at: train(at / "nemo", at / "data.jsonl", "--steps", 9, "--warmup-steps", 1)),
        Target("tokens", ("a.bin", "a.idx", "b.jsonl"), lambda at: ["@scan", at / "a.bin", at / "b.jsonl"]),
        Target("done", (".out.slipway.json", "out/config.json"), lambda at: ["dequant", at / "mxfp4", at / "out"], 2),
        Target("heads", heads, lambda at: ["extract-heads", at / "trained", at / "out"]),
        Target("heads", merged, lambda at: ["merge-heads", at / "heads", at / "hf", at / "out"]),
        Target("both", ("hf/config.json", "nemo/weights/.metadata"), lambda at: ["verify", at / "hf", at / "nemo"]),
        Target("packets", ("greeting", "report"), lambda at: ["@packet", at / "greeting"]),
    ]


def train(model: Path, data: Path, *words: object) -> list[object]:
    """All of a run that is read before NeMo is."""
    return ["train", "--model", model, "--data", data, "--out", data.parent / "out", "--dry-run", *words]


LAUNCHERS = {
    "SLURM_STEP_NODELIST": "a[08-10,12]-ib,b1", "SLURM_STEP_NUM_NODES": "5", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x5)", "SLURM_GPUS_ON_NODE": "2", "PET_NNODES": "2", "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "host", "PET_MASTER_PORT": "29500", "PET_NPROC_PER_NODE": "auto", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "JOB_COMPLETION_INDEX": "1", "NNODES": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip


def make_seeds(folder: Path) -> None:
    """Good inputs of every reader."""
    from slipway.commands.import_checkpoint import import_checkpoint
    from slipway.families import FAMILIES, fabricate

    fabricate.fabricate(folder / "hf", FAMILIES["qwen3"].tiny_config(), ["some words of a text"] * 20, quantized=False)
    import_checkpoint(str(folder / "hf"), str(folder / "nemo"))
    (folder / "hf" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "group_size": 128}}')
    shutil.copytree(folder / "hf", folder / "begun" / "hf")
    partial = folder / "begun" / ".out.partial"
    partial.mkdir()
    (partial / "journal").write_text("0\n1\n2\n")
    (partial / "plan.json").write_text("0" * 64)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps({"model": "m", "data": "d", "out": "o", "steps": 3}))
    (folder / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 3, "loss": 0.5}))
    entry = {"step": 1, "loss": 0.5, "lr": 0.1, "tokens_per_second": 9.0, "seconds": 1.5}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    (folder / "run" / "owner.json").write_text(json.dumps({"host": "h", "pid": 1, "started": "now", "job": "3"}))
    (folder / "packets").mkdir()
    (folder / "packets" / "greeting").write_text(json.dumps({"nonce": "0" * 32, "proof": "0" * 64}) + "\n")
    (folder / "packets" / "report").write_text("{}")
    make_models(folder)
    make_data(folder)


def make_models(folder: Path) -> None:
    """Models in other forms, and what is put on them."""
    import torch
    from conftest import write_torch_dist
    from safetensors.torch import load_file, save_file
    from slipway.commands.extract_heads import extract_heads
    from slipway.families import FAMILIES, fabricate
    from slipway.training.heads import DecodingHeads

    hf, text = folder / "hf", ["some words of a text"] * 20
    fabricate.fabricate(folder / "mxfp4", FAMILIES["gpt_oss"].tiny_config(), text, quantized=True)
    fabricate.fabricate(folder / "fp8", FAMILIES["deepseek_v3"].tiny_config(), text, quantized=True, shards=2)
    shutil.copytree(hf, folder / "bin", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    state = {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    adapter = folder / "adapted" / "adapter"
    adapter.mkdir(parents=True)
    shutil.copytree(hf, folder / "adapted" / "hf")
    out, into = state["model.layers.0.self_attn.q_proj.weight"].shape
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    parts = {f"{prefix}A.weight": torch.ones(2, into), f"{prefix}B.weight": torch.ones(out, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"layers_to_transform": [0], "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for name, parts in (("done", ("mxfp4",)), ("both", ("hf", "nemo")), ("heads", ("hf",)), ("recipe", ("nemo",))):
        for part in parts:
            shutil.copytree(folder / part, folder / name / part)
    from slipway.commands.dequant import dequant

    dequant(str(folder / "done" / "mxfp4"), str(folder / "done" / "out"))
    trained = folder / "heads" / "trained"
    size = json.loads((hf / "config.json").read_text())["hidden_size"]
    weights = DecodingHeads(size).bfloat16().state_dict()
    write_torch_dist(trained / "weights", {f"adapter.{name}": tensor for name, tensor in weights.items()})
    (trained / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(folder / "nemo")}))
    (trained / "context").mkdir()
    shutil.copyfile(folder / "nemo" / "context" / "hf_config.json", trained / "context" / "hf_config.json")
    extract_heads(str(trained), str(folder / "heads" / "heads"))


def make_data(folder: Path) -> None:
    """Data in every form that is read, and a recipe."""
    import pyarrow
    import pyarrow.parquet
    from slipway.commands.preprocess import preprocess
    from slipway.training.recipes import FOLDER

    data = folder / "tables" / "data"
    data.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{"text": "some words of a text"}] * 5)
    pyarrow.parquet.write_table(table, data / "a.parquet")
    with pyarrow.ipc.new_file(data / "a.arrow", table.schema) as file:
        file.write_table(table)
    lines = b'{"text": "some words of a text"}\n' * 5
    (data / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(data / "a.jsonl.zst"), "zstd") as packed:
        packed.write(lines)
    (data / "a.txt").write_text("some words of a text\n" * 5)
    rows = folder / "rows" / "data"
    rows.mkdir(parents=True)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []}
    (rows / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 3)
    (rows / "a.csv").write_text('prompt,completion\na,b\n"c\n",d\n')
    (rows / "a.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 3))
    for place in (folder / "tables" / "tok", folder / "rows" / "tok"):
        place.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / "hf" / name, place / name)
        words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        (place / "chat_template.jinja").write_text(words)
        (place / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|return|>"}}))
    (folder / "tokens").mkdir()
    preprocess(str(data / "a.txt"), str(folder / "tokens" / "a.bin"), tokenizer=str(folder / "hf"), show=0)
    sample = json.dumps({"inputs": {"p_ids": [1, 2], "r_ids": [3, 4, 5]}}) + "\n"
    for file in (folder / "tokens" / "b.jsonl", folder / "recipe" / "data.jsonl"):
        file.write_text(sample * 8)
    shutil.copyfile(FOLDER / "qwen3_30b_a3b.toml", folder / "recipe" / "own.toml")


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
        file.write_bytes(spoiled(file.read_bytes(), chance))
        words = target.words(at)
        yield f"{number}: {words[0]} {file.relative_to(at)}", arena.run(*words)


def _copy(folder: Path, target: Target) -> Path:
    """What the target reads, to be spoiled."""
    place = folder / "tried"
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder / target.source, place / target.source))


def is_wrong(found: Outcome) -> bool:
    return found.code not in SAID or "Traceback" in found.err or found.memory > MEMORY


def run(seed: int, count: int, keep: Path | None = None) -> tuple[Counter[int], list[str]]:
    """(exit code → how often, what was wrong)."""
    codes, wrong = Counter[int](), list[str]()
    # In memory where that is possible: most of the time would go into waiting for a disk to have what is written.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as scratch, Arena() as arena:
        make_seeds(Path(scratch))
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
