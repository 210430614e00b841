"""Apex's extensions on the GPU beside torch, forward and backward: a line for each. Ends with 1 if one differs."""

from __future__ import annotations

import sys

import torch
from beside_torch import Both, after_three_steps, inputs, run, with_gradients
from torch import Tensor
from torch.nn import functional

BOUND = 1e-2  # of the norm: rounding of BF16


def adam() -> Both:
    """amp_C."""
    from apex.optimizers import FusedAdam

    return after_three_steps(FusedAdam), after_three_steps(torch.optim.AdamW)


def flatten() -> Both:
    """apex_C: tensors into one and back."""
    import apex_C

    parts = [torch.randn(3, 5, device="cuda"), torch.randn(11, device="cuda")]
    flat = apex_C.flatten(parts)
    return [flat, *apex_C.unflatten(flat, parts)], [torch.cat([part.flatten() for part in parts]), *parts]


def layer_norm() -> Both:
    from apex.normalization import FusedLayerNorm

    x, layer = inputs(512, 4096), FusedLayerNorm(4096).cuda().bfloat16()
    ours = with_gradients(layer(x), x, layer.weight, layer.bias)
    plain = functional.layer_norm(x, (4096,), layer.weight, layer.bias, layer.eps)
    return ours, with_gradients(plain, x, layer.weight, layer.bias)


def rms_norm() -> Both:
    from apex.normalization import FusedRMSNorm

    x, layer = inputs(512, 4096), FusedRMSNorm(4096).cuda().bfloat16()
    ours = with_gradients(layer(x), x, layer.weight)
    return ours, with_gradients(functional.rms_norm(x, (4096,), layer.weight, layer.eps), x, layer.weight)


def fused_dense() -> Both:
    from apex.fused_dense import FusedDense

    layer, x = FusedDense(256, 384).cuda().bfloat16(), inputs(64, 256)
    ours = with_gradients(layer(x), x, layer.weight, layer.bias)
    return ours, with_gradients(functional.linear(x, layer.weight, layer.bias), x, layer.weight, layer.bias)


def mlp() -> Both:
    """With sigmoids: at the kink of ReLU rounding decides which gradients are 0."""
    from apex.mlp import MLP

    layer, x = MLP([256, 512, 128], bias=True, activation="sigmoid").cuda().half(), inputs(64, 256, dtype=torch.half)
    plain = x
    for weight, bias in zip(layer.weights, layer.biases, strict=True):
        plain = functional.linear(plain, weight, bias).sigmoid()
    return with_gradients(layer(x), x, *layer.weights), with_gradients(plain, x, *layer.weights)


def rotary_positions() -> Both:
    from apex.transformer.functional.fused_rope import fused_apply_rotary_pos_emb

    x, angles = inputs(128, 2, 4, 64), torch.rand(128, 1, 1, 32, device="cuda").repeat(1, 1, 1, 2)
    turned = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
    plain = (x * angles.cos() + turned * angles.sin()).to(x.dtype)
    return with_gradients(fused_apply_rotary_pos_emb(x, angles), x), with_gradients(plain, x)


def weight_gradient() -> Both:
    """Added to what is there in float32, which is what Megatron's gradient_accumulation_fusion takes it for."""
    import fused_weight_gradient_mlp_cuda as extension

    x, gradient, sums = inputs(512, 256).detach(), inputs(512, 384).detach(), torch.ones(384, 256, device="cuda")
    plain = sums + gradient.float().t() @ x.float()
    extension.wgrad_gemm_accum_fp32(x, gradient, sums)
    return [sums], [plain]


def causal_softmax() -> Both:
    from apex.transformer.functional.fused_softmax import ScaledUpperTriangMaskedSoftmax

    x = inputs(8, 128, 128)
    hidden = torch.ones(128, 128, device="cuda", dtype=torch.bool).triu(1)
    plain = (x.float() * 0.5).masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
    return with_gradients(ScaledUpperTriangMaskedSoftmax.apply(x, 0.5), x), with_gradients(plain, x)


def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """(what is hidden, the softmax of half of the rest)."""
    hidden = torch.rand(2, 1, 64, 128, device="cuda") < 0.3
    return hidden, (x.float() * 0.5).masked_fill(hidden, -10000.0).softmax(-1).to(x.dtype)


def masked_softmax() -> Both:
    from apex.transformer.functional.fused_softmax import ScaledMaskedSoftmax

    x = inputs(2, 4, 64, 128)
    hidden, plain = masked(x)
    return with_gradients(ScaledMaskedSoftmax.apply(x, hidden, 0.5), x), with_gradients(plain, x)


def generic_masked_softmax() -> Both:
    """Called directly: Apex's own function for it forgets to import it in its backward pass."""
    import generic_scaled_masked_softmax_cuda as extension

    x = inputs(2, 4, 64, 128)
    hidden, plain = masked(x)
    ours, gradient = extension.forward(x.detach(), hidden, 0.5), torch.randn_like(x)
    expected = torch.autograd.grad(plain, x, gradient)[0]
    result = ours.clone()  # the gradient is written over what it is computed from
    return [result, extension.backward(gradient.detach().clone(), ours, 0.5)], [plain, expected]


def plain_softmax() -> Both:
    from apex.transformer.functional.fused_softmax import ScaledSoftmax

    x = inputs(2, 4, 64, 128)
    plain = (x.float() * 0.5).softmax(-1).to(x.dtype)
    return with_gradients(ScaledSoftmax.apply(x, 0.5), x), with_gradients(plain, x)


def batch_norm_sums() -> Both:
    import syncbn

    x = inputs(16, 8, 12, 12, dtype=torch.float32).detach()
    return list(syncbn.welford_mean_var(x)), [x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)]


CHECKS = {
    "amp_C": adam,
    "apex_C": flatten,
    "fused_layer_norm_cuda": layer_norm,
    "fused_layer_norm_cuda, RMS": rms_norm,
    "fused_dense_cuda": fused_dense,
    "mlp_cuda": mlp,
    "fused_rotary_positional_embedding": rotary_positions,
    "fused_weight_gradient_mlp_cuda": weight_gradient,
    "scaled_upper_triang_masked_softmax_cuda": causal_softmax,
    "scaled_masked_softmax_cuda": masked_softmax,
    "generic_scaled_masked_softmax_cuda": generic_masked_softmax,
    "scaled_softmax_cuda": plain_softmax,
    "syncbn": batch_norm_sums,
}


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    sys.exit(run((name, check, 0, BOUND) for name, check in CHECKS.items()))
