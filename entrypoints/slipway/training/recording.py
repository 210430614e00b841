"""What it takes to record passes of a model as CUDA graphs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slipway.untrusted import tell


@contextlib.contextmanager
def recording(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """What the block asks of the GPU is recorded, and not done.

    Args:
        pool: memory that graphs share which never run at the same time.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer block brings the stream back where a recording fails, which torch does not. NCCL looks after its work
    # from a thread of its own, which must not end the recording.
    here = torch.cuda.stream(torch.cuda.current_stream())
    with here, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield graph


@contextlib.contextmanager
def standing_in(module: nn.Module, weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In the block the module has other parameters in the same memory in the place of `weights`.

    Megatron holds on to the end of each weight's gradient, which waits for the stream on which the model was made. A
    graph can wait for no other stream.
    """
    leaves = {id(weight): nn.Parameter(weight.detach()) for weight in weights}
    for weight in weights:
        vars(leaves[id(weight)]).update(vars(weight) | {"grad_added_to_main_grad": False})
    places = [
        (part, name, weight)
        for part in module.modules()
        for name, weight in part._parameters.items()
        if weight is not None and id(weight) in leaves
    ]
    for part, name, weight in places:
        part._parameters[name] = leaves[id(weight)]
    try:
        yield list(leaves.values())
    finally:
        for part, name, weight in places:
            part._parameters[name] = weight


def draw_nothing(model: nn.Module) -> None:
    """Transformer Engine sets a random state for attention's dropout, though nothing is dropped here. A state cannot be
    set while a graph is recorded."""
    for module in model.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = contextlib.nullcontext


def say_recorded(what: str, seconds: float) -> None:
    """Once for all ranks, which do the same at the same time."""
    if int(os.environ.get("RANK", 0)) == 0:
        tell(f"worker: recorded {what} as CUDA graphs in {seconds:.1f} s")


def say_why_not(error: BaseException) -> None:
    while error.__context__ is not None:  # what ends a recording is an error too, and says less
        error = error.__context__
    why = str(error).partition("\n")[0]
    tell(f"worker: no CUDA graph of the layers ({why}): their kernels are started one by one")
