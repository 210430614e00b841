"""Logits of a model that ranks share in any layout, by Megatron's own forward pass and its pipeline's schedule."""

from __future__ import annotations

from typing import Any

import torch

LENGTH = 160  # longer than the lengths from which rope is scaled, and than every sliding window


def tokens_of(length: int = LENGTH) -> torch.Tensor:
    """int64 [2, length]"""
    return torch.randint(5, 512, (2, length), generator=torch.Generator().manual_seed(7))


def parallel_logits(modules: list[Any], length: int = LENGTH) -> torch.Tensor | None:
    """float32 [2, length, vocabulary] on the ranks of the last stage, None on the others.

    Args:
        modules: Megatron's models of this rank, one for each virtual stage, in float32.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    tokens, found = tokens_of(length), []
    positions = torch.arange(length).expand_as(tokens)
    batches = max(1, parallel_state.get_pipeline_model_parallel_world_size())  # virtual stages want as many

    def step(_: Any, module: Any) -> Any:
        output = module(input_ids=tokens, position_ids=positions, attention_mask=None)

        def keep(logits: torch.Tensor) -> Any:
            found.append(gather_from_tensor_model_parallel_region(logits))
            return torch.zeros(1), {}

        return output, keep

    for module in modules:
        module.eval()
        module.mtp_process = False
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(())] * len(modules) if len(modules) > 1 else iter(()),
            model=modules,
            num_microbatches=batches,
            seq_length=length,
            micro_batch_size=len(tokens),
            forward_only=True,
        )
    return found[-1].float() if found else None
