"""Logits of a NeMo checkpoint in one process: what proves a conversion, on the CPU or on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.checkpoint.torch_dist import PREFIX

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor


def logits_of(checkpoint: Path, tokens: Tensor) -> Tensor:
    """float32 [batch, sequence, vocabulary] from NeMo's model with the checkpoint's weights.

    Args:
        checkpoint: NeMo checkpoint, as `import` writes it.
        tokens: int64 [batch, sequence].
    """
    import torch

    module = load(checkpoint)
    module.mtp_process = False  # what multi-token prediction adds is a loss, for which it wants labels
    tokens = tokens.to(next(module.parameters()).device)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        return module(input_ids=tokens, position_ids=positions, attention_mask=None).float().cpu()


def load(checkpoint: Path) -> GPTModel:
    """NeMo's model in evaluation mode, its weights loaded by megatron-core's own reader; in float32."""
    from entrypoints.training.worker import quiet

    quiet()
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from entrypoints.training import cpu

        cpu.enable()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from entrypoints.training.repairs import read_and_write_plain_files

    read_and_write_plain_files()
    from nemo.lightning.io import load_context

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = load_context(checkpoint / "context", subpath="model")
    if on_gpu:  # in BF16 a token may go to other experts, and its logits are then another token's
        model.config.bf16 = False
        model.config.params_dtype = model.config.pipeline_dtype = model.config.autocast_dtype = torch.float32
    else:
        cpu.configure_model(model.config)
    module = model.config.configure_model(tokenizer=None).eval().cuda()
    for parameter in module.parameters():  # and no buffer: a router's expert_bias stays float32
        parameter.data = parameter.data.to(model.config.params_dtype)
    loaded = dist_checkpointing.load(module.sharded_state_dict(prefix=PREFIX), str(checkpoint / "weights"))
    module.load_state_dict({key.removeprefix(PREFIX): value for key, value in loaded.items() if key.startswith(PREFIX)})
    return module
