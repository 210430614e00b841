"""Transformer Engine on the GPU beside torch, forward and backward: a line for each. Ends with 1 if one differs."""

from __future__ import annotations

import contextlib
import sys

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
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


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def with_gradients(output: Tensor, *of: Tensor) -> list[Tensor]:
    weights = torch.randn(output.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), of)]


def linear(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    layer, x = te.Linear(512, 768, params_dtype=torch.bfloat16).cuda(), inputs(256, 512)
    with in_precision(precision):
        ours = with_gradients(layer(x), x, layer.weight)
    return ours, with_gradients(functional.linear(x, layer.weight, layer.bias), x, layer.weight)


def norm_and_mlp(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    layer = te.LayerNormMLP(512, 1024, activation="swiglu", normalization="RMSNorm", params_dtype=torch.bfloat16).cuda()
    x = inputs(256, 512)
    with in_precision(precision):
        ours = with_gradients(layer(x), x, layer.fc2_weight)
    normed = functional.rms_norm(x, (512,), layer.layer_norm_weight, layer.eps)
    gate, up = functional.linear(normed, layer.fc1_weight, layer.fc1_bias).chunk(2, -1)
    plain = functional.linear(functional.silu(gate) * up, layer.fc2_weight, layer.fc2_bias)
    return ours, with_gradients(plain, x, layer.fc2_weight)


def grouped(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    layer, x = te.GroupedLinear(4, 512, 256, bias=False, params_dtype=torch.bfloat16).cuda(), inputs(256, 512)
    sizes = [64, 32, 128, 32]
    with in_precision(precision):
        ours = with_gradients(layer(x, sizes), x, layer.weight2)
    weights = [getattr(layer, f"weight{number}") for number in range(4)]
    plain = torch.cat([part @ weight.t() for part, weight in zip(x.split(sizes), weights, strict=True)])
    return ours, with_gradients(plain, x, layer.weight2)


def attention(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = inputs(256, 2, 8, 64), inputs(256, 2, 4, 64), inputs(256, 2, 4, 64)
    core = te.DotProductAttention(8, 64, num_gqa_groups=4, qkv_format="sbhd", attn_mask_type="causal")
    ours = with_gradients(core(q, k, v), q, k, v)
    turned = [one.permute(1, 2, 0, 3) for one in (q, k, v)]
    plain = functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
    return ours, with_gradients(plain.permute(2, 0, 1, 3).reshape(256, 2, 512), q, k, v)


def adam(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    def trained(optimizer_of) -> list[Tensor]:
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(n, device="cuda")) for n in (7, 4096, 100_001)]
        optimizer = optimizer_of(parameters, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    return trained(FusedAdam), trained(torch.optim.AdamW)


CHECKS = [(check, precision) for check in (linear, norm_and_mlp, grouped) for precision in BOUND]
CHECKS += [(attention, "bf16"), (adam, "bf16")]


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, as a share of the norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def main() -> int:
    failed = 0
    for check, precision in CHECKS:
        torch.manual_seed(0)
        try:
            ours, torchs = check(precision)
            largest = max(apart(one, other) for one, other in zip(ours, torchs, strict=True))
            said, right = f"{largest:.1e} of the norm apart", largest < BOUND[precision]
            if precision != "bf16" and largest < BOUND["bf16"]:  # nothing was rounded to FP8
                said, right = f"{said}, which is less than FP8 rounds", False
        except Exception as error:  # the others are still worth knowing
            said, right = f"{type(error).__name__}: {error}", False
        failed += not right
        print(f"{'ok  ' if right else 'FAIL'} {check.__name__}, {precision}: {said}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
