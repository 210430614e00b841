"""The passes of a model's layers as CUDA graphs: the host starts one of them in the place of thousands of kernels.

With experts or in FP8 a host needs longer to start the kernels than the GPU needs to run them. A graph is of one shape,
and what it reads and writes stays in the same place, so it fits where shapes come back and nothing on the way asks the
host.

Where adapters or all weights are trained there are two graphs, of the layers' forward and of their backward pass. What
the one keeps for the other lies in memory that nothing else can use, so there is a pair for one shape at a time.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor, nn

from slipway.training.experts import counts_stay
from slipway.training.partial_graphs import Parts
from slipway.training.recording import draw_nothing, recording, say_recorded, say_why_not, standing_in

MOST = 32  # shapes of a model of which only the forward pass is wanted; others are computed without a graph
WARM_UP = 2  # passes before a graph is recorded: kernels are compiled and chosen in them
TRIES = 8  # pairs of graphs that are recorded for a model at most, one after the other
ALIKE = 2  # micro batches of one shape, one after the other, before a pair is recorded for the next
BOUNDS = 16  # that packed samples have at least in a graph
OF_OPTIMIZER = 16  # bytes for a trained weight: its copy in float32, two moments, and what a step needs for a moment
LITTLE = 1 << 31  # bytes for the optimizer that are set aside while the first step records

Batch = dict[str, Tensor | None]  # a micro batch on the GPU, see steps.data_step
Pass = Callable[[Batch, int | None], Tensor]  # (batch, longest sample if it is known) → hidden states [S, B, H]
READ = ("tokens", "position_ids", "cu_seqlens", "is_real", "lengths")  # of a micro batch, by the layers


class Recorded:
    """One shape's inputs, and what the graphs of its passes read beside them.

    Args:
        batch: its values do not matter, its shapes do.
        pool: memory that graphs share which never run at the same time.
    """

    def __init__(self, gpt: MegatronGPT, batch: Batch, pool: Any) -> None:
        self._batch = {key: None if (value := batch.get(key)) is None else value.clone() for key in READ}
        self._longest = gpt.config.seq_length if batch.get("cu_seqlens") is not None else None
        self._pool = pool
        # Megatron keeps the angles of some shapes and forgets the oldest, but the graph reads them where they are.
        self._angles: list[Any] = []
        draw_nothing(gpt)

    @contextlib.contextmanager
    def _keeping_angles(self, gpt: MegatronGPT) -> Iterator[None]:
        rotaries = [module for module in gpt.modules() if isinstance(module, RotaryEmbedding)]
        watched = [one.register_forward_hook(lambda _, __, angles: self._angles.append(angles)) for one in rotaries]
        try:
            yield
        finally:
            for one in watched:
                one.remove()

    def _put(self, batch: Batch) -> None:
        for key, place in self._batch.items():
            value = batch.get(key)
            if place is not None and value is not None:
                place.copy_(value)


class Graph(Recorded):
    """The forward pass of one shape."""

    def __init__(self, gpt: MegatronGPT, run: Pass, batch: Batch, pool: Any) -> None:
        super().__init__(gpt, batch, pool)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with self._keeping_angles(gpt):
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    run(self._batch, self._longest)
            here.wait_stream(aside)
            with recording(self._pool) as self._graph:
                self._found = run(self._batch, self._longest)

    def __call__(self, batch: Batch) -> Tensor:
        """What the pass finds for these; the next call of any graph writes over it."""
        self._put(batch)
        self._graph.replay()
        return self._found


class Pair(Recorded):
    """The forward and the backward pass of one shape, for the gradients of the weights that are trained."""

    is_broken = False

    def __init__(self, gpt: MegatronGPT, run: Pass, batch: Batch, pool: Any) -> None:
        super().__init__(gpt, batch, pool)
        self.weights = [weight for weight in gpt.parameters() if weight.requires_grad]
        begun = time.monotonic()
        with self._keeping_angles(gpt), standing_in(gpt, self.weights) as leaves:
            # What is made at the first call of a shape, angles among it, is not recorded. And after a call a layer adds
            # to the gradients that there are; in the first pass of a step it may write over them.
            with torch.no_grad():
                run(self._batch, self._longest)
            with recording(self._pool) as self.forward:
                found = run(self._batch, self._longest)
            self.of_found = torch.empty_like(found)
            with recording(self._pool) as self.backward:
                of_weights = torch.autograd.grad(found, leaves, self.of_found, allow_unused=True)
        self.found = found.detach()
        # Some products add a weight's gradient to Megatron's buffer themselves, and give something else for it.
        is_added = [getattr(leaf, "grad_added_to_main_grad", False) for leaf in leaves]
        self.of_weights = [None if added else one for one, added in zip(of_weights, is_added, strict=True)]
        say_recorded("the layers", time.monotonic() - begun)

    def __call__(self, batch: Batch) -> Tensor:
        """What the pass finds for these. Its gradient must be asked for before the next call."""
        self._put(batch)
        return _Replayed.apply(self, *self.weights)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: Pair, *_: Tensor) -> Tensor:
        ctx.pair = pair
        pair.forward.replay()
        return pair.found.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.pair.of_found.copy_(gradient)
        ctx.pair.backward.replay()
        return None, *(None if one is None else one.detach() for one in ctx.pair.of_weights)


class Graphs:
    """The graphs of a model's forward pass, which are recorded when their shape comes for the first time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._of_shapes: dict[Any, Graph] = {}
        self._most = MOST

    def __call__(self, gpt: MegatronGPT, run: Pass, batch: Batch) -> Tensor:
        """As `run`, without its gradient."""
        shape = shape_of(batch)
        if shape not in self._of_shapes:
            if len(self._of_shapes) >= self._most:
                return run(batch, None)
            try:
                self._of_shapes[shape] = Graph(gpt, run, batch, self._pool)
            except RuntimeError as error:  # a GPU, a driver or a layer that cannot: the run is slower, and goes on
                self._most = 0
                self._of_shapes.clear()  # memory too can be what lacked
                say_why_not(error)
        if shape not in self._of_shapes:
            return run(batch, None)
        return self._of_shapes[shape](batch)


