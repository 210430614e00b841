"""All experts of a layer in one product, where Transformer Engine makes one product for each.

A layer of 128 experts starts 128 kernels forward and 128 or 256 backward, and the GPU waits for the host. torch's
grouped product takes the rows of all experts at once. For it the experts' weights must lie one behind the other: they
are made so. Moved there later, they would need their memory twice, 15 GB for 256 experts of DeepSeek-V3. Weights that
are trained lie in Megatron's buffer, which takes parameters in reverse; so they are registered in reverse, and their
gradients are added to the buffer in one go as well.

Where one rank has all experts, nobody but such products needs to know how many rows each of them has (`Counts`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slipway.training.patches import MEGATRON, TRANSFORMER_ENGINE, replace, wrap

SORTING = (
    "_permute_kernel",
    "_unpermute_kernel",
    "_unpermute_bwd_with_merging_probs_kernel",
    "_sort_chunks_by_map_kernel",
)
COLUMNS = 1024  # of a token at once: 16 bytes for each of 128 threads


def group_products() -> None:
    """Make Megatron's grouped experts use torch's grouped product in BF16, and Transformer Engine's kernels that sort
    the tokens by expert compile, each once."""
    from megatron.core.extensions.transformer_engine import TEGroupedLinear
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    let_sorting_compile()
    choose_blocks()
    wrap(TEGroupedLinear, "__init__", made_in_one_piece, MEGATRON)
    wrap(TEGroupedLinear, "forward", _in_one_product, MEGATRON)
    wrap(token_dispatcher, "sort_chunks_by_idxs", _unless_sorted, MEGATRON)
    wrap(MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _without_waiting, MEGATRON)
    replace(TEGroupedMLP, "_apply_bias", staticmethod(_add_bias), MEGATRON)


def let_sorting_compile() -> None:
    """Transformer Engine 2.9 calls a function of Triton that Triton 3.6 lets kernels call only when it is marked."""
    import types

    import triton
    from transformer_engine.pytorch.triton import permutation
    from triton.language import core

    marked = types.ModuleType(core.__name__)
    vars(marked).update(vars(core))
    marked.get_int_dtype = triton.constexpr_function(core.get_int_dtype)  # type: ignore[attr-defined]
    replace(permutation, "core", marked, TRANSFORMER_ENGINE)


def choose_blocks() -> None:
    """Give each of Transformer Engine's kernels that sort tokens one size of its blocks.

    Triton would run seven sizes of each for an eighth of a second, for every kernel and type in every run, and compile
    them first where they are not yet, which takes 0.3 seconds each.
    """
    from transformer_engine.pytorch.triton import permutation

    for name in SORTING:
        kernel = getattr(permutation, name)
        chosen = [one for one in kernel.configs if one.kwargs["BLOCK_SIZE"] == COLUMNS]
        replace(kernel, "configs", chosen, TRANSFORMER_ENGINE)


class Counts:
    """How many rows each expert has, known to the GPU alone, so that the host need not wait for it in every layer.

    Args:
        rows: int64 [experts], on the GPU.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.ends = rows.cumsum(0, dtype=torch.int32)

    def tolist(self) -> Counts:
        """Megatron asks for a list before it hands it to the layers, which take this too."""
        return self


def counts_stay(config: Any) -> bool:
    """Whether the rows of experts can be `Counts`: this rank has all experts, drops nothing, and computes in BF16."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_expert_tensor_and_model_parallel_world_size()
    drops = config.moe_pad_expert_input_to_capacity or config.moe_expert_capacity_factor is not None
    return ranks == 1 and config.moe_permute_fusion and config.moe_grouped_gemm and not (config.fp8 or drops)


def _without_waiting(fetch: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron fetches the counts from the GPU and waits for them, in every layer and pass."""

    @functools.wraps(fetch)
    def found(dispatcher: Any, point: str, counts: Tensor | None = None) -> Any:
        if not counts_stay(dispatcher.config):
            return fetch(dispatcher, point, counts)
        return Counts(counts) if counts is not None and point == "before_finish" else counts

    return found


def made_in_one_piece(make: Callable[..., None]) -> Callable[..., None]:
    """The weights of all experts lie one behind the other, when they are made and in Megatron's buffers."""
    return _registered_in_reverse(_made_together(make))


def _made_together(make: Callable[..., None]) -> Callable[..., None]:
    """Put the weights of all experts into one piece of memory, each as soon as it is made and before it has values."""

    @functools.wraps(make)
    def made(module: nn.Module, *arguments: Any, **options: Any) -> None:
        register = module.register_parameter
        pieces: list[Tensor] = []

        def placed(name: str, parameter: nn.Parameter, **about: Any) -> None:
            # FP8 weights are made out of these one by one, and lie elsewhere then.
            if name.startswith("weight") and not parameter.is_meta and not module.primary_weights_in_fp8:
                if not pieces:
                    pieces.extend(parameter.new_empty(module.num_gemms, *parameter.shape))
                parameter.data = pieces[int(name.removeprefix("weight"))]
            register(name, parameter, **about)

        # On the object, and not by setattr: the module's own __init__ has not run yet.
        vars(module)["register_parameter"] = placed
        try:
            make(module, *arguments, **options)
        finally:
            del vars(module)["register_parameter"]

    return made


