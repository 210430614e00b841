"""Experts' activations as kernels for a GPU against Megatron's own: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

KERNEL = """
import torch
from slipway.training.imports import compile_nothing
compile_nothing()
torch.compiler.set_stance("force_eager")  # Megatron's activations as they are written
from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from slipway.training.activations import QUICK_GELU, SILU
from slipway.training.activations_gpu import Gate, gated, gradients

def megatrons(inputs, weights, gate):
    if gate.steepness == SILU:
        return weighted_bias_swiglu_impl(inputs, None, weights)
    return weighted_bias_quick_geglu_impl(inputs, None, weights, False, gate.offset, gate.limit)

torch.manual_seed(0)
for gate in (Gate(SILU), Gate(QUICK_GELU, 1.0, 1.5), Gate(QUICK_GELU, 0.5)):
    for rows, width, dtype, bound in (
        (5, 24, torch.float32, 1e-5),
        (3, 1500, torch.float32, 1e-5),  # wider than what a program has at once
        (4, 768, torch.bfloat16, 1e-2),
        (0, 16, torch.float32, 0),
    ):
        inputs = (2 * torch.randn(rows, 2 * width, dtype=dtype)).requires_grad_()
        weights = torch.rand(rows, 1).requires_grad_()
        wanted = megatrons(inputs.double() if dtype == torch.float32 else inputs, weights, gate)
        given = torch.randn(rows, width, dtype=dtype)
        of_wanted = torch.autograd.grad(wanted, [inputs, weights], given.to(wanted.dtype))
        found = gated(inputs.detach(), weights.detach(), gate)
        of_found = gradients(given, inputs.detach(), weights.detach(), gate)
        assert found.dtype == dtype and [one.dtype for one in of_found] == [dtype, torch.float32]
        for one, other in zip((found, *of_found), (wanted, *of_wanted), strict=True):
            torch.testing.assert_close(one.double(), other.double(), atol=bound * width**0.5, rtol=bound)
print("equal")
"""

WIRED = """
import torch
from slipway.training import cpu
cpu.enable()
torch.compiler.set_stance("force_eager")
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import experts
from slipway.training.activations import bring_activations
names = "weighted_bias_swiglu_impl", "weighted_bias_quick_geglu_impl"
theirs = {name: getattr(experts, name) for name in names}
bring_activations()
inputs, weights = torch.randn(4, 16), torch.rand(4, 1)
for module in (mlp, experts):
    for name, options in zip(names, ((), (0.5, 0.3)), strict=True):
        ours = getattr(module, name)
        assert ours is not theirs[name]
        output = ours(inputs, None, weights, False, *options)
        assert output.equal(theirs[name](inputs, None, weights, False, *options)) and output.made_by().equal(output)
        stored = ours(inputs, None, weights, True, *options)
        assert not hasattr(stored, "made_by"), "inputs stored in FP8 do not give the same output again"
print("equal")
"""


def test_the_gpus_kernels_give_megatrons_outputs_and_gradients():
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr


def test_megatrons_experts_call_them(warm, tmp_path):
    code, printed = warm.python(["-c", WIRED], tmp_path / "output")
    assert code == 0 and "equal" in printed, printed


CHOSEN = """
from slipway.training import cpu
cpu.enable()
from megatron.core.activations import quick_gelu
from megatron.core.fusions import fused_bias_geglu
from nemo.collections.llm.gpt.model.gpt_oss import GPTOSSConfig20B
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config30B_A3B
from slipway.training.activations import activate_in_one_kernel

def chosen(kind, **changes):
    config = kind(bias_activation_fusion=False, moe_permute_fusion=False)
    for name, value in changes.items():
        setattr(config, name, value)
    activate_in_one_kernel(config)
    return config.bias_activation_fusion, config.activation_func

sinks, qwen3 = GPTOSSConfig20B, Qwen3Config30B_A3B
assert quick_gelu is not fused_bias_geglu.quick_gelu, "upstream"
assert chosen(sinks) == (True, fused_bias_geglu.quick_gelu)
assert chosen(qwen3)[0]
assert not chosen(qwen3, activation_func_clamp_value=7.0)[0], "silu has no kernel with a limit"
assert not chosen(qwen3, gated_linear_unit=False)[0]
assert not chosen(sinks, moe_grouped_gemm=False)[0], "a limit would come before the bias"
assert not chosen(sinks, moe_layer_freq=[0, *[1] * 23])[0] and not chosen(sinks, num_moe_experts=None)[0]
print("equal")
"""


def test_a_kernel_is_chosen_where_it_computes_the_same(warm, tmp_path):
    code, printed = warm.python(["-c", CHOSEN], tmp_path / "output")
    assert code == 0 and "equal" in printed, printed
