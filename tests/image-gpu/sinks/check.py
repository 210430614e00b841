"""Attention with sinks where two GPUs share packed samples, beside the same on one. Ends with 1 if they differ."""

from __future__ import annotations

import on_gpus
import torch
from slipway.training.samples import share_of_samples
from slipway.training.sinks import UNLIMITED, SinkAttention, attend_by_heads
from torch import Tensor, distributed

RANKS = 2
HEADS, GROUPS, SIZE = 64, 8, 64  # gpt-oss's
BOUNDS = (0, 4, 1028, 1032, 2048, 4096)
SCALE = 0.125
BOUND = 4e-3  # of the norm: the gradients of keys are added up in another order
NAMES = ("output", "query", "key", "value", "sinks")


def wrong_on(rank: int) -> int:
    return sum(differences(rank, window) for window in (UNLIMITED, 128))


def differences(rank: int, window: int) -> int:
    """How many of the results are not those of one GPU."""
    torch.manual_seed(7)
    tokens = BOUNDS[-1]
    shapes = [(tokens, HEADS, SIZE), *2 * [(tokens, GROUPS, SIZE)], (HEADS,), (tokens, HEADS, SIZE)]
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    bounds = torch.tensor(BOUNDS, device="cuda", dtype=torch.int32)
    mine = share_of_samples(bounds, RANKS, rank)
    longest = int(bounds.diff().max())
    *whole, of_sinks = learned(SinkAttention.apply, tensors, bounds, longest, SCALE, window)
    given = [one if one.dim() == 1 else one[mine] for one in tensors]
    *found, sinks = learned(attend_by_heads, given, bounds, longest, SCALE, window, group=distributed.group.WORLD)
    distributed.all_reduce(sinks)
    pairs = [*zip(found, (one[mine] for one in whole), strict=True), (sinks, of_sinks)]
    apart = [float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs]
    wrong = sum(not distance <= BOUND for distance in apart)
    said = ", ".join(f"{name} {distance:.1e}" for name, distance in zip(NAMES, apart, strict=True))
    print(f"{'WRONG' if wrong else 'ok'}   rank {rank}, window {window}: {said}", flush=True)
    return wrong


def learned(attend, tensors: list[Tensor], *more, **named) -> list[Tensor]:
    """The output, and the gradients of all but the last tensor, which is the output's."""
    *inputs, gradient = tensors
    given = [tensor.clone().requires_grad_() for tensor in inputs]
    out = attend(*given, *more, **named)
    return [out.detach(), *torch.autograd.grad(out, given, gradient)]


if __name__ == "__main__":
    on_gpus.check(wrong_on, RANKS)
