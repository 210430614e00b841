"""Every mode on every family computes the same under tensor, pipeline, expert and data parallelism as alone.

CI runs a part; SLIPWAY_MATRIX=all runs every cell. Adapters on experts cannot be shared by tensor parallel ranks, see
Recipe.check_model; there those of the attention alone are trained.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port, make_model
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.preprocess import preprocess
from slipway.tokens.scan import scan
from slipway.training.run_folder import RunFolder

SEQ_LENGTH, STEPS = 32, 3
KINDS = ("gpt_oss", "qwen3_dense", "qwen3_moe", "deepseek_v3", "qwen25_tied", "llama31")
MOE = ("gpt_oss", "qwen3_moe", "deepseek_v3")
MODES = ("heads", "sft", "lora", "pretrain")
LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "ep2": {"expert_parallel_size": 2},
    "dp2": {},
}
IN_CI = [
    ("gpt_oss", "heads", "tp2"),
    ("gpt_oss", "heads", "pp2"),
    ("gpt_oss", "heads", "ep2"),
    ("gpt_oss", "lora", "ep2"),
    ("gpt_oss", "sft", "tp2"),
    ("deepseek_v3", "sft", "ep2"),
    ("deepseek_v3", "heads", "pp2"),
    ("qwen25_tied", "heads", "tp2"),
    ("qwen25_tied", "sft", "pp2"),
    ("llama31", "lora", "tp2"),
    ("qwen3_moe", "sft", "tp2"),
    ("qwen3_dense", "pretrain", "dp2"),
]
EVERY = [
    (kind, mode, layout)
    for kind, mode, layout in itertools.product(KINDS, MODES, LAYOUTS)
    if (kind in MOE or layout != "ep2") and (kind not in MOE or mode != "lora" or layout != "tp2")  # refused
] + [(kind, "lora-attention", "tp2") for kind in MOE]
ATTENTION = {"deepseek_v3": "linear_q_up_proj,linear_kv_up_proj,linear_proj"}  # elsewhere linear_qkv and linear_proj
CELLS = EVERY if os.environ.get("SLIPWAY_MATRIX") == "all" else IN_CI


def job(root: Path, kind: str, mode: str, layout: str) -> dict:
    recipe = {
        "model": str(root / kind / "nemo"), "data": str(root / kind / "data.jsonl"),
        "out": str(root / "runs" / f"{kind}-{mode}-{layout}"), "mode": mode.partition("-")[0], "steps": STEPS,
        "seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 1,
        "constant_steps": 1, "save_every": 100, **LAYOUTS.get(layout, {}),
    }  # fmt: skip
    if mode == "lora-attention":
        recipe["lora_targets"] = ATTENTION.get(kind, "linear_qkv,linear_proj")
    if kind == "deepseek_v3" and layout == "pp2":  # three layers
        recipe |= {"first_stage_layers": 2, "last_stage_layers": 1}
    return {"recipe": recipe, "indices": str(root / kind), "ranks": 1 if layout == "one" else 2, "port": free_port()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs, one process each and in every layout, made in one go."""
    root = tmp_path_factory.mktemp("parallel")
    for kind in sorted({kind for kind, _, _ in CELLS}):
        make_model(root / kind / "hf", kind, quantized=False)
        import_checkpoint(str(root / kind / "hf"), str(root / kind / "nemo"))
        preprocess(str(Path(__file__).parent), str(root / kind / "data.jsonl"), tokenizer=str(root / kind / "nemo"),
                   seq_length=SEQ_LENGTH)  # fmt: skip
        scan(root / kind / "data.jsonl", SEQ_LENGTH, 512).save(root / kind / "train.npz")
    alone = sorted({(kind, mode, "one") for kind, mode, _ in CELLS})
    (root / "jobs.json").write_text(json.dumps([job(root, *cell) for cell in [*alone, *CELLS]]))
    words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("train_many.py")), str(root / "jobs.json")]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(words, env=os.environ | path, timeout=3600, check=False)
    return root / "runs"


def losses(run: Path) -> list[float]:
    log = "\n".join(file.read_text()[-2000:] for file in sorted(run.glob("rank*.log")))
    found = [entry["loss"] for entry in RunFolder(run).read_metrics()]
    assert RunFolder(run).read_status()["state"] == "done" and len(found) == STEPS, log
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind, mode, layout", CELLS)
def test_the_losses_are_those_of_one_process(runs, kind, mode, layout):
    assert losses(runs / f"{kind}-{mode}-{layout}") == pytest.approx(losses(runs / f"{kind}-{mode}-one"), rel=2e-5)
