"""Transformer Engine on the GPU beside torch, forward and backward: a line for each. Ends with 1 if one differs."""

from __future__ import annotations

import contextlib
import functools
import sys

import torch
import transformer_engine.pytorch as te
from beside_torch import Both, after_three_steps, inputs, run, with_gradients
from torch.nn import functional
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling
from transformer_engine.pytorch.optimizers import FusedAdam

# Of the norm. FP8 has three bits of mantissa, gradients two: 2 to 5 % for one product.
BOUND = {"bf16": 0.01, "fp8, current scaling": 0.1, "fp8, delayed scaling": 0.1}
RECIPES = {"fp8, current scaling": Float8CurrentScaling, "fp8, delayed scaling": DelayedScaling}


def in_precision(precision: str) -> contextlib.AbstractContextManager:
    if precision == "bf16":
        return contextlib.nullcontext()
    return te.fp8_autocast(enabled=True, fp8_recipe=RECIPES[precision]())


def linear(precision: str) -> Both:
    layer, x = te.Linear(512, 768, params_dtype=torch.bfloat16).cuda(), inputs(256, 512)
    with in_precision(precision):
        ours = with_gradients(layer(x), x, layer.weight)
    return ours, with_gradients(functional.linear(x, layer.weight, layer.bias), x, layer.weight)


def norm_and_mlp(precision: str) -> Both:
    layer = te.LayerNormMLP(512, 1024, activation="swiglu", normalization="RMSNorm", params_dtype=torch.bfloat16).cuda()
    x = inputs(256, 512)
    with in_precision(precision):
        ours = with_gradients(layer(x), x, layer.fc2_weight)
    normed = functional.rms_norm(x, (512,), layer.layer_norm_weight, layer.eps)
    gate, up = functional.linear(normed, layer.fc1_weight, layer.fc1_bias).chunk(2, -1)
    plain = functional.linear(functional.silu(gate) * up, layer.fc2_weight, layer.fc2_bias)
    return ours, with_gradients(plain, x, layer.fc2_weight)


def grouped(precision: str) -> Both:
    layer, x = te.GroupedLinear(4, 512, 256, bias=False, params_dtype=torch.bfloat16).cuda(), inputs(256, 512)
    sizes = [64, 32, 128, 32]
    with in_precision(precision):
        ours = with_gradients(layer(x, sizes), x, layer.weight2)
    weights = [getattr(layer, f"weight{number}") for number in range(4)]
    plain = torch.cat([part @ weight.t() for part, weight in zip(x.split(sizes), weights, strict=True)])
    return ours, with_gradients(plain, x, layer.weight2)


def attention(precision: str) -> Both:
    q, k, v = inputs(256, 2, 8, 64), inputs(256, 2, 4, 64), inputs(256, 2, 4, 64)
    core = te.DotProductAttention(8, 64, num_gqa_groups=4, qkv_format="sbhd", attn_mask_type="causal")
    ours = with_gradients(core(q, k, v), q, k, v)
    turned = [one.permute(1, 2, 0, 3) for one in (q, k, v)]
    plain = functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    return ours, with_gradients(plain.permute(2, 0, 1, 3).reshape(256, 2, 512), q, k, v)


def adam(precision: str) -> Both:
    return after_three_steps(FusedAdam), after_three_steps(torch.optim.AdamW)


CHECKS = [(check, precision) for check in (linear, norm_and_mlp, grouped) for precision in BOUND]
CHECKS += [(attention, "bf16"), (adam, "bf16")]


if __name__ == "__main__":
    # What is nearer than BF16 rounds was not computed in FP8.
    least = {precision: 0 if precision == "bf16" else BOUND["bf16"] for precision in BOUND}
    sys.exit(
        run(
            (f"{check.__name__}, {precision}", functools.partial(check, precision), least[precision], BOUND[precision])
            for check, precision in CHECKS
        )
    )
