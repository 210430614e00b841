"""Adapters on a base in NF4 (QLoRA): what they learn is what they learn on a base with the unpacked weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import free_port, make_model
from safetensors.torch import load_file, save_file
from slipway import cli
from slipway.checkpoint import nf4
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.training.experts import grouped_product
from slipway.training.nf4_base import Packed, Part, pack, pack_matrices, unpack
from slipway.training.run_folder import RunFolder
from test_parallel import LAYOUTS, SEQ_LENGTH, write_data
from test_resume import losses

STEPS = 4
# Rows that ranks share are cut between blocks, as those of published models are.
WIDE = {"head_dim": 64, "intermediate_size": 256}
KINDS = {"llama31": WIDE, "qwen3_moe": {}, "deepseek_v3": {}, "gpt_oss": {}}
CELLS = [
    ("llama31", "one"),
    ("llama31", "tp2"),
    ("llama31", "recomputed"),
    ("llama31", "dp2"),
    ("qwen3_moe", "ep2"),
    ("gpt_oss", "one"),
    ("deepseek_v3", "one"),
]
MATRICES = re.compile(r"\.layers\.\d+\..*_proj(_with_mqa)?(\.weight)?$")


def job(root: Path, kind: str, name: str, layout: str = "one", nf4: bool = True, **more: object) -> dict:
    """What train_many.py runs."""
    recipe = {
        "model": str(root / kind / ("nemo" if nf4 else "rounded")), "data": str(root / "data.jsonl"),
        "out": str(root / "runs" / f"{kind}-{name}"), "mode": "lora", "steps": STEPS, "seq_length": SEQ_LENGTH,
        "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-2, "warmup_steps": 1, "constant_steps": 1,
        "save_every": 2, "base_precision": "nf4" if nf4 else "bf16",
        **{key: value for key, value in LAYOUTS.get(layout, {}).items() if key != "seq_length"},
    }  # fmt: skip
    ranks = 1 if layout == "one" else 2
    return {"recipe": recipe, "indices": str(root), "ranks": ranks, "port": free_port(), **more}


def round_matrices(hf: Path, rounded: Path) -> None:
    """A copy of a Hugging Face model whose layers' matrices have the values that NF4 leaves of them."""
    for file in hf.iterdir():
        if file.suffix != ".safetensors":
            (rounded / file.name).write_bytes(file.read_bytes())
    for file in hf.glob("*.safetensors"):
        tensors = load_file(file)
        found = {name: as_unpacked(value) if MATRICES.search(name) else value for name, value in tensors.items()}
        assert any(not torch.equal(found[name], value) for name, value in tensors.items())
        save_file(found, rounded / file.name, {"format": "pt"})


def as_unpacked(weight: torch.Tensor) -> torch.Tensor:
    """gpt-oss stores its experts as [experts, inputs, outputs], and Megatron's matrices are [outputs, inputs]."""
    if weight.dim() == 3:
        return torch.stack([as_unpacked(one.T.contiguous()).T for one in weight]).contiguous()
    return unpack(*pack(weight), weight.shape[1], weight.dtype)


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("nf4")
    write_data(root)
    for kind, changes in KINDS.items():
        make_model(root / kind / "hf", kind, changes, quantized=False)
        (root / kind / "rounded-hf").mkdir()
        round_matrices(root / kind / "hf", root / kind / "rounded-hf")
        import_checkpoint(str(root / kind / "hf"), str(root / kind / "nemo"))
        import_checkpoint(str(root / kind / "rounded-hf"), str(root / kind / "rounded"))
    jobs = [job(root, kind, layout, layout) for kind, layout in CELLS]
    jobs += [job(root, kind, "rounded", nf4=False) for kind in KINDS]
    jobs += [job(root, "llama31", "stopped", stop_after=2)]
    jobs += [job(root, "llama31", "resumed", continues=str(root / "runs" / "llama31-stopped"))]
    warm.train_many(jobs, root)
    return root / "runs"


@pytest.mark.parametrize("kind, layout", CELLS)
def test_adapters_learn_what_they_learn_on_the_unpacked_base(runs, kind, layout):
    found, wanted = (losses(runs / f"{kind}-{name}") for name in (layout, "rounded"))
    assert len(found) == STEPS and found[0] != found[-1]
    assert found == pytest.approx(wanted, rel=2e-5)
    assert RunFolder(runs / f"{kind}-{layout}").read_status()["base_changed"] is False


def test_a_stopped_run_goes_on_bit_for_bit(runs):
    status = RunFolder(runs / "llama31-resumed").read_status()
    assert status["state"] == "done" and 2 <= status["started_at_step"] < STEPS
    assert losses(runs / "llama31-resumed") == losses(runs / "llama31-one")


def test_the_codes_are_those_of_bitsandbytes():
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[3, 64:128] = 0
    codes, scales = pack(weight)
    bits = weight.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(codes.numpy().reshape(-1, 1), nf4.pack(bits, "bitsandbytes")[""][0])
    assert torch.equal(scales, weight.float().view(40, -1, 64).abs().amax(-1))


