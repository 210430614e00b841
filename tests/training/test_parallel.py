"""Every mode on every family computes the same under tensor, pipeline, expert and data parallelism as alone, and the
same whether there is much padding or none.

Without one of the repairs that this takes, it does not: each is taken away in a run of its own.

CI runs a part; SLIPWAY_MATRIX=all runs every cell. Adapters on experts cannot be shared by tensor parallel ranks, see
Recipe.check_model; there those of the attention alone are trained.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import free_port, make_model, tensor_of
from slipway.checkpoint import handover
from slipway.checkpoint.torch_dist import Reader
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.tokens.lines import as_line
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
    "ep2_copies": {"expert_parallel_size": 2},  # tokens reach experts in Megatron's usual way, see dispatch.py
    "dp2": {},
    "padded": {"seq_length": 56},
    # So much padding that a part of it is not computed.
    "cut": {"seq_length": 300},
    "cut_in_stages": {"seq_length": 300, "pipeline_parallel_size": 2},
    "cut_and_shared": {"seq_length": 300, "tensor_parallel_size": 2},
    # Two micro batches are on their way, and the layers of one are computed again after the other has passed.
    "recomputed": {"seq_length": 56, "recompute": "full", "pipeline_parallel_size": 2},
}
ALONE = ("one", "padded", "cut")
IN_CI = [
    ("gpt_oss", "heads", "tp2"),
    ("gpt_oss", "heads", "pp2"),
    ("gpt_oss", "heads", "ep2"),
    ("gpt_oss", "lora", "ep2"),
    ("gpt_oss", "lora", "ep2_copies"),
    ("gpt_oss", "sft", "tp2"),
    ("deepseek_v3", "sft", "tp2"),
    ("deepseek_v3", "sft", "ep2"),
    ("deepseek_v3", "sft", "ep2_copies"),
    ("deepseek_v3", "heads", "pp2"),
    ("deepseek_v3", "lora", "pp2"),
    ("qwen25_tied", "heads", "tp2"),
    ("qwen25_tied", "sft", "pp2"),
    ("llama31", "lora", "tp2"),
    ("qwen3_moe", "sft", "tp2"),
    ("qwen3_moe", "sft", "ep2"),
    ("qwen3_dense", "pretrain", "dp2"),
    ("deepseek_v3", "heads", "padded"),
    ("gpt_oss", "heads", "padded"),
    ("qwen3_moe", "heads", "padded"),
    ("deepseek_v3", "sft", "padded"),
    ("deepseek_v3", "lora", "padded"),
    ("gpt_oss", "sft", "padded"),
    ("gpt_oss", "lora", "padded"),
    ("qwen3_moe", "sft", "padded"),
    ("qwen3_moe", "lora", "padded"),
    ("qwen3_moe", "sft", "recomputed"),
    ("qwen3_moe", "lora", "recomputed"),
    ("llama31", "lora", "recomputed"),
    ("deepseek_v3", "sft", "cut"),
    ("llama31", "heads", "cut_in_stages"),
    ("qwen3_moe", "sft", "cut_and_shared"),
]
EVERY = [
    (kind, mode, layout)
    for kind, mode, layout in itertools.product(KINDS, MODES, LAYOUTS)
    if (kind in MOE or not layout.startswith("ep2"))
    and (kind not in MOE or mode != "lora" or layout not in ("tp2", "cut_and_shared"))  # refused
] + [(kind, "lora-attention", "tp2") for kind in MOE]
ATTENTION = {"deepseek_v3": "linear_q_up_proj,linear_kv_up_proj,linear_proj"}  # elsewhere linear_qkv and linear_proj
CELLS = EVERY if os.environ.get("SLIPWAY_MATRIX") == "all" else IN_CI

# The share of a tensor's change in STEPS steps that may differ. Adam turns the last bits of a gradient near zero into
# whole steps: 1.0e-3 was seen, on the bias of keys, which has no gradient at all. Without a repair it is much larger.
BOUND = 3e-3
# The share of the auxiliary loss is so small by default that a wrong one would not be seen.
CHANGES = {"qwen3_moe": {"router_aux_loss_coef": 0.1}}
# Repairs (without.py) and a cell in which the weights become others without them.
WRONG = [
    ("mark_experts", "qwen3_moe", "sft", "tp2"),
    ("mark_experts", "gpt_oss", "lora", "ep2"),
    ("scale_auxiliary_loss", "qwen3_moe", "sft", "tp2"),
    ("ignore_padding", "qwen3_moe", "sft", "padded"),
    ("ignore_padding", "qwen3_moe", "lora", "padded"),
    ("ignore_padding", "deepseek_v3", "sft", "padded"),
    ("tensor_parallel.checkpoint", "qwen3_moe", "sft", "recomputed"),
    ("LoRA._begin", "llama31", "lora", "tp2"),
    ("carry_gradients_to_the_first_layer", "llama31", "lora", "recomputed"),
    ("linear_on_every_rank", "deepseek_v3", "sft", "tp2"),
]
# Repairs, a cell that does not run without them, and what upstream says there.
FAILING = [
    ("RowParallelLinear.forward", "gpt_oss", "sft", "one", "is a view and is being modified inplace"),
    ("WrappedTorchNorm.__new__", "llama31", "lora", "tp2", "sequence parallel not supported by torch LayerNorm"),
    ("maybe_move_tensor_to_cpu", "gpt_oss", "sft", "ep2_copies", "alltoall_base(): incompatible function arguments"),
    ("te_general_gemm", "gpt_oss", "sft", "one", "name 'te_general_gemm' is not defined"),
    ("fused_apply_rotary_pos_emb", "llama31", "lora", "one", "apply_rope_fusion is not available"),
    ("_fix_tensors_device", "llama31", "lora", "one", "AssertionError: (False, False)"),
    ("utils.HAVE_TE", "llama31", "lora", "one", "isinstance() arg 2 must be a type"),
    ("lora.te", "llama31", "lora", "one", "transformer_engine.pytorch could not be imported"),
    ("init_model_parallel", "llama31", "lora", "one", "cuda rng state model-parallel-rng is not added"),
    ("attention_of_mla", "deepseek_v3", "sft", "one", "unexpected keyword argument 'k_channels'"),
]


def job(root: Path, kind: str, mode: str, layout: str, **more: Any) -> dict:
    """What train_many.py runs; `more`: its "without" and "continues", and a "name" that is not the cell's."""
    name = more.pop("name", "-".join(filter(None, (kind, mode, layout, more.get("without")))))
    recipe = {
        "model": str(root / kind / "nemo"), "data": str(root / "data.jsonl"),
        "out": str(root / "runs" / name), "mode": mode.partition("-")[0], "steps": STEPS,
        "seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 1,
        "constant_steps": 1, "save_every": 100, **LAYOUTS.get(layout, {}),
    }  # fmt: skip
    if mode == "lora-attention":
        recipe["lora_targets"] = ATTENTION.get(kind, "linear_qkv,linear_proj")
    if kind == "deepseek_v3" and "pipeline_parallel_size" in recipe:  # three layers
        recipe |= {"first_stage_layers": 2, "last_stage_layers": 1}
    if layout == "ep2_copies":
        more.setdefault("without", "sends_less")
    ranks = 1 if layout in ALONE else 2
    return {"recipe": recipe, "indices": str(root), "ranks": ranks, "port": free_port(), **more}


