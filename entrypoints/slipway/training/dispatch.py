"""How tokens reach the experts of other ranks.

Megatron's usual way sends a copy of a token to each of its experts: with 8 experts for a token and two ranks, four
copies cross. Then every rank sorts what has come once more. Where there are no more ranks than experts for a token it
is not more, mostly less, to send each token to every rank, once, and to add up what the ranks' experts have made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from slipway.training.patches import MEGATRON, wrap
from slipway.training.recipe import Recipe


def choose_dispatcher(config: Any, recipe: Recipe, equally_long: bool) -> None:
    """Give Megatron's configuration of a model the dispatcher of tokens that sends less, where it can be chosen.

    Args:
        equally_long: every micro batch of every rank computes as many positions.
    """
    if config.variable_seq_lengths:
        config.moe_token_dispatcher_type = "alltoall"  # Megatron asks for it even where there are no experts
    elif config.num_moe_experts and equally_long and sends_less(config, recipe):
        from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

        config.moe_token_dispatcher_type = "allgather"
        wrap(MoEAllGatherTokenDispatcher, "token_combine", _in_its_own_precision, MEGATRON)


def sends_less(config: Any, recipe: Recipe) -> bool:
    """Whether to send every token to all ranks that share the experts is not more than Megatron's usual way.

    What hides the exchange behind the shared experts knows only the usual way.
    """
    return 1 < recipe.expert_parallel_size <= config.moe_router_topk and not config.moe_shared_expert_overlap


def _in_its_own_precision(combine: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Add up in the precision of the model, as all ranks' partial sums are, not in that of the router's probabilities,
    which is float32 and twice as much to send."""

    @functools.wraps(combine)
    def combined(dispatcher: Any, hidden: Tensor) -> Tensor:
        dispatcher.local_probs = hidden  # it is asked for its dtype alone
        try:
            return combine(dispatcher, hidden)
        finally:
            dispatcher.local_probs = None

    return combined
