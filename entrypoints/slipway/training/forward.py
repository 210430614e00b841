"""Logits of a checkpoint in one process, on the CPU or on one GPU: they prove that a conversion is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slipway.checkpoint import handover
from slipway.checkpoint.compare import Different, Model
from slipway.checkpoint.torch_dist import PREFIX
from slipway.errors import DataError
from slipway.launch.quiet import quiet
from slipway.tensors.bits import to_torch
from slipway.training.patches import MEGATRON, replace

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor


TOKENS = 64
# The same float32 arithmetic in another order differs in the last bits. Wrong weights differ by 0.1 and more.
TOLERANCE = 1e-4
TOLERANCE_ON_GPU = 0.02  # Transformer Engine multiplies float32 as TF32


@dataclass
class Logits:
    """How much two forward passes differ: in any logit, and how often the most likely token is the same."""

    max_difference: float
    top1_agreement: float
    tolerance: float

    def __str__(self) -> str:
        agreement = f"{self.top1_agreement:.1%} of the first choices agree"
        return f"logits differ by at most {self.max_difference:.2g} (bound {self.tolerance:g}), {agreement}"


def compare_logits(first: Model, second: Model, tolerance: float | None) -> Logits:
    """Run both models on the same random tokens. Different is raised if a logit differs by more than the tolerance.

    Args:
        tolerance: largest allowed difference of two logits; None = TOLERANCE, or TOLERANCE_ON_GPU on a GPU.
    """
    for model in (first, second):
        if model.nemo:  # both, before either of them takes half a minute
            handover.check(model.path)
    import torch

    if tolerance is None:
        tolerance = TOLERANCE_ON_GPU if torch.cuda.is_available() else TOLERANCE
    tokens = random_tokens(first.config["vocab_size"], TOKENS)
    one, other = (logits_of(model, tokens) for model in (first, second))
    difference = (one - other).abs().max().item()
    agreement = (one.argmax(-1) == other.argmax(-1)).float().mean().item()
    logits = Logits(difference, agreement, tolerance)
    if not difference <= tolerance:  # a NaN is never within it
        raise Different(f"{first.path} and {second.path} have the same tensors, but their {logits}")
    return logits


def logits_of_nemo(checkpoint: Path, tokens: Tensor) -> Tensor:
    """float32 [batch, sequence, vocabulary] from NeMo's model with the checkpoint's weights.

    Args:
        checkpoint: NeMo checkpoint, as `import` writes it.
        tokens: int64 [batch, sequence].
    """
    import torch

    module = load(checkpoint)
    # Multi-token prediction adds a loss only, and needs labels for it.
    replace(module, "mtp_process", False, MEGATRON)
    tokens = tokens.to(next(module.parameters()).device)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        return module(input_ids=tokens, position_ids=positions, attention_mask=None).float().cpu()


def load(checkpoint: Path) -> GPTModel:
    """NeMo's model in float32 and in evaluation mode. Its weights are loaded by megatron-core's own reader."""
    handover.check(checkpoint)
    quiet()
    import torch

    from slipway.training.imports import import_less

    on_gpu = torch.cuda.is_available()
    import_less()
    if not on_gpu:
        from slipway.training import cpu

        cpu.enable()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from slipway.training.repairs import hand_over_in_this_process, join_in_place, keep_latent_epsilon

    hand_over_in_this_process()
    join_in_place()
    from slipway.training.context import model_of

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = model_of(checkpoint)
    if on_gpu:  # in BF16 a router may choose other experts, and the logits would differ very much
        model.config.bf16 = False
        model.config.params_dtype = model.config.pipeline_dtype = model.config.autocast_dtype = torch.float32
    else:
        cpu.configure_model(model.config)
    module = keep_latent_epsilon(model.config.configure_model(tokenizer=None)).eval().cuda()
    for parameter in module.parameters():  # but not the buffers: a router's expert_bias stays float32
        parameter.data = parameter.data.to(model.config.params_dtype)
    loaded = dist_checkpointing.load(module.sharded_state_dict(prefix=PREFIX), str(checkpoint / "weights"))
    module.load_state_dict({key.removeprefix(PREFIX): value for key, value in loaded.items() if key.startswith(PREFIX)})
    return module


def random_tokens(vocabulary: int, count: int) -> Tensor:
    """A fixed batch of one sequence, int64 [1, count]."""
    import torch

    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def logits_of(model: Model, tokens: Tensor) -> Tensor:
    """float32 [batch, sequence, vocabulary], by transformers in float32 or by NeMo."""
    if model.nemo:
        return logits_of_nemo(model.path, tokens)
    return _logits_of_transformers(model, tokens)


def _logits_of_transformers(model: Model, tokens: Tensor) -> Tensor:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    model = model.without_mtp()  # transformers does not implement it
    config = AutoConfig.for_model(**model.config)
    with no_init_weights():
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = module.state_dict()
    if missing := [name for name in model.rules.hf if name not in state]:
        raise DataError(f"{model.path}: transformers has no tensor {missing[0]} in this model; check its config.json")
    for cell in model.rules.cells:
        for ref, part in zip(cell.hf, model.read(cell), strict=True):
            whole = state[ref.name][ref.index]
            tensor = to_torch(part, model.rules.hf[ref.name].dtype)
            (whole if ref.rows is None else whole[slice(*ref.rows)]).copy_(tensor)
    module.tie_weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        return module.to(device)(tokens.to(device)).logits.float().cpu()
