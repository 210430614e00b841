"""Spoils good inputs of every reader at random, and looks for tracebacks, hangs and memory: python tests/fuzz.py --help

A seed gives the same inputs again. What is found is kept, with the command that shows it.
"""

from __future__ import annotations

import argparse
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
    """The content with some of it changed: as JSON where it is, as bytes else."""
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


def targets() -> list[Target]:
    hf = ("config.json", "model.safetensors", "tokenizer_config.json", "hf_quant_config.json")
    nemo = tuple(f"weights/{name}" for name in (".metadata", "common.pt", "metadata.json"))
    nemo += tuple(f"context/{name}" for name in ("io.json", "hf_config.json", "model.yaml"))
    tokens = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    said = ["--seq-length", 64, "--show", 0]
    return [
        Target("hf", hf, lambda at: ["inspect", at]),
        Target("hf", hf, lambda at: ["import", at, at.parent / "out"]),
        Target("nemo", nemo, lambda at: ["@handover", at]),
        Target("nemo", nemo, lambda at: ["inspect", at]),
        Target("nemo", nemo, lambda at: ["export", at, at.parent / "out"]),
        Target("hf", tokens, lambda at: ["preprocess", at / "chats.jsonl", at / "o.jsonl", "--tokenizer", at, *said]),
        Target(
            "hf",
            ("chats.jsonl", "a.csv", "a.json"),
            lambda at: ["preprocess", at, at.parent / "o.jsonl", "--tokenizer", at, *said],
        ),
        Target(
            "begun", (".out.partial/journal", ".out.partial/plan.json"), lambda at: ["import", at / "hf", at / "out"]
        ),
        Target("run", ("recipe.json", "status.json", "metrics.jsonl"), lambda at: ["@run", at]),
        Target("packets", ("greeting", "report"), lambda at: ["@packet", at / "greeting"]),
    ]


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
    (folder / "hf" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []}
    (folder / "hf" / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 3)
    (folder / "hf" / "a.csv").write_text('prompt,completion\na,b\n"c\n",d\n')
    (folder / "hf" / "a.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 3))
    shutil.copytree(folder / "hf", folder / "begun" / "hf")
    partial = folder / "begun" / ".out.partial"
    partial.mkdir()
    (partial / "journal").write_text("0\n1\n2\n")
    (partial / "plan.json").write_text("0" * 64)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps({"model": "m", "data": "d", "out": "o", "steps": 3}))
    (folder / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 3, "loss": 0.5}))
    (folder / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    (folder / "packets").mkdir()
    (folder / "packets" / "greeting").write_text(json.dumps({"nonce": "0" * 32, "proof": "0" * 64}) + "\n")
    (folder / "packets" / "report").write_text("{}")


def attempts(seed: int, count: int, folder: Path, arena: Arena) -> Iterator[tuple[str, Outcome]]:
    """(what was spoiled, what came of it) of each input."""
    every = targets()
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
        place = folder / "tried"
        shutil.rmtree(place, ignore_errors=True)
        at = place / target.source
        shutil.copytree(folder / target.source, at)
        there = [name for name in target.files if (at / name).is_file()]
        name = chance.choice(there)
        (at / name).write_bytes(spoiled((at / name).read_bytes(), chance))
        words = target.words(at)
        yield f"{number}: {words[0]} {name}", arena.run(*words)


def is_wrong(found: Outcome) -> bool:
    return found.code not in SAID or "Traceback" in found.err or found.memory > MEMORY


def run(seed: int, count: int, keep: Path | None = None) -> tuple[Counter[int], list[str]]:
    """(exit code → how often, what was wrong)."""
    codes, wrong = Counter[int](), list[str]()
    with tempfile.TemporaryDirectory() as scratch, Arena() as arena:
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
