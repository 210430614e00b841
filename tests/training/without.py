"""How each repair of NeMo and Megatron is taken away from a process that has them all, to see what goes wrong then.

Import it after forked.import_nemo().
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from slipway.training import cpu, dispatch, heads_on_nemo, modes, padding, patches, repairs

MEGATRON, PEFT = "megatron.core", "nemo.collections.llm.peft"
MOVE = [f"{MEGATRON}.transformer.moe.{module}.maybe_move_tensor_to_cpu" for module in ("moe_utils", "token_dispatcher")]


def undo(*names: str) -> Callable[[], None]:
    """What takes patches back, by the full names of the attributes that they changed."""

    def take_back() -> None:
        for name in names:
            patch = patches.APPLIED[name]
            if patch.before is patches.MISSING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.before)

    return take_back


def change(owners: Any, **new: Any) -> Callable[[], None]:
    """What gives a module or a class of ours, or several of them, another part."""
    ((name, part),) = new.items()

    def give() -> None:
        for owner in owners if isinstance(owners, tuple) else (owners,):
            setattr(owner, name, part)

    return give


def leave_out_nothing() -> None:
    """The schedule with its backward half."""
    modes.MODES["heads"] = dataclasses.replace(modes.MODES["heads"], prepare=lambda: None)


def send_copies() -> None:
    """One for each expert of a token, as Megatron does."""
    dispatch.sends_less = lambda config, recipe: False


def send_copies_of_what_stays() -> None:
    send_copies()
    undo(*MOVE)()


# Repair → what takes it away. Those without a patch of their own are functions of ours.
WITHOUT: dict[str, Callable[[], None]] = {
    "mark_experts": lambda: (
        [change(module, mark_experts=lambda model: model)() for module in (repairs, modes)] and None
    ),
    "scale_auxiliary_loss": change(repairs, scale_auxiliary_loss=lambda config, recipe: None),
    "ignore_padding": change(padding, ignore_padding=lambda: None),
    "tensor_parallel.checkpoint": change(padding, _with_its_own_mask=lambda checkpoint: checkpoint),
    "carry_gradients_to_the_first_layer": change(modes, carry_gradients_to_the_first_layer=lambda model: None),
    "LoRA._begin": change(modes.LoRA, _begin=lambda self, layer: None),
    "FromBase": lambda: delattr(heads_on_nemo.FromBase, "apply_transform"),
    "leave_out_backward": leave_out_nothing,
    "linear_on_every_rank": change(cpu, linear_on_every_rank=lambda: ColumnParallelLinear),
    "attention_of_mla": change(cpu, attention_of_mla=lambda: DotProductAttention),
    "RowParallelLinear.forward": undo(f"{MEGATRON}.tensor_parallel.layers.RowParallelLinear.forward"),
    "WrappedTorchNorm.__new__": undo(f"{MEGATRON}.transformer.torch_norm.WrappedTorchNorm.__new__"),
    "maybe_move_tensor_to_cpu": send_copies_of_what_stays,
    "sends_less": send_copies,
    "te_general_gemm": undo(f"{MEGATRON}.transformer.moe.moe_utils.te_general_gemm"),
    "fused_apply_rotary_pos_emb": undo(f"{MEGATRON}.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb"),
    "_fix_tensors_device": undo("nemo.lightning.io.pl._fix_tensors_device"),
    "utils.HAVE_TE": undo(f"{PEFT}.utils.HAVE_TE"),
    "lora.te": undo(f"{PEFT}.lora.te"),
    "init_model_parallel": undo("nemo.lightning.pytorch.strategies.megatron_strategy.init_model_parallel"),
}


def take_away(repair: str) -> None:
    """Go on without a repair: what is patched already is undone, and is not patched again."""
    WITHOUT[repair]()
    cpu.enable = lambda: None
