"""Padding is nothing to a router: neither its losses nor its counts of tokens see it.

megatron-core 0.15.3 counts every position of a sequence. What experts compute is the same, since no token attends to
padding after it. But the routers' auxiliary loss pulls towards a balance that counts padding, and so do the biases for
balance: a longer --seq-length would train another model.

The mask goes beside the model, not through it: Megatron's layers have no argument for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipway.training.patches import MEGATRON, wrap


@dataclass(frozen=True)
class RealTokens:
    """Which positions of a micro batch are no padding.

    Args:
        here: bool [tokens of this rank], in the order of a router's rows: position by position, then by sequence.
        lengths: int64 [sequences], real tokens of each whole sequence, over all ranks that share it.
        share: part of each sequence that this rank has, 1 over the number of tensor and context parallel ranks.
    """

    here: Tensor
    lengths: Tensor
    share: float

    def weights(self, by_sequence: bool) -> Tensor:
        """float32 [tokens of this rank]: 0 for padding, else how much more a token counts than Megatron believes.

        Megatron divides an auxiliary loss by the number of all positions, and so it is positions / real tokens too
        small: of each sequence where the loss is of one sequence, else of the whole micro batch.
        """
        positions = len(self.here) / len(self.lengths) / self.share
        lengths = self.lengths.float() if by_sequence else self.lengths.float().mean().expand(len(self.lengths))
        more = positions / lengths.clamp(min=1)
        return self.here * more.repeat(len(self.here) // len(self.lengths))


_current: RealTokens | None = None  # of the micro batch whose forward pass runs, or runs again


@contextlib.contextmanager
def only(real: RealTokens | None) -> Iterator[None]:
    """Routers in the block heed these tokens alone; None = all."""
    global _current
    before, _current = _current, real
    try:
        yield
    finally:
        _current = before


def current() -> RealTokens | None:
    """What routers heed here."""
    return _current


def ignore_padding() -> None:
    """Make Megatron's routers heed `only`."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import router

    wrap(router, "compute_routing_scores_for_aux_loss", _of_real_tokens, MEGATRON)
    wrap(router, "z_loss_func", _mean_over_real_tokens, MEGATRON)
    wrap(router.TopKRouter, "routing", _counting_real_tokens, MEGATRON)
    wrap(tensor_parallel, "checkpoint", _with_its_own_mask, MEGATRON)


def _of_real_tokens(scores_of: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(scores_of)
    def found(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        routed, scores = scores_of(*arguments, **options)
        if _current is None:
            return routed, scores
        return routed & _current.here[:, None], scores * _current.weights(_is_by_sequence)[:, None]

    return found


def _mean_over_real_tokens(z_loss_of: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """Megatron multiplies this mean by the number of positions, so that padding must count as zeros."""

    @functools.wraps(z_loss_of)
    def found(logits: Tensor, coefficient: float) -> Tensor:
        if _current is None:
            return z_loss_of(logits, coefficient)
        return (logits.logsumexp(-1).square() * _current.here).mean() * coefficient

    return found


_is_by_sequence = False  # the router that runs balances each sequence, not the micro batch


def _counting_real_tokens(routing: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(routing)
    def found(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        global _is_by_sequence
        _is_by_sequence = router.routing_type == "seq_aux_loss"
        probabilities, routed = routing(router, logits)
        if _current is not None and router.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                router.local_tokens_per_expert -= (routed & ~_current.here[:, None]).sum(0)
        return probabilities, routed

    return found


def _with_its_own_mask(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that is computed again in the backward pass: another micro batch may have had its forward pass since."""

    @functools.wraps(checkpoint)
    def found(function: Callable[..., Any], *arguments: Any) -> Any:
        real = _current

        def again(*inputs: Any) -> Any:
            with only(real):
                return function(*inputs)

        return checkpoint(again, *arguments)

    return found
