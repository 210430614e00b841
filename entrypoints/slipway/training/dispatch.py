"""How tokens reach the experts of other ranks.

Megatron's usual way sends a copy of a token to each of its experts: with 8 experts for a token and two ranks, four
copies cross. Then every rank sorts what has come once more. Where there are no more ranks than experts for a token it
is not more, mostly less, to send each token to every rank, once, and to add up what the ranks' experts have made of it.
GPUs of one node that reach each other's memory need not even send it (exchange_gpu.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe import moe_layer, moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from slipway.training.patches import MEGATRON, replace
from slipway.training.recipe import Recipe

if TYPE_CHECKING:
    from slipway.training.exchange_gpu import Places, Shared


def choose_dispatcher(config: Any, recipe: Recipe, equally_long: bool) -> None:
    """Give Megatron's configuration of a model the dispatcher of tokens that sends less, where it can be chosen.

    Args:
        equally_long: every micro batch of every rank computes as many positions.
    """
    # Without experts too: Megatron's default is not allowed where stages tell each other the length of a micro batch.
    config.moe_token_dispatcher_type = "alltoall"
    if config.num_moe_experts and equally_long and not config.variable_seq_lengths and sends_less(config, recipe):
        config.moe_token_dispatcher_type = "allgather"
        replace(moe_layer, "MoEAllGatherTokenDispatcher", Dispatcher, MEGATRON)


def sends_less(config: Any, recipe: Recipe) -> bool:
    """Whether to send every token to all ranks that share the experts is not more than Megatron's usual way.

    What hides the exchange behind the shared experts knows only the usual way.
    """
    return 1 < recipe.expert_parallel_size <= config.moe_router_topk and not config.moe_shared_expert_overlap


class Dispatcher(MoEAllGatherTokenDispatcher):
    """Megatron's, which waits for the GPU after the tokens have come, and adds up in float32.

    The host must know how many tokens each expert has. Here it asks for that before the tokens are sent, so that it can
    go on while they are on their way. What the ranks' experts have made is added up in the precision of the model; in
    that of the router's probabilities, float32, it would be twice as much to send.
    """

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden states [tokens of all ranks, H], their probabilities [tokens of all ranks, experts of this rank]).

        The hidden states stay where they are, [tokens, H], where the ranks read each other's memory.
        """
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        routed = gather_from_sequence_parallel_region(self.routing_map, group=self.tp_ep_group)
        self.local_map = routed[:, mine].contiguous()
        self._counts = self.local_map.sum(0).to("cpu", non_blocking=True)
        self._counted = torch.cuda.current_stream().record_event() if routed.is_cuda else None
        probs = gather_from_sequence_parallel_region(probs, group=self.tp_ep_group)
        self._shared = _SHARED.of(self.tp_ep_group, hidden_states) if self.config.moe_permute_fusion else None
        if self._shared is None:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, group=self.tp_ep_group, use_global_buffer=True
            )
        return hidden_states, probs[:, mine].contiguous()

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [N, H], the first expert's first; int64 [experts of this rank], rows of each; probabilities [N])."""
        self.hidden_shape_before_permute, self.routing_map = hidden_states.shape, None
        if self._counted is not None:
            self._counted.synchronize()
        count = int(self._counts.sum())
        if self._shared is not None:
            self._places = _places(self._shared, self.local_map, count, len(hidden_states))
            rows, of_rows = _Spread.apply(self._places, hidden_states, probs)
            return rows, self._counts, of_rows
        rows, of_rows, self.reversed_local_input_permutation_mapping = moe_utils.permute(
            hidden_states,
            self.local_map,
            probs=probs,
            num_out_tokens=count,
            fused=self.config.moe_permute_fusion,
        )
        return rows, self._counts, of_rows

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """[tokens of all ranks, H] from the rows of this rank's experts [N, H]; the sums over the ranks [tokens, H]
        where these write into each other's memory."""
        if self._shared is None:
            return super().combine_preprocess(hidden_states)
        return _Collected.apply(self._places, hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[tokens of this rank, H]: the sums over the ranks."""
        if self._shared is not None:
            return hidden_states
        return reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)


def _places(shared: Shared, chosen: Tensor, count: int, tokens: int) -> Places:
    """Of bool [tokens of all ranks, experts of this rank]."""
    from transformer_engine.pytorch.triton.permutation import make_row_id_map

    from slipway.training.exchange_gpu import Places

    return Places(shared, make_row_id_map(chosen, *chosen.shape), count, tokens)


class _Spread(torch.autograd.Function):
    """The rows of this rank's experts, and their probabilities, from the tokens of all ranks."""

    @staticmethod
    def forward(ctx: Any, places: Places, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.places = places
        return places.spread(hidden, probs)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, of_probs: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        _, needs_hidden, needs_probs = ctx.needs_input_grad
        return (
            None,
            ctx.places.collect(of_rows) if needs_hidden else None,
            ctx.places.of_tokens(of_probs) if needs_probs else None,
        )


class _Collected(torch.autograd.Function):
    """Of each token of this rank the sum of what the experts of all ranks have made of it."""

    @staticmethod
    def forward(ctx: Any, places: Places, rows: Tensor) -> Tensor:
        ctx.places = places
        return places.collect(rows)

    @staticmethod
    def backward(ctx: Any, of_sums: Tensor) -> tuple[None, Tensor]:
        return None, ctx.places.spread(of_sums)[0]


class _OfGroups:
    """The memory that the ranks of each group share: made once, and anew where there are more tokens than ever."""

    def __init__(self) -> None:
        self._found: dict[ProcessGroup, Shared | None] = {}

    def of(self, group: ProcessGroup, hidden: Tensor) -> Shared | None:
        """For hidden states [tokens, H], as many on each rank; None where the ranks cannot share memory. A collective
        call."""
        if not hidden.is_cuda:
            return None
        from slipway.training.exchange_gpu import share

        known = self._found.get(group)
        if group not in self._found or (known is not None and not known.holds(hidden)):
            self._found[group] = share(group, hidden, known)
        return self._found[group]


_SHARED = _OfGroups()