def resumed(root: Path, name: str, **more: Any) -> dict:
    """A run of adapters that goes on from the last step of one."""
    found = job(root, "llama31", "lora", "one", name=name, continues=str(root / "runs" / "llama31-lora-one"), **more)
    found["recipe"]["steps"] = STEPS + 1
    return found


def write_data(folder: Path) -> None:
    """Samples of random tokens, half of each to be learned, and their index."""
    random = np.random.default_rng(0)
    samples = [random.integers(5, 500, length).tolist() for length in random.integers(8, SEQ_LENGTH, 40)]
    lines = [as_line(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in samples]
    (folder / "data.jsonl").write_bytes(b"".join(lines))
    scan(folder / "data.jsonl", SEQ_LENGTH, 512).save(folder / "train.npz")


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory) -> Path:
    """The folder of all runs, one process each and in every layout, with all repairs and without one, in one go."""
    root = tmp_path_factory.mktemp("parallel")
    for kind in sorted({kind for kind, _, _ in CELLS}):
        make_model(root / kind / "hf", kind, CHANGES.get(kind), quantized=False)
        import_checkpoint(str(root / kind / "hf"), str(root / kind / "nemo"))
    write_data(root)
    alone = sorted({(kind, mode, "one") for kind, mode, _ in CELLS})
    jobs = [job(root, *cell) for cell in [*alone, *CELLS]]
    jobs += [job(root, *cell, without=repair) for repair, *cell in WRONG]
    jobs += [job(root, *cell, without=repair) for repair, *cell, _ in FAILING]
    jobs += [job(root, "llama31", "heads", "pp2", without="leave_out_backward")]
    jobs += [resumed(root, "resumed"), resumed(root, "resumed-without", without="FromBase")]
    warm.train_many(jobs, root)
    return root / "runs"


