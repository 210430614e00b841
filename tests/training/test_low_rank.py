"""What an adapter adds in place, and what it keeps, against NeMo's own way: in its own process, which changes NeMo."""

from __future__ import annotations

import os
import subprocess
import sys

LAYER = """
import torch
from slipway.training import cpu
cpu.enable()
from megatron.core.transformer import mlp
from nemo.collections.llm.peft import lora
from slipway.training import activations, low_rank
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

class Base(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
    def forward(self, x):  # as Transformer Engine's layers: a view of two dimensions
        return (x.reshape(-1, x.shape[-1]) @ self.weight.T).view(*x.shape[:-1], len(self.weight)), None

class Normed(Base):
    return_layernorm_output = True
    def forward(self, x):  # a layer with a norm in front, which the adapter needs too
        x = nn.functional.rms_norm(x, x.shape[-1:])
        return (super().forward(x)[0], x), None

class Adapter(nn.Module):
    def __init__(self, inputs, outputs, dropout):
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(inputs, 3, bias=False), nn.Linear(3, outputs, bias=False)
        self.alpha, self.dim, self.activation, self.dropout = 6.0, 3, nn.Identity(), dropout
        self.config = type("Config", (), {"tensor_model_parallel_size": 1})
    def forward(self, x):
        x = self.linear_out(self.linear_in(x))
        return (self.dropout(x) if self.dropout else x) * (self.alpha / self.dim)

def adapted(inputs, outputs, dropout=None, base=Base):
    torch.manual_seed(1)
    return lora.LoRALinear(base(inputs, outputs), Adapter(inputs, outputs, dropout))

def results(forward, layer, x, activation=lambda x: x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y, _ = forward(layer, activation(x * 1))
    return [y, *torch.autograd.grad((y * torch.arange(y.shape[-1])).sum(), [x, *layer.adapter.parameters()])]

theirs, swiglu = lora.LoRALinear.forward, mlp.bias_swiglu_impl
low_rank.add_in_place()
activations.bring_activations()
ours = lora.LoRALinear.forward
assert ours is not theirs and mlp.bias_swiglu_impl is not swiglu
"""

IN_PLACE = """
for dropout in (None, nn.Dropout(0.5)):
    for base in (Base, Normed):
        layer, x = adapted(8, 12, dropout, base), torch.randn(4, 2, 8)
        for one, other in zip(results(theirs, layer, x), results(ours, layer, x), strict=True):
            torch.testing.assert_close(one, other)
plain = adapted(8, 12)
used = []
plain.adapter.forward = lambda x: used.append(x)
plain(torch.randn(4, 2, 8))
assert not used, "the adapter was called, so nothing was added in place"

seen = []
plain.to_wrap.register_forward_hook(lambda _, given, __: seen.append(given[0].requires_grad))
plain(torch.randn(4, 2, 8))[0].sum().backward()
plain(torch.randn(4, 2, 8, requires_grad=True))[0].sum().backward()
assert seen == [False, True], "a layer computes a gradient of inputs that have none"

class Noting(torch.autograd.Function):
    def forward(ctx, x):
        return x.clone()
    def backward(ctx, gradient):
        made.append(gradient.data_ptr())
        return gradient
made, x = [], torch.randn(4, 2, 8, requires_grad=True)
after = x * 1
after.register_hook(lambda gradient: made.append(gradient.data_ptr()))
plain.to_wrap.register_forward_pre_hook(lambda _, given: (Noting.apply(given[0]),))
plain(after)[0].sum().backward()
assert made[0] == made[1], "the adapter's gradient was not added where the layer's lies"
"""

KERNEL = """
import torch
from slipway.training.low_rank_gpu import LEAST_ROWS, add_product_, product_with_peaks
torch.manual_seed(0)
# Triton's interpreter has no products in bfloat16.
for tokens, rank, columns, dtype, bound in (
    (70, 5, 300, torch.float32, 1e-5),
    (64, 32, 256, torch.float16, 2e-3),
    (0, 8, 16, torch.float32, 0),
):
    sizes = (tokens, columns), (tokens, rank), (columns, rank)
    output, low, weight = (torch.randn(size, dtype=dtype) for size in sizes)
    wanted = output.double() + 0.5 * low.double() @ weight.double().t()
    add_product_(output, low, weight, 0.5)
    torch.testing.assert_close(output.double(), wanted, atol=bound, rtol=bound)
for rows, rank, columns, dtype, bound in (
    (LEAST_ROWS + 5, 3, 300, torch.float32, 1e-4),
    (LEAST_ROWS, 32, 128, torch.float16, 5e-2),
):
    output, weight = torch.randn(rows, columns, dtype=dtype), torch.randn(columns, rank, dtype=dtype)
    product, peaks = product_with_peaks(output, weight, 0.5)
    torch.testing.assert_close(product.double(), 0.5 * output.double() @ weight.double(), atol=bound, rtol=bound)
    assert peaks.max() == output.abs().max() and (peaks > 0).all()
print("equal")
"""

MADE_AGAIN = """
torch.compiler.set_stance("force_eager")  # Megatron's activation as it is written
layer, x = adapted(64, 8), torch.randn(16, 2, 128)
plain = results(theirs, layer, x, lambda x: swiglu(x, None))
for one, other in zip(plain, results(ours, layer, x, lambda x: mlp.bias_swiglu_impl(x, None)), strict=True):
    torch.testing.assert_close(one, other)

def is_kept(*options):
    made = mlp.bias_swiglu_impl(x.clone().requires_grad_() * 1, None, *options)
    output, _ = layer(made)
    memory = StorageWeakRef(made.untyped_storage())
    del made
    return not memory.expired()

assert not is_kept()
assert is_kept(True), "inputs stored in FP8 do not give the same output again"
"""

NOTED = """
import torch
from slipway.training.quantised import Peaks
gradient = torch.randn(4, 4)
assert Peaks.of(gradient) is None
Peaks.note(gradient, gradient.abs().max()[None])
assert Peaks.of(gradient) == gradient.abs().max()
seen = []
class Last(torch.autograd.Function):
    def forward(ctx, x):
        return x.clone()
    def backward(ctx, gradient):
        seen.append(Peaks.of(gradient))
        return gradient
class Next(Last):
    def backward(ctx, gradient):
        Peaks.note(gradient, gradient.abs().max()[None])
        return gradient
x = torch.randn(3, requires_grad=True)
(Next.apply(Last.apply(x)) * torch.tensor([1.0, -7.0, 2.0])).sum().backward()
assert seen[-1] == 7, "torch hands on another object"
last = Last.apply(x)
(Next.apply(last) * 2 + last * 3).sum().backward()
assert seen[-1] is None or seen[-1] == 5, "what was noted before a gradient was added is believed"
gradient += 1
assert Peaks.of(gradient) is None, "what was noted before a change is believed"
"""


def test_a_gradients_largest_values_are_known_until_it_changes():
    done = subprocess.run([sys.executable, "-c", NOTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_activations_output_is_made_again_and_not_kept(warm, tmp_path):
    code, printed = warm.python(["-c", LAYER + MADE_AGAIN], tmp_path / "output")
    assert code == 0, printed


def test_outputs_and_gradients_are_those_of_nemos_adapters(warm, tmp_path):
    code, printed = warm.python(["-c", LAYER + IN_PLACE], tmp_path / "output")
    assert code == 0, printed


def test_the_gpus_kernel_adds_the_same_product():
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
