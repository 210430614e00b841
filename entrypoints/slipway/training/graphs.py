"""The forward pass of a frozen base as CUDA graphs: the host starts one of them in the place of hundreds of kernels.

In FP8 a host needs longer to start the kernels than the GPU needs to run them. A graph is of one shape, and what it
reads and writes stays in the same place, so it fits where shapes come back and nothing on the way asks the host.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPT
from torch import Tensor

from slipway.untrusted import tell

MOST = 32  # shapes of a model; others are computed without a graph
WARM_UP = 2  # passes before a graph is recorded: kernels are compiled and chosen in them

Pass = Callable[[Tensor, Tensor], Tensor]  # (tokens, positions), each int64 [B, S] → hidden states [S, B, H]


class Graph:
    """One shape's pass.

    Args:
        pool: memory that graphs share which never run at the same time.
    """

    def __init__(self, gpt: MegatronGPT, run: Pass, tokens: Tensor, positions: Tensor, pool: Any) -> None:
        self._tokens, self._positions = tokens.clone(), positions.clone()
        # Megatron keeps the angles of some shapes and forgets the oldest, but the graph reads them where they are.
        self._angles: list[Any] = []
        watched = gpt.rotary_pos_emb.register_forward_hook(lambda _, __, angles: self._angles.append(angles))
        try:
            self._record(gpt, run, pool)
        finally:
            watched.remove()

    def _record(self, gpt: MegatronGPT, run: Pass, pool: Any) -> None:
        _draw_nothing(gpt)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run(self._tokens, self._positions)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # NCCL looks after its work from a thread of its own, which must not end the recording.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._found = run(self._tokens, self._positions)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the pass finds for these; the next call of any graph writes over it."""
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._graph.replay()
        return self._found


def _draw_nothing(gpt: MegatronGPT) -> None:
    """Transformer Engine sets a random state for attention's dropout, though a frozen model drops nothing. A state
    cannot be set while a graph is recorded."""
    for module in gpt.modules():
        if hasattr(module, "attention_dropout_ctx"):
            module.attention_dropout_ctx = contextlib.nullcontext


class Graphs:
    """The graphs of a model, which are recorded when their shape comes for the first time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._of_shapes: dict[torch.Size, Graph] = {}
        self._most = MOST

    def __call__(self, gpt: MegatronGPT, run: Pass, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `run`, without its gradient."""
        graph = self._of_shapes.get(tokens.shape)
        if graph is None:
            if len(self._of_shapes) >= self._most:
                return run(tokens, positions)
            try:
                graph = self._of_shapes[tokens.shape] = Graph(gpt, run, tokens, positions, self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a GPU, a driver or a layer that cannot: the run is slower, and goes on
                self._most = 0
                why = str(error).partition("\n")[0]
                tell(f"worker: no CUDA graph of the base ({why}): its kernels are started one by one")
                return run(tokens, positions)
        return graph(tokens, positions)


_graphs: weakref.WeakKeyDictionary[MegatronGPT, Graphs] = weakref.WeakKeyDictionary()


def run_graphed(gpt: MegatronGPT, run: Pass, batch: dict[str, Tensor | None]) -> Tensor:
    """The forward pass of a frozen model on a micro batch, as a graph where that can be."""
    tokens, positions = batch["tokens"], batch["position_ids"]
    if not can_be_graphed(gpt, batch):
        return run(tokens, positions)
    if gpt not in _graphs:
        _graphs[gpt] = Graphs()
    return _graphs[gpt](gpt, run, tokens, positions)


def can_be_graphed(gpt: MegatronGPT, batch: dict[str, Tensor | None]) -> bool:
    """A dense model that this GPU has whole, and samples that are not packed.

    Packed samples have other bounds in each sequence, and how many tokens an expert gets the host must know.
    """
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    ranks *= parallel_state.get_pipeline_model_parallel_world_size()
    tokens = batch["tokens"]
    is_alike = tokens is not None and tokens.is_cuda and batch.get("cu_seqlens") is None
    return ranks == 1 and is_alike and not gpt.config.num_moe_experts
