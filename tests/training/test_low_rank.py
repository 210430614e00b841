"""What an adapter adds in place, against NeMo's own way, in a process of its own: NeMo is changed once for all."""

from __future__ import annotations

CHECK = """
import torch
from slipway.training import cpu
cpu.enable()
from nemo.collections.llm.peft import lora
from slipway.training import low_rank
from torch import nn

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8), requires_grad=False)
    def forward(self, x):  # as Transformer Engine's layers: a view of two dimensions
        return (x.reshape(-1, 8) @ self.weight.T).view(*x.shape[:-1], 12), None

class Adapter(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(8, 3, bias=False), nn.Linear(3, 12, bias=False)
        self.alpha, self.dim, self.activation, self.dropout = 6.0, 3, nn.Identity(), dropout
        self.config = type("Config", (), {"tensor_model_parallel_size": 1})
    def forward(self, x):
        x = self.linear_out(self.linear_in(x))
        return (self.dropout(x) if self.dropout else x) * (self.alpha / self.dim)

def results(forward, layer, x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y, bias = forward(layer, x)
    return [y, *torch.autograd.grad((y * torch.arange(12.0)).sum(), [x, *layer.adapter.parameters()])]

theirs = lora.LoRALinear.forward
low_rank.add_in_place()
assert lora.LoRALinear.forward is not theirs
for dropout in (None, nn.Dropout(0.5)):
    torch.manual_seed(1)
    layer, x = lora.LoRALinear(Base(), Adapter(dropout)), torch.randn(4, 2, 8)
    for one, other in zip(results(theirs, layer, x), results(lora.LoRALinear.forward, layer, x), strict=True):
        torch.testing.assert_close(one, other)
plain = lora.LoRALinear(Base(), Adapter(None))
used = []
plain.adapter.forward = lambda x: used.append(x)
plain(torch.randn(4, 2, 8))
assert not used, "the adapter was called, so nothing was added in place"
"""

AGAIN = """
import os
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's activation as it is written
import torch
from slipway.training import cpu
cpu.enable()
from megatron.core.transformer import mlp
from nemo.collections.llm.peft import lora
from slipway.training import low_rank
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

theirs, plain = lora.LoRALinear.forward, mlp.bias_swiglu_impl
low_rank.add_in_place()
low_rank.make_activations_again()

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 64), requires_grad=False)
    def forward(self, x):
        return x @ self.weight.T, None

class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(64, 3, bias=False), nn.Linear(3, 8, bias=False)
        self.alpha, self.dim, self.activation, self.dropout = 6.0, 3, nn.Identity(), None
        self.config = type("Config", (), {"tensor_model_parallel_size": 1})
    def forward(self, x):
        return self.linear_out(self.linear_in(x)) * (self.alpha / self.dim)

torch.manual_seed(1)
layer, x = lora.LoRALinear(Base(), Adapter()), torch.randn(16, 2, 128)

def results(activation, forward):
    inputs = x.clone().requires_grad_()
    y, _ = forward(layer, activation(inputs * 1, None))
    return [y, *torch.autograd.grad((y * torch.arange(8.0)).sum(), [inputs, *layer.adapter.parameters()])]

def is_kept(*options):
    made = mlp.bias_swiglu_impl(x.clone().requires_grad_() * 1, None, *options)
    output, _ = layer(made)
    memory = StorageWeakRef(made.untyped_storage())
    del made
    return not memory.expired()

for one, other in zip(results(plain, theirs), results(mlp.bias_swiglu_impl, lora.LoRALinear.forward), strict=True):
    torch.testing.assert_close(one, other)
assert not is_kept()
assert is_kept(True), "inputs stored in FP8 do not give the same output again"
"""


def test_an_activations_output_is_made_again_and_not_kept(warm, tmp_path):
    code, printed = warm.python(["-c", AGAIN], tmp_path / "output")
    assert code == 0, printed


def test_outputs_and_gradients_are_those_of_nemos_adapters(warm, tmp_path):
    code, printed = warm.python(["-c", CHECK], tmp_path / "output")
    assert code == 0, printed