def logs(run: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(run.glob("rank*.log")))


def losses(run: Path) -> list[float]:
    found = [entry["loss"] for entry in RunFolder(run).read_metrics()]
    assert (run / "end").read_text() == "done" and len(found) == STEPS, logs(run)[-4000:]
    return found


@functools.cache
def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the model, without the optimizer."""
    reader = Reader(folder)
    return {name: tensor_of(reader, name).float() for name in reader.tensors if "optimizer" not in name}


def difference(run: Path, other: Path, base: Path) -> float:
    """How far two runs from the same base have come apart, as the largest share of what a tensor was changed by.

    Adapters and heads are not in the base; their first values count as a part of the change.
    """
    one, two, before = (weights(folder) for folder in (step(run), step(other), base))
    assert one.keys() == two.keys()
    changes = {name: (tensor - before.get(name, 0)).norm() for name, tensor in one.items()}
    return max(float((one[name] - two[name]).norm() / changes[name].clamp(min=1e-12)) for name in one)


def step(run: Path) -> Path:
    return run / "checkpoints" / f"step={STEPS}"


@pytest.mark.parametrize("kind, mode, layout", CELLS)
def test_what_training_saves_can_be_gone_on_from(runs, kind, mode, layout):
    handover.check(step(runs / f"{kind}-{mode}-{layout}"))


@pytest.mark.parametrize("kind, mode, layout", CELLS)
def test_losses_and_weights_are_those_of_one_process(runs, kind, mode, layout):
    here, alone = runs / f"{kind}-{mode}-{layout}", runs / f"{kind}-{mode}-one"
    assert losses(here) == pytest.approx(losses(alone), rel=2e-5)
    assert difference(alone, here, runs.parent / kind / "nemo") < BOUND


@pytest.mark.parametrize("repair, kind, mode, layout", WRONG)
def test_without_this_repair_other_weights_are_trained(runs, repair, kind, mode, layout):
    """If this fails, upstream has repaired it: delete the repair."""
    here, alone = runs / f"{kind}-{mode}-{layout}-{repair}", runs / f"{kind}-{mode}-one"
    assert losses(here) and difference(alone, here, runs.parent / kind / "nemo") > BOUND


@pytest.mark.parametrize("repair, kind, mode, layout, said", FAILING)
def test_without_this_repair_nothing_is_trained(runs, repair, kind, mode, layout, said):
    """If this fails, upstream has repaired it: delete the repair."""
    run = runs / f"{kind}-{mode}-{layout}-{repair}"
    assert (run / "end").read_text() == "failed" and said in logs(run)


def test_with_a_backward_half_the_stages_of_a_frozen_base_wait_for_ever(runs):
    run = runs / "llama31-heads-pp2-leave_out_backward"
    assert (run / "end").read_text() == "stuck", logs(run)[-4000:]


def test_a_resumed_run_of_adapters_remembers_its_base(runs):
    """NeMo notes the checkpoint of the adapters instead, which has no base for the next resume."""
    base, adapters = str(runs.parent / "llama31" / "nemo"), str(step(runs / "resumed-without"))
    for name, noted in (("resumed", base), ("resumed-without", adapters)):
        file = runs / name / "checkpoints" / f"step={STEPS + 1}" / "weights" / "adapter_metadata.json"
        assert json.loads(file.read_text())["model_ckpt_path"] == noted, name
