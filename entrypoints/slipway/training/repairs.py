"""What megatron-core 0.15.3 and NeMo 2.7.3 compute wrongly in some layouts, or do slowly.

tests/training/test_parallel.py and test_repairs.py show for each of these repairs that upstream is still wrong without
it. A repair whose test fails is not needed any more: delete both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import queue
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slipway.errors import PreflightError
from slipway.families.decoder import LATENT_EPSILON
from slipway.training.patches import CURE, LIGHTNING, MEGATRON, TRANSFORMER_ENGINE, replace, wrap
from slipway.training.recipe import Recipe

LATENT_NORMS = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")


def hand_over_in_this_process() -> None:
    """Give the results of a save to who waits for them, which every save is.

    Megatron hands them over through another process, which first imports torch: four seconds at the first checkpoint of
    every rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    replace(filesystem_async, "_results_queue", queue.SimpleQueue(), MEGATRON)


def keep_no_scales() -> None:
    """Save no state of FP8 with a model: a scale for each tensor is found anew in each step.

    Transformer Engine would save a pickle with every layer, which nobody needs, and which a resume refuses as it
    refuses every pickle inside a checkpoint.
    """
    from megatron.core.extensions.transformer_engine import TEGroupedLinear
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    empty = functools.partial(torch.empty, 0, dtype=torch.uint8)
    replace(TransformerEngineBaseModule, "get_extra_state", lambda _: empty(), TRANSFORMER_ENGINE)
    replace(TEGroupedLinear, "_split_extra_state", lambda layer, state: [state] * layer.num_gemms, MEGATRON)


def keep_no_copies() -> None:
    """Build weights in FP8 without a copy of each in BF16 in the machine's memory.

    Megatron keeps these for an optimizer: of 8 billion weights 16 GB, which are copied from the GPU one by one. What is
    built in FP8 here is a frozen base, which has no optimizer.
    """
    import transformer_engine.pytorch

    wrap(transformer_engine.pytorch, "fp8_model_init", _without_copies, TRANSFORMER_ENGINE)


def _without_copies(init: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init)  # Megatron looks at its parameters
    def found(*arguments: Any, **options: Any) -> Any:
        return init(*arguments, **{**options, "preserve_high_precision_init_val": False})

    return found


