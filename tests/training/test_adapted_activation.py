"""The activation between two adapted layers: beside Megatron's block with NeMo's adapters, and as kernels for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from test_low_rank import LAYER

BLOCK = """
from types import SimpleNamespace
from slipway.training import adapted_activation
from torch.nn import functional
torch.compiler.set_stance("force_eager")  # Megatron's activation as it is written
whole = mlp.MLP.forward
adapted_activation.activate_between_adapters()
assert mlp.MLP.forward is not whole

PLAIN = dict(gated_linear_unit=True, activation_func=functional.silu, bias_activation_fusion=True,
             add_bias_linear=False, use_te_activation_func=False, activation_func_fp8_input_store=False,
             cpu_offloading=False, cpu_offloading_activations=False, glu_linear_offset=0.0,
             activation_func_clamp_value=None)

def block_of(base=Base, dropout=None, dims=(3, 3), **changed):
    block = mlp.MLP.__new__(mlp.MLP)
    nn.Module.__init__(block)
    block.config = SimpleNamespace(**{**PLAIN, **changed})
    block.activation_func = block.config.activation_func
    block.linear_fc1, block.linear_fc2 = adapted(8, 24, dropout, base), adapted(12, 8, dropout)
    block.linear_fc1.adapter.dim, block.linear_fc2.adapter.dim = dims
    return block

def of_block(forward, block, x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y, bias = forward(block, x * 1)
    assert bias is None
    weights = [*block.linear_fc1.adapter.parameters(), *block.linear_fc2.adapter.parameters()]
    return [y, *torch.autograd.grad((y * torch.arange(y.shape[-1])).sum(), [x, *weights])]

called = []
between = adapted_activation._Between
class Seen(between):
    @staticmethod
    def forward(ctx, *arguments):
        called.append(1)
        return between.forward(ctx, *arguments)
adapted_activation._Between = Seen
lora.LoRALinear.forward = theirs  # NeMo's adapters in the blocks that are not ours

def compare(ours_is_used, **options):
    called.clear()
    block, x = block_of(**options), torch.randn(4, 2, 8)
    for one, other in zip(of_block(whole, block, x), of_block(mlp.MLP.forward, block, x), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    assert bool(called) == ours_is_used, options

compare(True)
compare(True, base=Normed)
compare(False, dropout=nn.Dropout(0.5))
compare(False, dims=(3, 4))
compare(False, bias_activation_fusion=False)
compare(False, activation_func=functional.gelu, bias_activation_fusion=False)
block, x, called[:] = block_of(), torch.randn(4, 2, 8), []
block.linear_fc2 = block.linear_fc2.to_wrap
mlp.MLP.forward(block, x)
mlp.MLP.forward(block_of(), x, torch.ones(8))
assert not called

seen = []
block = block_of()
block.linear_fc2.to_wrap.register_forward_pre_hook(lambda _, given: seen.append(given[0].untyped_storage()._weak_ref()))
output, _ = mlp.MLP.forward(block, x.requires_grad_())
assert torch.UntypedStorage._expired(seen[0]), "the activation's output is kept"
"""

KERNELS = """
import torch
from torch.nn import functional
from slipway.training.adapted_activation_gpu import backward, forward
torch.manual_seed(0)
# Triton's interpreter has no products in bfloat16.
for tokens, rank, width, dtype, bound in (
    (70, 5, 150, torch.float32, 1e-6),
    (600, 16, 64, torch.float32, 1e-6),
    (130, 32, 128, torch.float16, 1e-3),
):
    sizes = (tokens, 2 * width), (tokens, rank), (2 * width, rank), (rank, width)
    base, low, before, after = (torch.randn(size, dtype=dtype) / 2 for size in sizes)
    output = torch.full((tokens, width), torch.nan, dtype=dtype)
    peaks = forward(base, low, before, 0.5, output, noted=True)
    exact = [one.double().requires_grad_() for one in (base, before, after)]
    gate, up = (exact[0] + 0.5 * low.double() @ exact[1].t()).chunk(2, -1)
    active = functional.silu(gate) * up
    assert (output - active).norm() < bound * active.norm() and peaks.max() == output.abs().max()
    given, of_low = torch.randn_like(output), torch.randn_like(low)
    wanted = torch.autograd.grad([active, active @ exact[2].t()], exact, [given.double(), of_low.double()])
    *found, peaks = backward(given, of_low, after, base, low, before, 0.5, noted=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < bound * other.norm()
    assert peaks.max() == found[0].abs().max()
print("equal")
"""


def test_outputs_and_gradients_are_those_of_megatrons_block(warm, tmp_path):
    code, printed = warm.python(["-c", LAYER + BLOCK], tmp_path / "output")
    assert code == 0, printed


def test_the_gpus_kernels_compute_the_same():
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
