"""The passes of each layer up to its experts as CUDA graphs, where the experts are shared by several GPUs.

How many tokens come to a GPU's experts the host must know, since memory is made for as many. So the exchange of tokens
and the experts are started kernel by kernel. Attention and the router, which are more kernels by far, are not: while
the experts compute, the host has long started the next layer.

Nothing in these graphs waits for another GPU, so that one can have them where another has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from slipway.training import padding
from slipway.training.recording import draw_nothing, recording, say_recorded, say_why_not, standing_in

# Of a layer: what is added to the experts' output [S, B, H], their input [S, B, H], what experts that every token has
# make of it or None, probabilities [tokens, experts] and the choice, bool [tokens, experts].
Made = tuple[Tensor | None, ...]
Batch = dict[str, Tensor | None]  # see graphs.py


def has_parts(layer: Any) -> bool:
    """Whether the layer is one of Megatron's with experts, whose exchange begins after all else."""
    return (
        type(layer).forward is TransformerLayer.forward
        and isinstance(layer.mlp, MoELayer)
        and isinstance(layer.cross_attention, IdentityOp)
        and not layer.config.moe_shared_expert_overlap
    )


def before_experts(layer: Any, hidden: Tensor, options: dict[str, Any]) -> Made:
    """The first part of `TransformerLayer.forward`."""
    sum_, _ = layer._forward_attention(hidden, **options)
    inputs = layer.pre_mlp_layernorm(sum_)
    return sum_, inputs, layer.mlp.shared_experts_compute(inputs), *layer.mlp.router(inputs)


def experts(layer: Any, sum_: Tensor, inputs: Tensor, shared: Tensor | None, probs: Tensor, chosen: Tensor) -> Tensor:
    """The second part of `TransformerLayer.forward`, from what the first returns: hidden states [S, B, H]."""
    moe = layer.mlp
    rows, probs = moe.token_dispatcher.dispatch_preprocess(inputs, chosen, probs)
    rows, probs = moe.dispatch(rows, probs)
    output, bias = moe.routed_experts_compute(rows, probs, inputs)
    add = layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)
    with layer.bias_dropout_add_exec_handler():
        found = add((moe.combine(output, shared), bias), sum_, layer.hidden_dropout)
    return make_viewless_tensor(found, found.requires_grad, keep_graph=True)


class Place:
    """Where graphs read a tensor that is the same for all layers of a pass."""

    def __init__(self, source: Tensor) -> None:
        self._source, self.value = source, source.clone()

    def put(self, source: Tensor) -> None:
        """The first layer of a pass does it for all."""
        if source is not self._source:
            self._source = source
            self.value.copy_(source)


class Places:
    """Memory that the graphs of all layers read or write."""

    def __init__(self) -> None:
        self._read: dict[int, Place] = {}
        self._scratch: dict[Any, Tensor] = {}

    def of(self, source: Tensor) -> Place:
        """The place of a tensor of the pass that is recorded."""
        return self._read.setdefault(id(source), Place(source))

    def scratch(self, name: object, like: Tensor) -> Tensor:
        """What one layer is done with before the next one begins: one for each `name`, shape and type."""
        return self._scratch.setdefault((name, like.shape, like.dtype), torch.empty_like(like))


