"""Real NeMo and Megatron on a machine without a GPU, for tiny models: the demo, the tests and CI.

Megatron-core asks for CUDA devices, streams and random states without looking whether there are any. `enable()`
answers all of that with the CPU; `configure_model()` chooses the parts of Megatron that need no kernel of Transformer
Engine. Nothing here is used where torch sees a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from slipway.training.imports import compile_nothing
from slipway.training.patches import MEGATRON, NEMO, TORCH, define, replace, wrap

CPU = torch.device("cpu")
GPU_ONLY = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
# Functions of torch.cuda that have nothing to do on the CPU, and those that return sizes of a GPU's memory.
NOTHING_TO_DO = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
NO_MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


def enable() -> None:
    """Make this process run Megatron on the CPU. Call it before NeMo or Megatron is imported. It may be called again.

    Errors: RuntimeError where Transformer Engine or Apex is imported already, PreflightError from patches.py.
    """
    _without_kernels()
    _without_compiling()
    _stand_in_for_cuda()
    _every_call_on_the_cpu()
    _patch_nemo()
    _patch_megatron()


@functools.cache
def _every_call_on_the_cpu() -> None:
    # Modes are stacked: a second one would do the same work again at every call of torch.
    _OnCpu().__enter__()


class _OnCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device means the CPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function is torch.Tensor.cuda:
            return arguments[0]
        if _is_cuda(keywords.get("device")):
            keywords["device"] = CPU
        if function is torch.Tensor.to:
            arguments = tuple(CPU if _is_cuda(argument) else argument for argument in arguments)
        if function is torch.Tensor.type and len(arguments) == 1 and not keywords:
            # Megatron's optimizer refuses parameters whose type is not "torch.cuda.FloatTensor".
            return function(*arguments).replace("torch.", "torch.cuda.")
        keywords.pop("pin_memory", None)  # pinning needs the CUDA driver
        return function(*arguments, **keywords)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _without_kernels() -> None:
    """Transformer Engine and Apex count as not installed: what Megatron takes from them runs on GPUs alone."""
    for name in GPU_ONLY:
        if sys.modules.get(name):
            raise RuntimeError(f"{name} is imported already; call cpu.enable() before NeMo and Megatron")
        sys.modules[name] = None  # type: ignore[assignment] # an import of it raises ModuleNotFoundError


def _without_compiling() -> None:
    """No C++ compiler is needed, and no time spent in one: tiny models run faster than they compile."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # read when torch's compiler is imported
    if known := sys.modules.get("torch._dynamo.config"):
        known.disable = True  # type: ignore[attr-defined]
    compile_nothing()


class _Stream:
    """Work on the CPU is done when the call returns, so a stream or an event has nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _stand_in_for_cuda() -> None:
    """Megatron calls torch.cuda without asking whether there is a GPU: each call gets the CPU's answer."""
    states = {
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    answers = {
        "current_device": lambda: CPU,
        "stream": lambda _: contextlib.nullcontext(),
        "manual_seed": torch.default_generator.manual_seed,
        **dict.fromkeys(("Stream", "Event"), _Stream),
        **dict.fromkeys(("current_stream", "default_stream"), lambda *_: _Stream()),
        **dict.fromkeys(NOTHING_TO_DO, lambda *_, **__: None),
        **dict.fromkeys(NO_MEMORY, lambda *_, **__: 0),
    }
    for name, answer in (answers | states).items():
        replace(torch.cuda, name, answer, TORCH)
    for name, answer in states.items():
        replace(torch.cuda.random, name, answer, TORCH)  # torch.random calls them by this name


def _patch_nemo() -> None:
    from nemo.collections.llm.peft import dora, lora
    from nemo.collections.llm.peft import utils as peft_utils
    from nemo.lightning.io import pl
    from nemo.lightning.pytorch.strategies import megatron_strategy

    # Asserts that CUDA is initialised; there are no devices to choose from here.
    replace(pl, "_fix_tensors_device", lambda checkpoint: checkpoint, NEMO)
    # Both say that Transformer Engine is there, because Megatron's module about it can be imported without it.
    replace(peft_utils, "HAVE_TE", False, NEMO)
    for module in (lora, dora):
        wrap(module, "get_adapter_attributes_from_linear", _and_of_whole_matrices, NEMO)
    replace(lora, "te", types.SimpleNamespace(Linear=type("Linear", (), {})), NEMO)
    wrap(megatron_strategy, "init_model_parallel", _and_seed, NEMO)


def _and_seed(init_model_parallel: Callable[..., None]) -> Callable[..., None]:
    """Megatron's random states are set up with the first CUDA device, which never comes."""
    from megatron.core import tensor_parallel

    @functools.wraps(init_model_parallel)
    def init_model_parallel_and_seed(model: Any = None) -> None:
        init_model_parallel(model)
        tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)

    return init_model_parallel_and_seed