def test_rows_that_end_inside_a_block_are_packed_alone():
    """So that a row is packed alike on whichever rank it is."""
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(2))
    codes, scales = pack(weight)
    assert codes.shape == (6, 64) and scales.shape == (6, 2)
    for row in range(6):
        alone = pack(weight[row : row + 1])
        assert torch.equal(codes[row], alone[0][0]) and torch.equal(scales[row], alone[1][0])
    assert unpack(codes, scales, 100, torch.float32).shape == weight.shape
    assert (unpack(codes, scales, 100, torch.float32) - weight).abs().max() < 0.16 * weight.abs().max()


KERNEL = """
import torch
from slipway.training.nf4_base import _table, _unpack_rows, pack
from slipway.training.nf4_gpu import unpack_rows

for shape in ((3, 64), (70, 192), (5, 4160)):
    codes, scales = pack(torch.randn(shape))
    # In float32: the interpreter does not round to BF16 as a GPU does.
    found = unpack_rows(codes, scales, _table(codes.device), torch.float32)
    assert torch.equal(found, _unpack_rows(codes, scales)), shape
"""


def test_the_kernel_unpacks_the_same():
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


class Keeper(torch.nn.Linear):
    """Keeps a reference to its weight, as some layers of Transformer Engine do."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.kept = self.weight
        return torch.nn.functional.linear(inputs, self.weight)


def test_nothing_keeps_the_memory_of_an_unpacked_matrix():
    layer = Keeper(128, 8, bias=False)
    packed = Packed(layer, ["weight"])
    inputs = torch.randn(3, 128, requires_grad=True)
    output = layer(inputs)
    assert layer.kept.untyped_storage().size() == 0
    output.sum().backward()
    assert torch.equal(inputs.grad, packed.unpacked()[0].sum(0).expand(3, 128))
    moved = layer.double()  # what Megatron does to a model, to BF16
    assert moved.weight.is_meta and moved.nf4_scales.dtype == torch.int32


class SavedTwice(torch.autograd.Function):
    """As Transformer Engine's products: the weight, and the weight as it is multiplied."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(weight, weight.view(-1, weight.shape[-1]))
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        weight, same = ctx.saved_tensors
        assert torch.equal(weight, same)
        return gradient @ weight, None


def test_a_matrix_that_is_kept_twice_is_unpacked_once(monkeypatch):
    layer = torch.nn.Linear(128, 8, bias=False)
    layer.forward = lambda inputs: SavedTwice.apply(inputs, layer.weight)
    packed = Packed(layer, ["weight"])
    times = []
    unpacked = packed.unpacked
    monkeypatch.setattr(packed, "unpacked", lambda: times.append(1) or unpacked())
    for _ in range(2):
        layer(torch.randn(3, 128, requires_grad=True)).sum().backward()
    assert len(times) == 4, "once for each pass"


class Experts(torch.nn.Module):
    """Two experts as TEGroupedLinear has them: registered in reverse, and multiplied by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        for number in (1, 0):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.randn(16, 128).bfloat16()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return grouped_product(inputs, [self.weight0, self.weight1], [3, 5])


def test_unpacked_experts_are_multiplied_as_they_lie_and_not_kept(monkeypatch):
    from slipway.training import cpu

    cpu.enable()
    layer = torch.nn.Sequential(Experts())
    (packed,) = pack_matrices(layer)
    kept = []

    def seen(weights):
        pack = Packed._kept(packed, weights)
        return lambda tensor: kept.append(pack(tensor)) or kept[-1]

    monkeypatch.setattr(packed, "_kept", seen)
    inputs = torch.randn(8, 128).bfloat16().requires_grad_()
    output = layer(inputs)
    assert [type(one) for one in kept if not isinstance(one, torch.Tensor) or one.numel() > 100] == [Part]
    of_each = [part @ one.T for part, one in zip(inputs.split([3, 5]), packed.unpacked(), strict=True)]
    torch.testing.assert_close(output, torch.cat(of_each), rtol=0.02, atol=0.02)
    gradient = torch.randn(8, 16).bfloat16()
    (found,) = torch.autograd.grad(output, inputs, gradient)
    torch.testing.assert_close(
        found, torch.autograd.grad(torch.cat(of_each), inputs, gradient)[0], rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_with_a_value_that_is_no_number_is_noticed(bad):
    """Of a packed matrix nothing but the scales shows it."""
    from slipway.training import cpu

    cpu.enable()
    from slipway.training.callbacks import first_not_finite

    layer = torch.nn.Linear(128, 8, bias=False)
    packed = Packed(layer, ["weight"])
    assert first_not_finite(layer) == ""
    values = torch.randn(8, 128)
    values[5, 70] = bad
    packed.fill(layer.weight, values)
    assert first_not_finite(layer) == "weight"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--mode=sft"], "is for adapters on a frozen base"),
        (["--mode=heads"], "is for adapters on a frozen base"),
        (["--mode=lora", "--precision=fp8"], "does not go with --base-precision nf4, which is unpacked to BF16"),
        (["--mode=lora", "--dora=true"], "keeps no matrix whose rows --dora could measure"),
        (["--mode=lora", "--base-precision=nf5"], "nf5"),
    ],
)
def test_what_it_is_not_for_is_refused(nemo_model, tmp_path, capsys, flags, said):
    write_data(tmp_path)
    words = ["train", f"--model={nemo_model}", f"--data={tmp_path / 'data.jsonl'}", f"--out={tmp_path / 'run'}"]
    assert cli.main([*words, "--seq-length=32", "--steps=2", "--base-precision=nf4", *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
