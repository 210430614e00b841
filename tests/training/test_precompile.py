"""Kernels compiled ahead: really compiled, for an H100 that is not here, and found again by what a step calls."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading

import pytest
from slipway.families import FAMILIES
from slipway.training import precompile, recipes
from slipway.training.recipe import Recipe

# A driver of Triton's for an H100 that starts nothing. All else is Triton's own, with its compiler and the assembler.
DRIVER = """
import sys
from types import SimpleNamespace
import torch
import triton
from triton.backends.compiler import GPUTarget

class Driver:
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (binary, name, 1, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

triton.runtime.driver.set_active(Driver())
compiled = []
triton.knobs.runtime.jit_cache_hook = lambda **about: compiled.append(about["fn"].name)
from slipway.training import precompile
"""

# Queries and keys as Megatron cuts them out of one layer's output, or as they are parted; packed and not; 8 query heads
# for each of 4 keys.
DENSE = """
from slipway.training.parting import Parted
from slipway.training.parting_gpu import Heads
from slipway.training.rotary import Turned, turns_of
from slipway.training import adapted_activation, cross_entropy_gpu, low_rank_gpu
from slipway.training.low_rank_gpu import add_product_

kernels = precompile.Kernels(heads=False, columns=128256, turned=128, by_pairs=False, queries={queries},
                        normed={normed}, pack={pack}, shares={shares}, rank=32, between=True, fp8_rows={fp8_rows},
                        nf4=True, experts=0, chosen=0, width=14336, limited=False, float32_router=False, hidden=4096,
                        tokens=8192)
precompile.compile_all(kernels, "cpu")
wanted = ["_part_kernel", "_part_kernel"] if {queries} else ["_turn_kernel", "_turn_kernel"]
wanted += ["_add_product_kernel", "_product_kernel"] if {fp8_rows} else ["_add_product_kernel"]
wanted += ["_adapted_activation_kernel", "_adapted_gradients_kernel", "_weight_gradients_kernel", "_unpack_kernel",
           "_sums_kernel", "_gradient_kernel"]
assert compiled == wanted, compiled
compiled.clear()
rows, share = 96, (1, {shares}) if {pack} else (0, 1)
angles, bounds = torch.ones(4096, 1, 1, 128), torch.tensor([0, 5, 40, rows], dtype=torch.int32)
bounds = bounds if {pack} else None
mixed = torch.ones(rows, 1 if {pack} else 2, 4, 10 * 128, dtype=torch.bfloat16)
if {queries}:
    mixed = mixed.flatten(2).requires_grad_()
    norms = (torch.ones(128).bfloat16(), torch.ones(128).bfloat16()) if {normed} else None
    parts = Parted.apply(mixed, Heads(4, 128, turns_of(angles), bounds, 1.0, share, norms, 1e-6))
    torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
else:
    for part in mixed.split([1024, 128, 128], -1)[:2]:
        part = part.reshape(*part.shape[:2], -1, 128)
        part = (part.squeeze(1) if {pack} else part).requires_grad_()
        Turned.apply(part, angles, bounds, 1.0, False, share).backward(torch.ones_like(part))
for width in (6144, 4096, 28672):
    output, low, weight = (torch.ones(*shape).bfloat16() for shape in ((rows, width), (rows, 32), (width, 32)))
    add_product_(output, low, weight, 2.0)
adapted = [torch.ones(*shape).bfloat16().requires_grad_()
           for shape in ((rows, 1, 28672), (rows, 32), (28672, 32), (32, 14336))]
adapted_activation.has_kernels = lambda tensor: True
both = adapted_activation._Between.apply(*adapted, 2.0, {fp8_rows} > 0)
torch.autograd.backward(both, [torch.ones_like(one) for one in both])
if {fp8_rows}:
    low_rank_gpu.product_with_peaks(torch.ones(8192, 6144).bfloat16(), torch.ones(6144, 32).bfloat16(), 2.0)
logits, labels = torch.ones(rows, 128256).bfloat16(), torch.ones(rows, dtype=torch.int64)
cross_entropy_gpu.to_gradient_(logits, labels, cross_entropy_gpu.sums(logits, labels)[0])
from slipway.training.nf4_gpu import unpack_rows
unpack_rows(torch.ones(6144, 2048).byte(), torch.ones(6144, 64), torch.ones(16))
assert not compiled, compiled
print("found")
"""

EXPERTS = """
from slipway.training.activations import _Gated
from slipway.training.activations_gpu import Gate
from slipway.training.parting import Parted
from slipway.training.parting_gpu import Heads
from slipway.training.rotary import Turned, turns_of

kernels = precompile.Kernels(heads={heads}, columns=201088, turned=64, by_pairs={latent}, queries={queries},
                        normed={normed}, pack=True, shares=1, rank=0, between=False, fp8_rows=0, nf4=False,
                        experts=32, chosen=4, width=2880, limited={limited},
                        float32_router={latent}, hidden=2880, tokens=4096)
precompile._sorting = lambda *_: None  # Transformer Engine's are tried on a GPU
precompile.compile_all(kernels, "cpu")
turning = "_part_kernel" if {queries} else "_turn_kernel"
wanted = [turning, turning, "_gated_kernel", "_gradient_kernel", "_sums_kernel", "_gradient_kernel"]
if {heads}:
    wanted = [turning, "_gated_kernel", "_features_kernel", "_losses_kernel"]
assert compiled == wanted, compiled
compiled.clear()
shares = torch.ones(96, dtype=torch.float32 if {latent} else torch.bfloat16)
inputs = torch.ones(96, 2 * 2880, dtype=torch.bfloat16, requires_grad=not {heads})
output = _Gated.apply(inputs, shares.unsqueeze(-1), Gate(1.702, 1.0, 7.0 if {limited} else None))
whole = torch.ones(96, 1, 8, 192 if {latent} else 64, dtype=torch.bfloat16)
part = whole[..., -64:].squeeze(1).requires_grad_(not {heads})
bounds = torch.tensor([0, 5, 40, 96], dtype=torch.int32)
angles = torch.ones(4096, 1, 1, 64)
if {queries}:
    mixed = torch.ones(96, 1, 2 * ({queries} + 2) * 64, dtype=torch.bfloat16).requires_grad_(not {heads})
    norms = (torch.ones(64).bfloat16(), torch.ones(64).bfloat16()) if {normed} else None
    turned = Parted.apply(mixed, Heads(2, 64, turns_of(angles), bounds, 1.3, (0, 1), norms, 1e-6))[0]
else:
    turned = Turned.apply(part, angles, bounds, 1.3, {latent}, (0, 1))
if {heads}:
    from slipway.training.counted import CountedRows
    rows = CountedRows(torch.ones(80, 201088).bfloat16(), torch.ones(80, dtype=torch.int64))
    rows.features(torch.ones(80)), rows.losses(torch.ones(80), torch.ones(80))
else:
    output.backward(torch.ones_like(output))
    turned.backward(torch.ones_like(turned))
assert not compiled, compiled
print("found")
"""


def run(code: str, tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "script.py"
    script.write_text(DRIVER + code)
    done = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "found\n", done.stderr[-3000:]
    assert len(list(tmp_path.glob("*/*.cubin"))) > 2


PARTED = [
    {"queries": 8, "normed": False, "fp8_rows": 8192},
    {"queries": 0, "normed": True, "fp8_rows": 0},
    {"queries": 8, "normed": True, "fp8_rows": 0},
]


@pytest.mark.parametrize("words", PARTED, ids=["parted", "turned", "normed"])
@pytest.mark.parametrize("pack, shares", [(False, 2), (True, 1), (True, 2)], ids=["rows", "packed", "shared"])
def test_a_dense_step_finds_all_its_kernels(pack, shares, words, tmp_path):
    run(DENSE.format(pack=pack, shares=shares, **words), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        {"heads": False, "latent": False, "limited": True, "queries": 8, "normed": False},
        {"heads": False, "latent": True, "limited": False, "queries": 0, "normed": False},
        {"heads": True, "latent": False, "limited": False, "queries": 0, "normed": False},
        {"heads": True, "latent": False, "limited": False, "queries": 8, "normed": True},
    ],
    ids=["limited", "latent", "heads", "parted heads"],
)
def test_a_step_with_experts_finds_all_its_kernels(words, tmp_path):
    run(EXPERTS.format(**words), tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_widths_are_those_of_the_model(name):
    c = FAMILIES[name].tiny_config()
    found = precompile.Kernels.of(Recipe(model="m", data="d", out="o", mode="lora", pack=True), name, c)
    experts = {"gpt_oss": (4, 2, 96), "qwen3": (4, 2, 48), "deepseek_v3": (8, 4, 32)}.get(name)
    assert (found.experts, found.chosen, found.width) == experts or (experts is None and not found.experts)
    assert found.turned == {"gpt_oss": 16, "qwen3": 32, "deepseek_v3": 16}.get(name, 16)
    assert (found.by_pairs, found.float32_router) == ((name == "deepseek_v3",) * 2)
    assert found.limited == (name == "gpt_oss") and found.pack and found.rank == 32 and not found.fp8_rows
    shared = c["num_attention_heads"] // c["num_key_value_heads"]
    assert (found.queries, found.normed) == (0 if name == "deepseek_v3" else shared, name == "qwen3")
    trained = precompile.Kernels.of(Recipe(model="m", data="d", out="o", mode="sft"), name, c)
    assert trained.queries == (0 if name in ("deepseek_v3", "qwen3") else shared)
    assert found.between == (name not in ("gpt_oss", "qwen3"))


def test_layouts_decide_what_there_is():
    c = recipes.config_of("qwen3_30b_a3b")
    given = {"model": "m", "data": "d", "out": "o", "seq_length": 4096, "micro_batch_size": 2}
    one = precompile.Kernels.of(Recipe(**given, mode="lora", precision="fp8"), "qwen3", c)
    assert (one.experts, one.tokens, one.fp8_rows, one.rank) == (128, 8192, 8192, 32)
    dense = recipes.config_of("llama31_8b")
    for targets, both in (("all-linear", True), ("linear_fc2,linear_fc1", True), ("linear_qkv,linear_fc1", False)):
        assert (
            precompile.Kernels.of(Recipe(**given, mode="lora", lora_targets=targets), "llama31", dense).between == both
        )
    assert not precompile.Kernels.of(Recipe(**given, mode="sft"), "llama31", dense).between
    spread = precompile.Kernels.of(Recipe(**given, mode="sft", expert_parallel_size=4), "qwen3", c)
    assert (spread.experts, spread.chosen, spread.tokens, spread.rank) == (32, 8, 32768, 0)
    shared = Recipe(**given, mode="lora", tensor_parallel_size=2, context_parallel_size=2)
    found = precompile.Kernels.of(shared, "qwen3", c)
    assert (found.tokens, found.rank, found.shares, found.fp8_rows) == (2048, 0, 2, 0)
    assert precompile.Kernels(**dataclasses.asdict(found)) == found


@pytest.mark.parametrize("rank, gpus, begun", [("0", "0", True), ("1", "0", False), ("0", "", False)])
def test_the_first_worker_of_a_node_with_gpus_begins_it_and_leaves_nothing_behind(rank, gpus, begun, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(precompile, "model_of", lambda path: ("llama31", FAMILIES["llama31"].tiny_config()))
    begin, processes = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *w, **o: processes.append(begin(*w, **o)) or processes[-1])
    with precompile.compiling(Recipe(model="m", data="d", out="o")):
        assert len(processes) == begun
        assert all(process.poll() is None and "slipway.training.precompile" in process.args for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_another_thread_finds_out_what_triton_is():
    from triton.runtime.cache import triton_key

    triton_key.cache_clear()
    precompile.know_compiler()
    for thread in threading.enumerate():
        if thread.name == "compiler":
            thread.join()
    assert triton_key.cache_info().currsize == 1


def test_what_cannot_be_compiled_is_said(monkeypatch, capsys):
    # As on a machine whose GPU is gone: torch without CUDA cannot make the first tensor.
    kernels = precompile.Kernels.of(Recipe(model="m", data="d", out="o"), "llama31", FAMILIES["llama31"].tiny_config())
    monkeypatch.setattr(sys, "argv", ["precompile", json.dumps(dataclasses.asdict(kernels))])
    precompile.main()
    said = capsys.readouterr()
    assert "worker: kernels could not be compiled ahead, so the first step takes longer: " in said.out + said.err
    assert "Traceback" not in said.out + said.err