def keep_routers_counts() -> None:
    """Let a router's biases for balance, and the tokens that it counts for them, stay float32 in a model of BF16.

    Megatron turns all buffers into BF16 when it wraps the model. It turns the biases back to float32 at the first
    forward pass, but they are rounded by then. NeMo loads the base before Megatron wraps it when adapters or heads are
    trained, so these would be trained on another base than the given one.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    wrap(TopKRouter, "_apply", _but_exact_counts, MEGATRON)


def _but_exact_counts(convert: Callable[..., Any]) -> Callable[..., Any]:
    """nn.Module._apply, which converts all buffers, without those that the router must keep exact."""

    @functools.wraps(convert)
    def apply(router: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = ("expert_bias", "local_tokens_per_expert") if router.enable_expert_bias else ()
        exact = {name: getattr(router, name) for name in names}
        convert(router, function, recurse)
        for name, buffer in exact.items():
            # A move to another device is wanted, a conversion is not.
            setattr(router, name, buffer.to(getattr(router, name).device))
        return router

    return apply


def join_in_place() -> None:
    """Let the halves of gate and up, which are read into the weight itself, be that weight once they are read.

    Megatron makes a second weight of them, of all layers at the same time: gpt_oss_20b took 67 GB while it was
    loaded, and 42 afterwards. Where that is too much it goes on in the host's memory.
    """
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import experts

    for module in (mlp, experts):
        wrap(module, "apply_swiglu_sharded_factory", _joining_in_place, MEGATRON)


def _joining_in_place(split: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(split)
    def found(*arguments: Any, **options: Any) -> Any:
        factory = split(*arguments, **options)
        return dataclasses.replace(factory, merge_fn=functools.partial(joined, otherwise=factory.merge_fn))

    return found


@torch.no_grad()
def joined(parts: Any, otherwise: Callable[[Any], Any]) -> Any:
    """One tensor of parts along its first dimension: without a copy where they follow each other in memory.

    Args:
        otherwise: what makes it of them else.
    """
    plain = isinstance(parts, list) and all(type(part) is Tensor and part.is_contiguous() for part in parts)
    if not plain or not all(itertools.starmap(_follows, itertools.pairwise(parts))):
        return otherwise(parts)
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _follows(one: Tensor, other: Tensor) -> bool:
    """Whether the other begins in memory where the one ends, and they differ at most in their first dimension."""
    alike = (one.dtype, one.shape[1:]) == (other.dtype, other.shape[1:])
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return alike and same and one.data_ptr() + one.nbytes == other.data_ptr()


def leave_metrics_in_place() -> None:
    """Do not take a logged number apart to move it to the device that it is on: 0.8 ms, nine times in each step.

    The GPU has nothing to do meanwhile.
    """
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

    wrap(_ResultMetric, "to", _only_elsewhere, LIGHTNING)


def _only_elsewhere(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def moved(self: Any, *arguments: Any, **options: Any) -> Any:
        is_there = self.is_tensor and not options and arguments == (self.value.device,)
        return self if is_there else to(self, *arguments, **options)

    return moved


def turn_packed_positions() -> None:
    """Give context parallel ranks the angles of all positions of packed samples with YaRN, as with plain ones.

    Megatron takes this rank's share of them, as of one sequence for all, and then again of each sample's. To be called
    where samples are packed.
    """
    from megatron.core.models.common.embeddings import YarnRotaryEmbedding

    wrap(YarnRotaryEmbedding, "forward", _of_all_positions, MEGATRON)


def _of_all_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(self: Any, max_seq_len: int, offset: int = 0, packed_seq: bool = True) -> Any:
        return forward(self, max_seq_len, offset, True)

    return found


def leave_weights_in_place() -> None:
    """Do not copy the model and the optimizer's state from the GPU when the run ends: 30 s for 42 GB, and the memory.

    The process ends then.
    """
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import strategy

    wrap(LightningModule, "cpu", _staying, LIGHTNING)
    wrap(strategy, "_optimizers_to_device", _staying_on_the_gpu, LIGHTNING)


def _staying(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module: module


def _staying_on_the_gpu(move: Callable[..., None]) -> Callable[..., None]:
    def moved(optimizers: Any, device: Any) -> None:
        if torch.device(device).type != "cpu":
            move(optimizers, device)

    return moved


def scale_auxiliary_loss(config: Any, recipe: Recipe) -> None:
    """Make the routers' auxiliary loss as large as in one process.

    Under calculate_per_token_loss Megatron multiplies it by the tokens of a rank. Where ranks share a sequence, these
    are only a part of the tokens that the loss is divided by later.
    """
    if getattr(config, "moe_aux_loss_coeff", 0):
        config.moe_aux_loss_coeff *= recipe.tensor_parallel_size * recipe.context_parallel_size


def keep_latent_epsilon(module: nn.Module) -> nn.Module:
    """Give the norms inside latent attention the epsilon of DeepSeek's code, which is not in config.json.

    Megatron has one epsilon for all norms. Moonlight has 1e-5 for those between its layers.

    Errors: PreflightError where an attention has no such norm.
    """
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    for attention in module.modules():
        if isinstance(attention, MLASelfAttention):
            # Transformer Engine fuses a norm into the projection behind it. Queries may have none, keys have one.
            parts = (getattr(attention, name, None) for name in LATENT_NORMS)
            norms = [part for part in parts if part is not None and hasattr(part, "eps")]
            for norm in norms:
                replace(norm, "eps", LATENT_EPSILON, MEGATRON)
            if not norms:
                raise PreflightError(f"{MEGATRON.package} has none of {LATENT_NORMS} in its latent attention; {CURE}")
    return module


def give_every_weight_a_value(module: nn.Module) -> nn.Module:
    """Let the sinks of an attention and the biases of a router begin at 0.

    Transformer Engine and Megatron leave them as the memory was, NaN among others. A checkpoint brings its own; `bench`
    has none.
    """
    from megatron.core.transformer.moe.router import Router

    for part in module.modules():
        begin = [getattr(part, "softmax_offset", None), part.bias if isinstance(part, Router) else None]
        for weight in begin:
            if isinstance(weight, nn.Parameter):
                nn.init.zeros_(weight)
    return module


def carry_gradients_to_the_first_layer(module: nn.Module) -> None:
    """Let what a frozen embedding gives have a gradient where layers are computed again in the backward pass.

    Megatron computes a layer again only if its input has a gradient. Behind a frozen embedding the first one has none,
    so its output has none either, and so on through the whole stage: no adapter in it would ever learn.
    """
    from megatron.core.models.gpt import GPTModel

    for gpt in module.modules():
        if isinstance(gpt, GPTModel) and gpt.pre_process and gpt.config.recompute_granularity == "full":
            gpt.embedding.register_forward_hook(lambda _, __, hidden: hidden.requires_grad_(torch.is_grad_enabled()))


def mark_experts(module: nn.Module) -> nn.Module:
    """Mark which weights of experts differ from rank to rank (`allreduce` is False), before Megatron wraps the model.

    Whole experts on tensor parallel ranks see the tokens of their own rank; without expert parallelism Megatron reduces
    them over the data-parallel ranks alone. NeMo marks all adapters on experts as the same on every rank, which is
    right only for the one adapter that all grouped experts share.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP

    experts = parallel_state.get_expert_model_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    if experts == tensor == 1:
        return module
    for part in module.modules():
        if isinstance(part, (GroupedMLP, SequentialMLP, TEGroupedMLP)):
            for name, parameter in part.named_parameters():
                parameter.allreduce = ".adapter." in name and not isinstance(part, SequentialMLP)
    return module
