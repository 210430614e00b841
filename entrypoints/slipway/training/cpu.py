"""Real NeMo and Megatron on a machine without a GPU, for tiny models: the demo, the tests and CI.

Megatron-core asks for CUDA devices, streams and random states without looking whether there are any. `enable()`
answers all of that with the CPU; `configure_model()` and `strategy()` choose the parts of Megatron and NeMo that
need no kernel of Transformer Engine. Nothing here is used where torch sees a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
GPU_ONLY = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")


def enable() -> None:
    """Make this process run Megatron on the CPU. Call before NeMo or Megatron is imported; says so once."""
    _without_kernels()
    _without_compiling()
    _stand_in_for_cuda()
    _OnCpu().__enter__()
    _patch_nemo_and_megatron()


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
            return function(*arguments).replace("torch.", "torch.cuda.")  # what Megatron's optimizer asserts
        keywords.pop("pin_memory", None)
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
        sys.modules[name] = None  # an import of it raises ModuleNotFoundError


def _without_compiling() -> None:
    """No C++ compiler is needed, and no time spent in one: tiny models run faster than they compile."""
    import torch._dynamo
    from torch.utils import cpp_extension

    torch._dynamo.config.disable = True

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no GPU: CUDA extensions are not compiled")

    # Megatron compiles a CUDA allocator when it is imported, wherever it finds nvcc.
    cpp_extension.load_inline = refuse


class _Stream:
    """Work on the CPU is done when the call returns, so a stream or an event has nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


def _stand_in_for_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = cuda.synchronize = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_, **__: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)


def _patch_nemo_and_megatron() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as peft_utils
    from nemo.lightning.io import pl
    from nemo.lightning.pytorch.strategies import megatron_strategy

    # Asserts that CUDA is initialised; there are no devices to choose from here.
    pl._fix_tensors_device = lambda checkpoint: checkpoint
    tensor_parallel.random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # Named but not defined where Transformer Engine is absent; no module is of these classes.
    moe_utils.te_general_gemm = None
    peft_utils.HAVE_TE = False
    lora.te = types.SimpleNamespace(Linear=type("Linear", (), {}))
    # Llama's configuration wants to see a fused kernel when it is made, before configure_model turns that off.
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb or NotImplemented

    # An expert adds its bias in place, which autograd refuses on what a custom function returned.
    row_parallel = tensor_parallel.RowParallelLinear.forward

    @functools.wraps(row_parallel)
    def row_parallel_and_clone(self, input_):
        output, bias = row_parallel(self, input_)
        return output.clone() if output.requires_grad else output, bias

    tensor_parallel.RowParallelLinear.forward = row_parallel_and_clone
    torch_norm.WrappedTorchNorm.__new__ = _norm_under_sequence_parallelism(torch_norm.WrappedTorchNorm.__new__)

    @functools.wraps(moe_utils.maybe_move_tensor_to_cpu)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        # The original converts CUDA tensors only, and the all-to-all then refuses its split sizes.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    init_model_parallel = megatron_strategy.init_model_parallel

    @functools.wraps(init_model_parallel)
    def init_model_parallel_and_seed(model=None):
        # Megatron's random states are set up with the first CUDA device, which never comes.
        init_model_parallel(model)
        tensor_parallel.model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)

    megatron_strategy.init_model_parallel = init_model_parallel_and_seed
    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _norm_under_sequence_parallelism(make: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Megatron refuses torch's norms there, which works on each token alone: its weight's gradient must be summed."""

    def make_and_mark(cls, config, *arguments, **options):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = make(cls, plain, *arguments, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return make_and_mark


# ---------------------------------------------------------------------------- the model and the strategy

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
        if hasattr(config, name):
            setattr(config, name, value)
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


@functools.cache
def linear_on_every_rank() -> type:
    """What Transformer Engine projects down with in multi-latent attention: the same whole matrix on every tensor
    parallel rank. Megatron's own way, to share it, forgets the other ranks' heads in the gradient of the rotary key.
    """
    from megatron.core.transformer import multi_latent_attention

    class Linear(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, *, config: Any, parallel_mode: str, **_: Any) -> None:
            assert parallel_mode == "duplicated"
            super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
            self.weight.sequence_parallel = config.sequence_parallel  # each rank sees its own tokens

        def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
            return super().forward(input_), None

    multi_latent_attention.TELinear = Linear  # the class that is asked for when it is given parallel_mode
    return Linear


def strategy(**options: Any) -> Any:
    """NeMo's MegatronStrategy over gloo; `options` are its own.

    Timers stay off: NeMo's progress line makes rank 0 alone read them, and reading is a collective.
    """
    import nemo.lightning as nl

    made = nl.MegatronStrategy(process_group_backend="gloo", **options)
    made.timers = None
    return made