def _registered_in_reverse(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def made(module: nn.Module, *arguments: Any, **options: Any) -> None:
        make(module, *arguments, **options)
        # Weights apart from biases, so that they are neighbours.
        for name in sorted(reversed(list(module._parameters)), key=lambda name: name.startswith("weight")):
            module._parameters[name] = module._parameters.pop(name)

    return made


def _unless_sorted(sort: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron sorts the tokens by expert a second time, which changes nothing where one rank has all experts."""

    @functools.wraps(sort)
    def found(inputs: Tensor, sizes: Tensor, order: Tensor, *, probs: Any = None, fused: bool = False) -> Any:
        if not hasattr(order, "changes_nothing"):  # asked once: the answer comes from the GPU
            order.changes_nothing = order.tolist() == list(range(len(order)))
        if order.changes_nothing:
            return inputs, probs
        return sort(inputs, sizes, order, probs=probs, fused=fused)

    return found


def _in_one_product(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(module: Any, inputs: Tensor, sizes: list[int] | Counts) -> tuple[Tensor, list[Tensor] | None]:
        weights = _weights_of(module)
        if not all(type(one.data) is Tensor and one.dtype == torch.bfloat16 for one in (inputs, weights[0])):
            return forward(module, inputs, sizes.rows.tolist() if isinstance(sizes, Counts) else sizes)  # FP8
        output = grouped_product(inputs, weights, sizes)
        if not module.use_bias:
            return output, None
        biases = [getattr(module, f"bias{number}") for number in range(module.num_gemms)]
        if module.te_return_bias:
            return output, biases
        return output + _of_rows(biases, sizes, len(output)), None

    return found


def _weights_of(module: Any) -> list[Tensor]:
    """Those of all experts. For 128 of them torch's own way takes 0.1 ms, in which a GPU waits."""
    own, parameters = vars(module), module._parameters  # NF4 puts unpacked weights in the place of parameters
    names = [f"weight{number}" for number in range(module.num_gemms)]
    return [own[name] if name in own else parameters[name] for name in names]


def _add_bias(
    output: Tensor, biases: Sequence[Tensor] | None, sizes: list[int] | Counts, probabilities: Tensor
) -> Tensor:
    """TEGroupedMLP's: each row plus its expert's bias times the probability of its token. [rows, H]"""
    if biases is None:
        return output
    return (output + _of_rows(biases, sizes, len(output)) * probabilities).to(output.dtype)


def _of_rows(biases: Sequence[Tensor], sizes: list[int] | Counts, rows: int) -> Tensor:
    """[rows, N]: the bias of each row's expert."""
    counts = _on_gpu(sizes, biases[0].device).rows
    return torch.stack(list(biases)).repeat_interleave(counts, dim=0, output_size=rows)


def _on_gpu(sizes: list[int] | Counts, device: torch.device) -> Counts:
    return sizes if isinstance(sizes, Counts) else Counts(torch.tensor(sizes).to(device, non_blocking=True))


def grouped_product(inputs: Tensor, weights: Sequence[Tensor], sizes: list[int] | Counts) -> Tensor:
    """Each expert's rows times the transpose of its weight: [rows, N].

    Args:
        inputs: [rows, K], the rows of the first expert first.
        weights: of each expert [N, K].
        sizes: number of rows of each expert.
    """
    trained = weights[0].requires_grad
    stacked = _as_one(weights)
    if stacked is None and not trained:
        stacked = _lay_together(weights)
    ends = _on_gpu(sizes, inputs.device).ends
    buffer = _buffer_of(weights) if trained else None
    # With a buffer for the gradients the weights need not be known to autograd: 128 small additions are saved.
    known = weights if trained and buffer is None else []
    return _GroupedProduct.apply(inputs, ends, tuple(weights), stacked, buffer, *known)


class _GroupedProduct(torch.autograd.Function):
    """`stacked` and `buffer` are the weights and their gradients as [E, N, K], where these lie together."""

    @staticmethod
    def forward(ctx, inputs, ends, weights, stacked, buffer, *known):
        trained = bool(known) or buffer is not None
        # What is saved so may be unpacked again for the backward pass (nf4_base.py); an attribute would keep it. The
        # inputs are needed for the gradient of weights alone.
        ctx.save_for_backward(inputs if trained else None, ends, stacked)
        ctx.weights = weights if trained else ()
        ctx.buffer, ctx.known = buffer, len(known)
        return torch._grouped_mm(inputs, _whole(stacked, weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, gradient):
        inputs, ends, stacked = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_inputs = torch._grouped_mm(gradient, _whole(stacked, ctx.weights), offs=ends)
        if ctx.buffer is None and not ctx.known:
            return of_inputs, None, None, None, None
        of_weights = torch._grouped_mm(gradient.t(), inputs, offs=ends)
        if ctx.known:
            return of_inputs, None, None, None, None, *of_weights.unbind()
        ctx.buffer.add_(of_weights)
        for weight in ctx.weights:
            weight.grad_added_to_main_grad = True
        return of_inputs, None, None, None, None


def _whole(stacked: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """[E, N, K]: what lies together, else a copy."""
    return torch.stack([weight.detach() for weight in weights]) if stacked is None else stacked


def _buffer_of(weights: Sequence[Tensor]) -> Tensor | None:
    """Megatron's buffer of the weights' gradients as [E, N, K]; None where there is none, or it is not in one piece."""
    if getattr(weights[0], "main_grad", None) is None:
        return None
    return _as_one([weight.main_grad for weight in weights])


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of tensors that lie one behind the other as one more dimension; None where they do not."""
    first, size = tensors[0].detach(), tensors[0].numel() * tensors[0].element_size()
    start = first.data_ptr()
    if not all(one.data_ptr() == start + number * size and one.is_contiguous() for number, one in enumerate(tensors)):
        return None
    if first.untyped_storage().data_ptr() != tensors[-1].untyped_storage().data_ptr():
        return None  # neighbours in memory by chance
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _lay_together(weights: Sequence[Tensor]) -> Tensor:
    """Move frozen weights into one piece of memory: [E, N, K]."""
    stacked = torch.stack([weight.detach() for weight in weights])
    for weight, part in zip(weights, stacked, strict=True):
        weight.data = part
    return stacked
