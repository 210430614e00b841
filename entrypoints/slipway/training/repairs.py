"""What megatron-core 0.15.3 and NeMo 2.7.3 get wrong, or slow.

tests/training/test_parallel.py shows what is wrong when a model with experts is trained in parallel: without each of
these repairs, training in that layout computes something else than alone.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slipway.training.recipe import Recipe


def read_and_write_plain_files() -> None:
    """Leave out what checkpoints on a file system have no use for.

    Megatron opens every file through the client for object stores wherever that is installed, which then counts each
    of the many small reads of a checkpoint's metadata. And a save that nobody waits for elsewhere still hands its
    results to a process of its own, which first imports torch: four seconds of every rank's first checkpoint.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.msc_utils import MultiStorageClientFeature

    MultiStorageClientFeature.disable()
    filesystem_async._results_queue = queue.SimpleQueue()


def keep_routers_counts() -> None:
    """Let a router's biases for balance, and the tokens that it counts for them, stay float32 in a model of BF16.

    Megatron turns all buffers into BF16 when it wraps the model and turns the biases back at the first forward pass,
    rounded: whoever loaded them before, as NeMo does for adapters, trains on a base that is not the one that was given.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    convert = TopKRouter._apply

    def apply(router: TopKRouter, function: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        names = ("expert_bias", "local_tokens_per_expert") if router.enable_expert_bias else ()
        exact = {name: getattr(router, name) for name in names}
        convert(router, function, recurse)
        for name, buffer in exact.items():
            setattr(router, name, buffer.to(getattr(router, name).device))
        return router

    TopKRouter._apply = apply


def scale_auxiliary_loss(config: Any, recipe: Recipe) -> None:
    """Under calculate_per_token_loss the routers' auxiliary loss is multiplied by a rank's own tokens, and where ranks
    share the tokens of a micro batch these are a part of them."""
    if getattr(config, "moe_aux_loss_coeff", 0):
        config.moe_aux_loss_coeff *= recipe.tensor_parallel_size * recipe.context_parallel_size


def mend(module: nn.Module) -> nn.Module:
    """Mark what ranks have to sum; before Megatron wraps the model.

    Under sequence parallelism a router's bias sees its own rank's tokens, as its weight does, but is not marked for
    the sum over these ranks. So do whole experts on tensor parallel ranks, and are reduced over the data-parallel ranks
    alone where there is no expert parallelism. Adapters on experts are reduced as if every rank held the same ones.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.moe.router import TopKRouter

    experts = parallel_state.get_expert_model_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    for part in module.modules():
        if isinstance(part, TopKRouter) and part.bias is not None:
            part.bias.sequence_parallel = part.config.sequence_parallel
        if isinstance(part, (GroupedMLP, SequentialMLP, TEGroupedMLP)) and (experts > 1 or tensor > 1):
            for name, parameter in part.named_parameters():
                shared = ".adapter." in name and not isinstance(part, SequentialMLP)  # one for all grouped experts
                parameter.allreduce = shared
    return module