class Pairs:
    """The graphs of a model that is trained: those of the shape that its micro batches have had lately.

    Args:
        make: Pair or Parts.
    """

    def __init__(self, make: type[Pair | Parts]) -> None:
        self._make = make
        self._pair: Pair | Parts | None = None
        self._shape: Any = None  # of the last micro batch
        self._passes = self._alike = 0  # how many there were, and how many of the last shape
        self._tries, self._bounds = TRIES, BOUNDS

    def __call__(self, gpt: MegatronGPT, run: Pass, batch: Batch) -> Tensor:
        """As `run`, with the gradients of the weights that are trained."""
        even = self._with_even_bounds(batch)
        before, self._shape = self._shape, shape_of(even)
        if before != self._shape:
            self._alike, self._pair = 0, None  # its memory is for the passes that come without a graph
        if self._pair is None and self._tries and self._alike >= ALIKE and self._may_record(gpt):
            self._tries -= 1
            self._pair = self._recorded(gpt, run, even)
        self._passes, self._alike = self._passes + 1, self._alike + 1
        if self._pair is None:
            return run(batch, None)
        if self._pair.is_broken:
            self._pair, self._tries = None, 0
            return run(batch, None)
        return self._pair(even)

    def _is_first_step(self) -> bool:
        """At its end the optimizer takes its memory."""
        return self._passes < get_num_microbatches()

    def _may_record(self, gpt: MegatronGPT) -> bool:
        return not self._is_first_step() or for_optimizer(gpt) <= LITTLE

    def _recorded(self, gpt: MegatronGPT, run: Pass, batch: Batch) -> Pair | Parts | None:
        set_aside: Tensor | None = None
        try:
            if self._is_first_step():
                set_aside = batch["tokens"].new_empty(for_optimizer(gpt), dtype=torch.uint8)  # type: ignore[union-attr]
            return self._make(gpt, run, batch, torch.cuda.graph_pool_handle())
        except RuntimeError as error:  # memory too, of which graphs need more
            self._tries = 0
            say_why_not(error)
        finally:
            del set_aside
        torch.cuda.empty_cache()
        return None

    def _with_even_bounds(self, batch: Batch) -> Batch:
        """The micro batch with as many bounds as the others: samples without tokens stand at its end."""
        bounds = batch.get("cu_seqlens")
        if bounds is None:
            return batch
        bounds = bounds.flatten()
        if len(bounds) > self._bounds:
            self._bounds = -(-len(bounds) * 5 // (4 * BOUNDS)) * BOUNDS  # a quarter more than these
        return batch | {"cu_seqlens": torch.cat([bounds, bounds[-1:].expand(self._bounds - len(bounds))])}


def for_optimizer(gpt: MegatronGPT) -> int:
    """Bytes that the optimizer of the trained weights takes at most."""
    return OF_OPTIMIZER * sum(weight.numel() for weight in gpt.parameters() if weight.requires_grad)


def shape_of(batch: Batch) -> tuple[Any, ...]:
    """What must be the same for a graph to fit."""
    return tuple(None if (value := batch.get(key)) is None else value.shape for key in READ)


_graphs: weakref.WeakKeyDictionary[MegatronGPT, Graphs | Pairs | None] = weakref.WeakKeyDictionary()
_are_wanted = True


def record_nothing() -> None:
    """From now on every kernel is started by the host."""
    global _are_wanted
    _are_wanted = False


def run_graphed(gpt: MegatronGPT, run: Pass, batch: Batch) -> Tensor:
    """The forward pass of a frozen model on a micro batch, as a graph where that can be."""
    tokens = batch["tokens"]
    if tokens is None or not tokens.is_cuda or batch.get("cu_seqlens") is not None:  # packed ones: many shapes
        return run(batch, None)
    if gpt not in _graphs:
        _graphs[gpt] = Graphs() if _are_wanted and is_steady(gpt) else None
    graphs = _graphs[gpt]
    return run(batch, None) if graphs is None else graphs(gpt, run, batch)


def learn_graphed(gpt: MegatronGPT, run: Pass, batch: Batch) -> Tensor:
    """The forward pass of a model that is trained, whose gradient is a graph too where that can be."""
    tokens = batch["tokens"]
    if tokens is None or not tokens.is_cuda or not torch.is_grad_enabled():
        return run(batch, None)
    if gpt not in _graphs:
        kind = Pair if is_steady(gpt) else Parts if has_steady_parts(gpt) else None
        _graphs[gpt] = Pairs(kind) if kind is not None and _are_wanted and learns_steadily(gpt) else None
    graphs = _graphs[gpt]
    return run(batch, None) if graphs is None else graphs(gpt, run, batch)


def is_steady(gpt: MegatronGPT) -> bool:
    """This GPU has all of the model, and the host is not asked how many tokens an expert gets."""
    return _has_all_but_experts() and (not gpt.config.num_moe_experts or counts_stay(gpt.config))


def has_steady_parts(gpt: MegatronGPT) -> bool:
    """This GPU has all of the model but for other GPUs' experts."""
    return _has_all_but_experts() and bool(gpt.config.num_moe_experts) and not gpt.config.fp8


def _has_all_but_experts() -> bool:
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    return ranks * parallel_state.get_pipeline_model_parallel_world_size() == 1


def learns_steadily(gpt: MegatronGPT) -> bool:
    """Every pass is the same to the host, and the gradients of all weights need not exist at once.

    Where something is dropped or computed again, Megatron sets the state of the random numbers. Weights that are
    trained are turned into FP8 in the first pass of a step alone. The gradients of experts, and all of them where Apex
    is there, are added to Megatron's buffer while the backward pass runs.
    """
    config = gpt.config
    adds = config.num_moe_experts or config.gradient_accumulation_fusion
    if all(weight.requires_grad for weight in gpt.parameters()) and (config.fp8 or not adds):
        return False
    draws = config.attention_dropout or config.hidden_dropout or config.moe_input_jitter_eps
    draws = draws or any(isinstance(part, nn.Dropout) and part.p for part in gpt.modules())
    return not draws and config.recompute_granularity is None