def _patch_megatron() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    set_state = torch.cuda.set_rng_state  # the CPU's by now
    replace(tensor_parallel.random, "_set_cuda_rng_state", set_state, MEGATRON)
    define(moe_utils, "te_general_gemm", None, MEGATRON)  # it is used, but imported only with Transformer Engine
    # Llama's configuration wants to see a fused kernel when it is made, before configure_model turns that off.
    wrap(rope_utils, "fused_apply_rotary_pos_emb", lambda kernel: kernel or NotImplemented, MEGATRON)
    wrap(tensor_parallel.RowParallelLinear, "forward", _and_clone, MEGATRON)
    wrap(torch_norm.WrappedTorchNorm, "__new__", _norm_under_sequence_parallelism, MEGATRON)
    wrap(FusedScaleMaskSoftmax, "forward_torch_softmax", _window_in_mask, MEGATRON)
    # The dispatcher has imported it by name.
    for module in (moe_utils, token_dispatcher):
        replace(module, "maybe_move_tensor_to_cpu", _maybe_as_numpy, MEGATRON)


def _and_clone(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An expert adds its bias in place, which autograd refuses on what a custom function returned."""

    @functools.wraps(forward)
    def forward_and_clone(self: Any, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = forward(self, input_)
        return output.clone() if output.requires_grad else output, bias

    return forward_and_clone


def _window_in_mask(softmax: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Where a layer has a window Megatron forgets the mask that it was given, which keeps packed samples apart."""
    from megatron.core.transformer.utils import get_sliding_window_causal_mask

    @functools.wraps(softmax)
    def softmax_of_both(
        self: Any, scores: torch.Tensor, mask: torch.Tensor | None, *sinks: torch.Tensor | None
    ) -> torch.Tensor:
        window = self.window_size
        if mask is None or window is None:
            return softmax(self, scores, mask, *sinks)
        self.window_size = None
        try:
            return softmax(self, scores, mask | get_sliding_window_causal_mask(*scores.shape[2:], window), *sinks)
        finally:
            self.window_size = window

    return softmax_of_both


def _maybe_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's function converts CUDA tensors only, and the all-to-all then refuses its split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _norm_under_sequence_parallelism(make: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Megatron refuses torch's norms there. They work on each token alone; only the gradient of the weight, which comes
    from this rank's tokens, must be summed over the ranks, and Megatron does so for what is marked."""

    def make_and_mark(cls: type, config: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = make(cls, plain, *arguments, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return make_and_mark


# ---------------------------------------------------------------------------- the model

UNFUSED = {
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "deallocate_pipeline_outputs": False,
}


def configure_model(config: Any) -> None:
    """Turn a NeMo GPTConfig, in place, into one that needs neither Transformer Engine nor fused kernels.

    All arithmetic is float32: the CPU's bfloat16 is slow and no closer to a GPU's.
    """
    for name, value in UNFUSED.items():
        replace(config, name, value, MEGATRON)
    config.transformer_layer_spec = local_layer_spec
    config.bf16 = config.fp16 = False
    config.params_dtype = config.pipeline_dtype = config.autocast_dtype = torch.float32


def local_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's layers in plain torch, saved under the same keys as Transformer Engine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    block.layer_norm = WrappedTorchNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        keys = parts.sharded_state_dict_keys_map
        if config.multi_latent_attention:
            attention = parts.self_attention.submodules
            attention.core_attention = attention_of_mla()
            attention.linear_q_down_proj = attention.linear_kv_down_proj = linear_on_every_rank()
            keys |= MLA_KEYS
        # Transformer Engine fuses the norm with a dense MLP and keeps the one before experts as it is.
        if parts.mlp.module is MoELayer:
            keys.pop("pre_mlp_layernorm.", None)
        else:
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return block


MLA_KEYS = {
    f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_" for part in ("q", "kv")
}


@functools.cache
def attention_of_mla() -> type:
    """Megatron's attention in plain torch, which sizes its output by kv_channels: here the size of a value head."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(self, *, k_channels: int | None = None, v_channels: int | None = None, **options: Any) -> None:
            super().__init__(**options)

    return Attention


class WholeLinear(torch.nn.Module):
    """A projection that every tensor parallel rank has whole. Returns (output, no bias), as Megatron's layers do.

    It is no torch.nn.Linear: NeMo would take it for a layer that returns its output alone.
    """

    def __init__(self, inputs: int, outputs: int, config: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.config = inputs, outputs, config
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # each rank sees its own tokens

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(input_, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """What Megatron saves: the whole matrix, the same on every rank."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


def _and_of_whole_matrices(attributes: Callable[..., Any]) -> Callable[..., Any]:
    """What NeMo asks of a layer that gets an adapter. It knows whole projections only as Transformer Engine's."""

    @functools.wraps(attributes)
    def of(layer: Any) -> Any:
        if isinstance(layer, WholeLinear):
            return False, layer.in_features, layer.out_features, not layer.config.sequence_parallel, False
        return attributes(layer)

    return of


@functools.cache
def linear_on_every_rank() -> type:
    """What Transformer Engine projects down with in multi-latent attention: the same whole matrix on every tensor
    parallel rank. Megatron's own way, to share it, forgets the other ranks' heads in the gradient of the rotary key.
    """
    from megatron.core.transformer import multi_latent_attention

    class Linear(WholeLinear):
        def __init__(self, inputs: int, outputs: int, *, config: Any, parallel_mode: str, **_: Any) -> None:
            assert parallel_mode == "duplicated"
            super().__init__(inputs, outputs, config)

    # Megatron passes parallel_mode to this class alone.
    replace(multi_latent_attention, "TELinear", Linear, MEGATRON)
    return Linear
