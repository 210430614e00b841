"""What a run changes in NeMo, Megatron, Transformer Engine, Lightning and torch. Imported where these are imported."""

from __future__ import annotations

from slipway.training.activations import bring_activations
from slipway.training.adapted_activation import activate_between_adapters
from slipway.training.loading import read_in_threads
from slipway.training.low_rank import add_in_place
from slipway.training.padding import ignore_padding
from slipway.training.planning import plan_quickly
from slipway.training.recipe import Recipe
from slipway.training.repairs import (
    hand_over_in_this_process,
    join_in_place,
    keep_no_copies,
    keep_no_scales,
    keep_routers_counts,
    leave_metrics_in_place,
    leave_weights_in_place,
    turn_packed_positions,
)


def change_all(recipe: Recipe, on_gpu: bool) -> None:
    """Apply every change that a run of this recipe takes, before a model is made."""
    hand_over_in_this_process()
    join_in_place()
    read_in_threads()
    plan_quickly()
    keep_routers_counts()
    leave_metrics_in_place()
    leave_weights_in_place()
    ignore_padding()
    if recipe.pack:
        turn_packed_positions()
    add_in_place()
    activate_between_adapters()
    bring_activations()
    if on_gpu:
        _bring_kernels(recipe)
    if not recipe.cuda_graphs:
        from slipway.training.graphs import record_nothing

        record_nothing()
    if recipe.base_precision == "nf4":
        from slipway.training.nf4_base import pack_base

        pack_base()


def _bring_kernels(recipe: Recipe) -> None:
    from slipway.training.experts import group_products
    from slipway.training.parting import part_in_one_kernel
    from slipway.training.quantised import quantise_once
    from slipway.training.rotary import turn_in_one_kernel

    group_products()
    turn_in_one_kernel()
    part_in_one_kernel()
    if recipe.precision == "fp8":
        keep_no_scales()
        keep_no_copies()
        quantise_once()
    if recipe.pack:
        from slipway.training.sinks import attend_with_sinks

        attend_with_sinks()