class Section:
    """The forward and the backward pass of a layer up to its experts.

    Args:
        hidden: [S, B, H]; its values do not matter.
        options: the other arguments of the layer's forward pass.
    """

    def __init__(self, layer: Any, pool: Any, places: Places, hidden: Tensor, options: dict[str, Any]) -> None:
        self._layer, self._pool, self._places = layer, pool, places
        apart = {id(weight) for weight in layer.mlp.experts.parameters()}
        self._weights = [weight for weight in layer.parameters() if weight.requires_grad and id(weight) not in apart]
        self._hidden = torch.empty_like(hidden, requires_grad=hidden.requires_grad)
        self._read: list[Place] = []
        self._options, self._real = with_tensors((options, padding.current()), self._read_from)
        # After a call a layer adds to the gradients that there are; in the first pass of a step it may write over them.
        with torch.no_grad():
            self._before_experts(hidden)
        with standing_in(layer, self._weights) as self._leaves, recording(pool) as self._forward:
            self._made = self._before_experts(self._hidden)
        self.learned = [number for number, one in enumerate(self._made) if one is not None and one.requires_grad]
        self._backward: torch.cuda.CUDAGraph | None = None

    def _read_from(self, source: Tensor) -> Tensor:
        self._read.append(self._places.of(source))
        return self._read[-1].value

    def _before_experts(self, hidden: Tensor) -> Made:
        with padding.only(self._real):
            return before_experts(self._layer, hidden, self._options)

    def record_backward(self) -> None:
        """To be called once for all sections, for the last layer first: as they will run."""
        found = [self._made[number] for number in self.learned]
        self._made = tuple(None if one is None else one.detach() for one in self._made)
        given = [self._places.scratch(number, one) for number, one in zip(self.learned, found, strict=True)]
        wanted = [*([self._hidden] if self._hidden.requires_grad else []), *self._leaves]
        with recording(self._pool) as backward:
            of_wanted = [*(torch.autograd.grad(found, wanted, given, allow_unused=True) if found else ())]
            of_hidden = of_wanted.pop(0) if self._hidden.requires_grad else None
            if of_hidden is not None:
                of_hidden = self._places.scratch("hidden", of_hidden).copy_(of_hidden)
        # Some products add a weight's gradient to Megatron's buffer themselves, and give something else for it.
        is_added = [getattr(leaf, "grad_added_to_main_grad", False) for leaf in self._leaves]
        self._of_weights = [None if added else one for one, added in zip(of_wanted, is_added, strict=True)]
        self._given, self._of_hidden, self._backward = given, of_hidden, backward

    def __call__(self, hidden: Tensor, options: dict[str, Any]) -> Made:
        """As `before_experts`. The gradients must be asked for before the next call."""
        places = iter(self._read)
        with_tensors((options, padding.current()), lambda source: next(places).put(source))
        return _Replayed.apply(self, hidden, *self._weights)

    def forward(self, hidden: Tensor) -> Made:
        self._hidden.data.copy_(hidden)  # not seen by autograd: the backward pass may not be recorded yet
        self._forward.replay()
        return tuple(None if one is None else one.detach() for one in self._made)

    def backward(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of the hidden states and of the weights, from those of all that `forward` returns."""
        given = [gradients[number] for number in self.learned]
        if self._backward is None:
            return self._computed_again(given)
        for place, gradient in zip(self._given, given, strict=True):
            place.zero_() if gradient is None else place.copy_(gradient)
        self._backward.replay()
        return tuple(None if one is None else one.detach() for one in (self._of_hidden, *self._of_weights))

    def _computed_again(self, given: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Where the backward pass could not be recorded, once its forward pass had been."""
        with torch.enable_grad():
            made = self._before_experts(self._hidden)
        pairs = [(made[number], one) for number, one in zip(self.learned, given, strict=True) if one is not None]
        found, of_found = zip(*pairs, strict=True) if pairs else ((), ())
        wanted = [one for one in (self._hidden, *self._weights) if one.requires_grad]
        got = iter(torch.autograd.grad(found, wanted, of_found, allow_unused=True) if pairs else [None] * len(wanted))
        return tuple(next(got) if one.requires_grad else None for one in (self._hidden, *self._weights))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, section: Section, hidden: Tensor, *_: Tensor) -> Made:
        ctx.section = section
        ctx.set_materialize_grads(False)
        made = section.forward(hidden)
        others = [one for number, one in enumerate(made) if one is not None and number not in section.learned]
        ctx.mark_non_differentiable(*others)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.section.backward(gradients)


class Parts:
    """The graphs of all layers with experts for one shape. They are recorded in their first pass.

    Args:
        batch: as its values come, the graphs are of its shapes.
        pool: memory for the graphs.
    """

    def __init__(
        self, gpt: MegatronGPT, run: Callable[..., Tensor], batch: dict[str, Tensor | None], pool: Any
    ) -> None:
        self._layers = [layer for layer in gpt.modules() if isinstance(layer, TransformerLayer) and has_parts(layer)]
        self._run, self._pool, self._places = run, pool, Places()
        self._longest = gpt.config.seq_length if batch.get("cu_seqlens") is not None else None
        self._sections: dict[Any, Section] = {}
        self.is_broken = False  # not all could be recorded: not to be called again
        draw_nothing(gpt)

    def __call__(self, batch: Batch) -> Tensor:
        """What the pass finds for these, with its gradient; that must be asked for before the next call."""
        is_recorded, begun = bool(self._sections), time.monotonic()
        with self._in_their_place():
            found = self._run(batch, self._longest)
        if not is_recorded:
            for section in reversed([*self._sections.values()]):
                self._unless_broken(section.record_backward)
            if not self.is_broken:
                say_recorded("the layers up to their experts", time.monotonic() - begun)
        return found

    def _unless_broken(self, record: Callable[[], Any]) -> Any:
        """What `record` returns; None where it cannot record, or another could not before it."""
        if self.is_broken:
            return None
        try:
            return record()
        except RuntimeError as error:  # memory too, of which graphs need more
            self.is_broken = True
            say_why_not(error)
            return None

    @contextlib.contextmanager
    def _in_their_place(self) -> Iterator[None]:
        """In the block the layers' forward passes go by way of the graphs."""
        for layer in self._layers:
            vars(layer)["forward"] = functools.partial(self._forward, layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]

    def _forward(self, layer: Any, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        if layer not in self._sections:
            make = functools.partial(Section, layer, self._pool, self._places, hidden_states, options)
            if (made := self._unless_broken(make)) is not None:
                self._sections[layer] = made
        section = self._sections.get(layer)
        parts = before_experts(layer, hidden_states, options) if section is None else section(hidden_states, options)
        return experts(layer, *parts), None


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same with each tensor in it changed, in tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors(one, change) for one in value)
    if isinstance(value, dict):
        return {key: with_tensors(one, change) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **with_tensors(vars(value), change))
    return value
