"""What the checks of compiled extensions share: inputs on the GPU, gradients, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Both = tuple[list[Tensor], list[Tensor]]  # what the extension computes, and what torch does


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def with_gradients(output: Tensor, *of: Tensor) -> list[Tensor]:
    """The output, and the gradients of a sum of it that weighs every element differently."""
    weights = torch.randn(output.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), of)]


def after_three_steps(optimizer_of: Callable[..., Any]) -> list[Tensor]:
    """Parameters that an optimizer has trained."""
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(n, device="cuda")) for n in (7, 4096, 100_001)]
    optimizer = optimizer_of(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def run(checks: Iterable[tuple[str, Callable[[], Both], float, float]]) -> int:
    """Print a line for each check; returns 1 if one is not right.

    Args:
        checks: (name, check, least, most): the norm of the difference, as a share of the norm, must be between them.
    """
    failed = 0
    for name, check, least, most in checks:
        torch.manual_seed(0)
        try:
            largest = max(_apart(one, other) for one, other in zip(*check(), strict=True))
            said, right = f"{largest:.1e} of the norm apart", least <= largest < most
        except Exception as error:  # the others are still worth knowing
            said, right = f"{type(error).__name__}: {error}", False
        failed += not right
        print(f"{'ok  ' if right else 'FAIL'} {name}: {said}", flush=True)
    return bool(failed)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())
