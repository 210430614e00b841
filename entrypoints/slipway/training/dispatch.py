"""How tokens reach the experts of other ranks.

Megatron's usual way sends a copy of a token to each of its experts: with 8 experts for a token and two ranks, four
copies cross. Then every rank sorts what has come once more. Where there are no more ranks than experts for a token it
is not more, mostly less, to send each token to every rank, once, and to add up what the ranks' experts have made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe import moe_layer, moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor

from slipway.training.patches import MEGATRON, replace
from slipway.training.recipe import Recipe


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
        """(hidden states [tokens of all ranks, H], their probabilities [tokens of all ranks, experts of this rank])."""
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        routed = gather_from_sequence_parallel_region(self.routing_map, group=self.tp_ep_group)
        self.local_map = routed[:, mine].contiguous()
        self._counts = self.local_map.sum(0).to("cpu", non_blocking=True)
        self._counted = torch.cuda.current_stream().record_event() if routed.is_cuda else None
        probs = gather_from_sequence_parallel_region(probs, group=self.tp_ep_group)
        hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_ep_group, use_global_buffer=True)
        return hidden, probs[:, mine].contiguous()

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [N, H], the first expert's first; int64 [experts of this rank], rows of each; probabilities [N])."""
        self.hidden_shape_before_permute, self.routing_map = hidden_states.shape, None
        if self._counted is not None:
            self._counted.synchronize()
        rows, of_rows, self.reversed_local_input_permutation_mapping = moe_utils.permute(
            hidden_states,
            self.local_map,
            probs=probs,
            num_out_tokens=int(self._counts.sum()),
            fused=self.config.moe_permute_fusion,
        )
        return rows, self._counts, of_rows

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[tokens of this rank, H]: the sums over the ranks."""
        return reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.tp_ep_group)
