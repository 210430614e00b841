"""Adapters on frozen layers on the GPU beside torch, forward and backward. Ends with 1 if one differs."""

from __future__ import annotations

import contextlib
import functools
import sys
from types import SimpleNamespace
from typing import Any

import torch
import transformer_engine.pytorch as te
from beside_torch import Both, inputs, run, with_gradients
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.mlp import MLP
from nemo.collections.llm.peft.lora import LoRALinear
from slipway.training import low_rank, low_rank_gpu
from slipway.training.activations import QUICK_GELU, SILU, _Gated, _SwiGLU
from slipway.training.activations_gpu import Gate
from slipway.training.adapted_activation import activate_between_adapters
from slipway.training.parting import Parted
from slipway.training.parting_gpu import Heads
from slipway.training.quantised import Peaks, quantise_once
from slipway.training.rotary import Turned, turns_of
from torch import nn
from torch.nn import functional
from transformer_engine.common.recipe import Float8CurrentScaling

BOUND = {"bf16": 0.01, "fp8": 0.1}
TOKENS, RANK = low_rank_gpu.LEAST_ROWS + 16, 24

low_rank.add_in_place()
activate_between_adapters()
quantise_once()


class Adapter(nn.Module):
    """NeMo's, less what the CPU's tests cover."""

    def __init__(self, inputs_: int, outputs: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(inputs_, RANK, bias=False, dtype=torch.bfloat16, device="cuda")
        self.linear_out = nn.Linear(RANK, outputs, bias=False, dtype=torch.bfloat16, device="cuda")
        self.alpha, self.dim, self.activation, self.dropout = 2.0 * RANK, RANK, nn.Identity(), None
        self.config = SimpleNamespace(tensor_model_parallel_size=1)


class Frozen(nn.Module):
    """A layer of Transformer Engine's that gives its outputs as Megatron's do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.return_layernorm_output = isinstance(layer, te.LayerNormLinear)

    @property
    def fp8(self) -> bool:
        return self.layer.fp8

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), None


def adapted(kind: Any, width: int = 512, outputs: int = 768) -> LoRALinear:
    options = {"return_layernorm_output": True, "normalization": "RMSNorm"} if kind is te.LayerNormLinear else {}
    layer = kind(width, outputs, bias=False, params_dtype=torch.bfloat16, **options).cuda()
    return LoRALinear(Frozen(layer), Adapter(width, outputs))


def plain_of(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """What a layer and its adapter compute, by torch."""
    base, first, second = layer.to_wrap.layer, layer.adapter.linear_in, layer.adapter.linear_out
    if isinstance(base, te.LayerNormLinear):
        x = functional.rms_norm(x, x.shape[-1:], base.layer_norm_weight, base.eps)
    return functional.linear(x, base.weight) + 2.0 * second(first(x))


def in_precision(precision: str) -> contextlib.AbstractContextManager:
    if precision == "bf16":
        return contextlib.nullcontext()
    return te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling())


def results(layer: LoRALinear, x: torch.Tensor, precision: str) -> list[torch.Tensor]:
    with in_precision(precision):
        return with_gradients(layer(x)[0], x, *layer.adapter.parameters())


def adapter(kind: Any, precision: str) -> Both:
    layer, x = adapted(kind), inputs(TOKENS, 512)
    ours = results(layer, x, precision)
    return ours, with_gradients(plain_of(layer, x), x, *layer.adapter.parameters())


def read_once(kind: Any, precision: str) -> Both:
    """With the largest value that the adapter has found, and with Transformer Engine's own: to the last bit."""
    layer, x = adapted(kind), inputs(TOKENS, 512)
    known, of = [], Peaks.of
    Peaks.of = lambda tensor: known.append(of(tensor)) or known[-1]
    ours = results(layer, x, precision)
    assert sum(peaks is not None for peaks in known) == 1, "the adapter's largest value was not used"
    Peaks.of = lambda tensor: None
    theirs = results(layer, x, precision)
    Peaks.of = of
    return ours, theirs


def block(precision: str) -> Both:
    """Two layers with adapters and the activation between them."""
    made = MLP.__new__(MLP)
    nn.Module.__init__(made)
    made.config = SimpleNamespace(
        gated_linear_unit=True,
        activation_func=functional.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        use_te_activation_func=False,
        activation_func_fp8_input_store=False,
        cpu_offloading=False,
    )
    first, second = adapted(te.LayerNormLinear, 512, 2 * 384), adapted(te.Linear, 384, 512)
    made.linear_fc1, made.linear_fc2 = first, second
    x = inputs(TOKENS, 512)
    weights = [*first.adapter.parameters(), *second.adapter.parameters()]
    known, of = [], Peaks.of
    Peaks.of = lambda tensor: known.append(of(tensor)) or known[-1]
    with in_precision(precision):
        ours = with_gradients(made(x)[0], x, *weights)
    Peaks.of = of
    count = sum(peaks is not None for peaks in known)
    assert count == (3 if precision == "fp8" else 0), f"{count} largest values were used"
    hidden = plain_of(first, x)
    gate, up = hidden.chunk(2, -1)
    return ours, with_gradients(plain_of(second, functional.silu(gate) * up), x, *weights)


def activation() -> Both:
    x = inputs(TOKENS, 1024)
    gate, up = x.chunk(2, -1)
    return with_gradients(_SwiGLU.apply(x), x), with_gradients(functional.silu(gate) * up, x)


def of_experts(gate: Gate) -> Both:
    x, weights = inputs(TOKENS, 2 * 1500), torch.rand(TOKENS, 1, device="cuda").requires_grad_()
    first, second = x.float().chunk(2, -1)
    if gate.limit:
        first, second = first.clamp(max=gate.limit), second.clamp(-gate.limit, gate.limit)
    plain = weights * first * torch.sigmoid(gate.steepness * first) * (second + gate.offset)
    return with_gradients(_Gated.apply(x, weights, gate), x, weights), with_gradients(plain, x, weights)


def turned() -> Both:
    """Against Megatron's own, in float32 up to the last of 4,096 positions."""
    x = inputs(4096, 1, 4, 64, dtype=torch.float32)
    angles = torch.arange(4096.0, device="cuda")[:, None] * torch.rand(32, device="cuda")
    angles = torch.cat([angles, angles], -1)[:, None, None]
    plain = rope_utils._apply_rotary_pos_emb_bshd(x, angles, mscale=1.3)
    return with_gradients(Turned.apply(x, angles, None, 1.3, False, (0, 1)), x), with_gradients(plain, x)


def parted(packed: bool, normed: bool) -> Both:
    """Queries, keys and values out of one tensor; without norms to the last bit as by the kernel for two of them."""
    x = inputs(4096, 1 if packed else 2, 4 * 6 * 64)
    angles = torch.arange(4096.0, device="cuda")[:, None] * torch.rand(32, device="cuda")
    angles = torch.cat([angles, angles], -1)[:, None, None]
    bounds = torch.tensor([0, 1000, 1003, 4096], dtype=torch.int32, device="cuda") if packed else None
    norms = (torch.rand(64, device="cuda").bfloat16(), torch.rand(64, device="cuda").bfloat16()) if normed else None
    query, key, value = x.view(*x.shape[:2], 4, 6 * 64).split([4 * 64, 64, 64], -1)
    parts = []
    for number, part in enumerate((query.reshape(*x.shape[:2], 16, 64), key)):
        part = functional.rms_norm(part, (64,), norms[number], 1e-6) if norms else part
        part = part.squeeze(1) if packed else part
        parts.append(Turned.apply(part, angles, bounds, 1.3, False, (0, 1)).view(*x.shape[:2], -1, 64))
    ours = Parted.apply(x, Heads(4, 64, turns_of(angles), bounds, 1.3, (0, 1), norms, 1e-6))
    return with_gradients(torch.cat(ours, 2), x), with_gradients(torch.cat([*parts, value], 2), x)


KINDS = (te.Linear, te.LayerNormLinear)
CHECKS = [
    *(
        (f"{kind.__name__}, {precision}", functools.partial(adapter, kind, precision), 0, bound)
        for kind in KINDS
        for precision, bound in BOUND.items()
    ),
    *((f"{kind.__name__}, read once", functools.partial(read_once, kind, "fp8"), 0, 1e-12) for kind in KINDS),
    *((f"block, {precision}", functools.partial(block, precision), 0, bound) for precision, bound in BOUND.items()),
    ("swiglu", activation, 0, BOUND["bf16"]),
    ("swiglu of experts", functools.partial(of_experts, Gate(SILU)), 0, BOUND["bf16"]),
    ("rotary positions", turned, 0, 1e-6),
    *(
        (f"parted{', packed' * packed}{', normed' * normed}", functools.partial(parted, packed, normed), 0, bound)
        for packed in (False, True)
        for normed, bound in ((False, 1e-12), (True, BOUND["bf16"]))
    ),
    ("geglu of experts", functools.partial(of_experts, Gate(QUICK_GELU, 1.0, 1.5)), 0, BOUND["bf16"]),
]


if __name__ == "__main__":
    sys.exit(run(CHECKS))
