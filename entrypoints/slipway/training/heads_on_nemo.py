"""The heads as an extension of NeMo: a PEFT transform and a forward step.

NeMo's PEFT classes load the base, freeze it and call `HeadsTransform`, which attaches the trainable part. From then on
they save only that part, under keys that contain `.adapter.`. The forward step runs the base without a gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPT
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.callbacks.peft import PEFT
from torch import Tensor
from torch.nn import functional

from slipway.training.graphs import run_graphed
from slipway.training.heads import DecodingHeads
from slipway.training.heads_loss import heads_loss
from slipway.training.patches import NEMO, replace, wrap
from slipway.training.steps import hidden_states, last_stage, megatron_gpt, output_weight


class FromBase(PEFT):
    """A PEFT method that remembers its base. After a resume NeMo notes the checkpoint of the adapter as its base, and
    the next resume fails. `base` is the checkpoint of the base model."""

    base: str

    def apply_transform(self, trainer: Any) -> None:
        super().apply_transform(trainer)
        replace(self.wrapped_io, "model_ckpt_path", Path(self.base), NEMO)


class HeadsTransform(FromBase):
    """Attaches the heads to the last pipeline stage as `adapter`; everything else is frozen.

    Args:
        base: the checkpoint of the base model, which is noted beside the heads.
        seed: of the first weights, so that they are the same on every rank and in every layout.
        use_enhanced_features: see DecodingHeads.
    """

    def __init__(self, base: str, seed: int = 1234, use_enhanced_features: bool = True) -> None:
        super().__init__()
        self.base, self.seed, self.use_enhanced_features = base, seed, use_enhanced_features

    def transform(self, module: torch.nn.Module, name: str | None = None, prefix: str | None = None):
        if isinstance(module, MegatronGPT) and module.post_process:
            # A seed of their own, and the state of all other random numbers stays as it was.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                heads = DecodingHeads(module.config.hidden_size, self.use_enhanced_features)
            module.adapter = heads.to(next(module.parameters()).device)
        return module


def heads_step(model: torch.nn.Module, batch: dict[str, Tensor | None]) -> Tensor | tuple[Tensor, Tensor]:
    """(sum of losses, number of tokens) on the last stage, hidden states on the others. The base has no gradient.

    The gradients of the heads are computed here, because nothing has to go back through the pipeline.
    """
    gpt = megatron_gpt(model)
    with torch.no_grad(), frozen(gpt):
        hidden = run_graphed(gpt, functools.partial(hidden_states, gpt), batch)
    if not gpt.post_process:
        return hidden

    weight = output_weight(gpt)
    if gpt.config.sequence_parallel:  # each rank has the hidden states of its part of the sequence
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    total, count = heads_loss(
        gpt.adapter,
        hidden.transpose(0, 1).reshape(-1, hidden.size(-1)),
        lambda rows: functional.linear(rows, weight),
        last_stage(batch, "labels").reshape(-1),
        last_stage(batch, "loss_mask").reshape(-1).bool(),
        last_stage(batch, "drop_if_easy").reshape(-1),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    if torch.is_grad_enabled():  # not while it is evaluated
        total.backward()
    return total.detach(), count


def leave_out_backward() -> None:
    """From now on NeMo's training step is only the forward half of Megatron's pipeline schedule.

    In the backward half every stage would wait for the gradient of what it sent, which a frozen base never computes.
    """
    wrap(MegatronStep, "forward_backward_func", _property_of_forward_alone, NEMO)


def _property_of_forward_alone(found: functools.cached_property) -> property:
    return property(lambda step: _forward_alone(found.func(step)))


def _forward_alone(schedule: Callable[..., list[dict[str, Tensor]]]) -> Callable[..., list[dict[str, Tensor]]]:
    """The schedule, and then what Megatron does with the gradients at the end of a step."""

    def run(*, model: Any, forward_only: bool, **options: Any) -> list[dict[str, Tensor]]:
        losses = schedule(model=model, forward_only=True, **options)
        if not forward_only:
            chunks = model if isinstance(model, list) else [model]
            # Megatron divides by the number of tokens of all ranks. Only the last stage knows it and tells the others.
            count = torch.zeros((), dtype=torch.int, device=torch.cuda.current_device())
            count += sum(int(part["sum_and_count"][1]) for part in losses)
            get_model_config(chunks[0]).finalize_model_grads_func(chunks, count)
        return losses

    return run


@contextlib.contextmanager
def frozen(gpt: MegatronGPT) -> Iterator[None]:
    """The base in evaluation mode (no dropout, no update of routers), without its layers for multi-token prediction."""
    if gpt.training:  # NeMo's PEFT puts the frozen base into training mode, and again after an evaluation
        gpt.eval()
    mtp_process, gpt.mtp_process = gpt.mtp_process, False
    try:
        yield
    finally:
        gpt.mtp_process = mtp_process
