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


def test_outputs_and_gradients_are_those_of_nemos_adapters(warm, tmp_path):
    code, printed = warm.python(["-c", CHECK], tmp_path / "output")
    assert code == 0, printed
