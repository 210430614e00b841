"""Packed samples, whole texts and evaluations in real runs: each is compared with what it must be equal to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port, make_model
from slipway.commands.export import export
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.tokens.indexed import write_index
from slipway.tokens.lines import as_line, read_line
from slipway.tokens.scan import scan
from slipway.training.run_folder import RunFolder
from torch.nn import functional

SEQ_LENGTH, STEPS = 24, 3
LENGTHS = (23, 13, 13, 9, 9, 9, 17, 9)  # without their last tokens they go into four sequences
SAMPLES = len(LENGTHS)
KINDS = ("llama31", "qwen3_moe", "deepseek_v3", "gpt_oss")
# run: kind, what it trains with
RUNS = {
    "dense-apart": ("llama31", {"mode": "sft"}),
    "dense-packed": ("llama31", {"mode": "sft", "pack": True}),
    "dense-packed-in-stages": ("llama31", {"mode": "sft", "pack": True, "pipeline_parallel_size": 2}),
    "dense-packed-in-twos": ("llama31", {"mode": "sft", "pack": True, "micro_batch_size": 2}),
    "dense-packed-in-stages-in-twos": (
        "llama31",
        {"mode": "sft", "pack": True, "micro_batch_size": 2, "pipeline_parallel_size": 2},
    ),
    "experts-apart": ("qwen3_moe", {"mode": "lora"}),
    "experts-packed": ("qwen3_moe", {"mode": "lora", "pack": True}),
    "latent-apart": ("deepseek_v3", {"mode": "lora"}),
    "latent-packed": ("deepseek_v3", {"mode": "lora", "pack": True, "micro_batch_size": 4}),
    "sinks-apart": ("gpt_oss", {"mode": "lora"}),
    "sinks-packed": ("gpt_oss", {"mode": "lora", "pack": True, "micro_batch_size": 2}),
    "heads": ("llama31", {"mode": "heads"}),
    "heads-packed-and-evaluated": ("llama31", {"mode": "heads", "pack": True, "eval": True}),
    "heads-packed-and-evaluated-in-twos": (
        "llama31",
        {"mode": "heads", "pack": True, "eval": True, "micro_batch_size": 2},
    ),
    "heads-evaluated": ("llama31", {"mode": "heads", "eval": True}),
    "evaluated": ("llama31", {"mode": "sft", "eval": True}),
    "evaluated-in-batches": ("llama31", {"mode": "sft", "eval": True, "global_batch_size": 4}),
    "evaluated-in-part": ("llama31", {"mode": "sft", "eval": True, "global_batch_size": 4, "eval_batches": 1}),
    "evaluated-in-stages": ("llama31", {"mode": "sft", "eval": True, "pipeline_parallel_size": 2}),
    "texts": ("llama31", {"mode": "pretrain", "texts": True, "eval": True}),
    "prompts": ("llama31", {"mode": "pretrain"}),
}


def write_data(folder: Path) -> None:
    """The same number of samples as JSON lines and as texts, of random tokens."""
    random = np.random.default_rng(0)
    samples = [random.integers(5, 500, length).tolist() for length in LENGTHS]
    (folder / "data.jsonl").write_bytes(b"".join(as_line(ids[:4], ids[4:]) for ids in samples))
    tokens = random.integers(5, 500, SAMPLES * SEQ_LENGTH + 1).astype(np.uint16)
    (folder / "data.bin").write_bytes(tokens.tobytes())
    with (folder / "data.idx").open("wb") as file:
        write_index(file, np.uint16, np.array([len(tokens)], np.int32), np.array([True]))


def job(root: Path, name: str) -> dict:
    kind, options = RUNS[name]
    options = dict(options)
    data = str(root / ("data.bin" if options.pop("texts", False) else "data.jsonl"))
    if options.pop("eval", False):
        options |= {"eval_data": data, "eval_every": 1}
    indices = root / f"{name}-indices"
    indices.mkdir()
    index = scan(Path(data), SEQ_LENGTH, 512, options.get("pack", False))
    for file in ("train.npz", "eval.npz"):
        index.save(indices / file)
    recipe = {
        "model": str(root / kind / "nemo"), "data": data, "out": str(root / "runs" / name), "steps": STEPS,
        "seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": len(index), "lr": 1e-3,
        "warmup_steps": 1, "constant_steps": 1, "save_every": 100,
    }  # fmt: skip
    ranks = options.get("pipeline_parallel_size", 1)
    return {"recipe": recipe | options, "indices": str(indices), "ranks": ranks, "port": free_port()}


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for kind in KINDS:
        make_model(root / kind / "hf", kind, quantized=False)
        import_checkpoint(str(root / kind / "hf"), str(root / kind / "nemo"))
    write_data(root)
    warm.train_many([job(root, name) for name in RUNS], root)
    return root / "runs"


def losses(runs: Path, name: str) -> list[float]:
    log = "\n".join(file.read_text()[-2000:] for file in sorted((runs / name).glob("rank*.log")))
    found = [entry["loss"] for entry in RunFolder(runs / name).read_metrics()]
    assert RunFolder(runs / name).read_status()["state"] == "done" and len(found) == STEPS, log
    return found


def evaluations(runs: Path, name: str) -> list[float]:
    found = RunFolder(runs / name).read_evaluations()
    assert [entry["step"] for entry in found] == list(range(STEPS))
    assert RunFolder(runs / name).read_status()["eval_loss"] == found[-1]["loss"]
    return [entry["loss"] for entry in found]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("dense-packed")])
def test_packed_samples_teach_what_they_teach_apart(runs, name):
    """Every step takes all samples, so the losses must be equal; were one seen by another, they would not."""
    assert losses(runs, name) == pytest.approx(losses(runs, "dense-apart"), rel=2e-5)


@pytest.mark.parametrize("kind", ["experts", "latent", "sinks"])
def test_packed_samples_meet_the_same_model(runs, kind):
    """Later steps differ a little: the load of the experts that is balanced counts padding."""
    apart, packed = losses(runs, f"{kind}-apart"), losses(runs, f"{kind}-packed")
    assert packed[0] == pytest.approx(apart[0], rel=2e-5) and packed == pytest.approx(apart, rel=2e-3)


@pytest.mark.parametrize("name", ["evaluated", "evaluated-in-stages", "texts"])
def test_an_evaluation_is_the_next_steps_loss(runs, name):
    """On the same samples, of which every step takes all."""
    assert evaluations(runs, name)[:-1] == pytest.approx(losses(runs, name)[1:], rel=1e-5)


def test_an_evaluation_takes_as_many_batches_as_it_is_told(runs):
    assert len(set(evaluations(runs, "evaluated-in-batches"))) == STEPS
    assert evaluations(runs, "evaluated-in-part") != evaluations(runs, "evaluated-in-batches")


def test_evaluations_change_nothing(runs):
    assert losses(runs, "evaluated") == losses(runs, "dense-apart")
    assert losses(runs, "heads-evaluated") == losses(runs, "heads")
    assert len(set(evaluations(runs, "heads-evaluated"))) == STEPS
    assert RunFolder(runs / "heads-evaluated").read_status()["base_changed"] is False
    assert len(set(evaluations(runs, "heads-packed-and-evaluated"))) == STEPS


def test_heads_meet_the_same_packed_samples_in_each_micro_batch(runs):
    one, two = "heads-packed-and-evaluated", "heads-packed-and-evaluated-in-twos"
    assert losses(runs, two) == pytest.approx(losses(runs, one), rel=2e-5)
    assert evaluations(runs, two) == pytest.approx(evaluations(runs, one), rel=2e-5)


def test_pretraining_learns_prompts_too(runs):
    assert losses(runs, "prompts")[0] != pytest.approx(losses(runs, "dense-apart")[0], rel=1e-4)


def test_trained_weights_come_out_for_transformers(runs, tmp_path):
    """Exported after the last step, the model has the loss there that the last evaluation had here, but for BF16.

    What norms have learned is near the distance of two numbers around 1 in BF16.
    """
    from transformers import AutoModelForCausalLM

    export(str(runs / "evaluated" / "checkpoints" / f"step={STEPS}"), str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    total = count = 0.0
    for line in (runs.parent / "data.jsonl").read_bytes().splitlines():
        prompt, response, _ = read_line(line, "")
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total += functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(response)
    first, last = losses(runs, "evaluated")[0], evaluations(runs, "evaluated")[-1]
    assert first - last > 0.1 and total / count == pytest.approx(last, abs=0.1 * (first - last))
