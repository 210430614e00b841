"""Which recipe a checkpoint gets when none is named, and how it fits the GPUs that are there.

What a person asked for by a flag or --set stays as it is. Everything else may change: the parallel sizes, recomputation
and the global batch, by the memory estimate (memory.py). Each change is said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slipway.errors import PreflightError, UsageError
from slipway.options import flag
from slipway.training import memory, recipes, weights
from slipway.training.recipe import Recipe

SHARE = 0.92  # of a GPU's memory that the estimate may take; estimates were within 5 % of what was measured
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size", "context_parallel_size")
LAYOUT = (*SIZES, "first_stage_layers", "last_stage_layers", "recompute", "micro_batch_size")
SAME_SIZE = 0.2  # of a model's parameters: a recipe for a model so much larger or smaller still fits


def is_alike(name: str, family: str, c: Mapping[str, Any]) -> bool:
    """Whether the model of a shipped recipe is trained as one of this family with this config.json.

    Those without experts are, of any family: the same layers with other sizes. A mixture of experts has its own.
    """
    same_family = recipes.family_of(name) == family
    if not recipes.has_shape(name):
        return same_family
    experts = weights.has_experts(recipes.config_of(name))
    return experts == weights.has_experts(c) and (not experts or same_family)


def sizes_of(family: str, c: Mapping[str, Any]) -> dict[str, float]:
    """Shipped recipe → number of weights of its model, for the recipes of models like this one."""
    return {name: recipes.parameters_of_model(name) for name in recipes.names() if is_alike(name, family, c)}


def recipe_for(family: str, c: Mapping[str, Any], parameters: float) -> str | None:
    """The shipped recipe for a model like this one whose size is nearest, of its family first; None if none is near.

    Args:
        c: config.json of the model.
        parameters: number of the model's weights.
    """
    sizes = sizes_of(family, c)
    near = [name for name, size in sizes.items() if abs(size / parameters - 1) <= SAME_SIZE]
    return min(
        near, key=lambda one: (recipes.family_of(one) != family, abs(math.log(sizes[one] / parameters))), default=None
    )


@dataclass(frozen=True)
class Fitted:
    """A recipe's values for the GPUs at hand, and what was changed, in words."""

    values: dict[str, Any]
    changes: list[str]


def fitted(
    values: Mapping[str, Any], chosen: Collection[str], c: Mapping[str, Any], world_size: int, gpu_gb: int | None
) -> Fitted:
    """The first layout that divides the model and the GPUs, and that fits their memory; the recipe's own comes first.

    Args:
        values: fields of Recipe, model, data and out among them.
        chosen: the fields that a person asked for.
        c: config.json of the model, in its canonical form.
        world_size: number of GPUs of the run.
        gpu_gb: memory of each in GB; None where there is no GPU, and memory is no matter.

    Errors: UsageError where no layout divides both, PreflightError where none fits the memory.
    """
    smallest, problems = math.inf, []
    for layout in _layouts(values, chosen, c, world_size):
        candidate = {**values, **layout}
        candidate |= _batch(candidate, chosen, world_size)
        try:
            recipe = Recipe(**candidate)
            recipe.check(world_size)
            recipe.check_model(c)
        except UsageError as error:
            problems.append(str(error))
            continue
        needed = memory.estimate(recipe, c, world_size).total / 1e9
        if gpu_gb is None or needed <= SHARE * gpu_gb:
            return Fitted(candidate, _changes(values, candidate))
        smallest = min(smallest, needed)
    if smallest < math.inf:
        raise PreflightError(
            f"no layout of {world_size} GPUs with {gpu_gb} GB fits: the smallest needs about {smallest:.0f} GB per "
            f"GPU; use {', '.join(_smaller(values))} or a lower --seq-length"
        )
    # The first is that of the recipe's own sizes, which nobody chose; the next has those that a person did.
    raise UsageError(problems[1] if len(problems) > 1 else problems[0])


def _smaller(values: Mapping[str, Any]) -> list[str]:
    """What takes less memory of each GPU than a run with these fields of Recipe."""
    recipe = Recipe(**values)
    cures = [
        (True, "more GPUs"),
        (not recipe.is_frozen, "--mode lora"),
        (recipe.mode == "lora" and recipe.base_precision == "bf16" and not recipe.dora, "--base-precision nf4"),
        (recipe.micro_batch_size > 1, "a lower --micro-batch-size"),
    ]
    return [cure for helps, cure in cures if helps]


def _layouts(
    values: Mapping[str, Any], chosen: Collection[str], c: Mapping[str, Any], world_size: int
) -> Iterator[dict[str, Any]]:
    """The recipe's own layout, then others: those that share least among GPUs come first."""
    yield {}
    experts = weights.experts_of(c)
    options: dict[str, list[Any]] = {
        "tensor_parallel_size": [1, 2, 4, 8],
        "pipeline_parallel_size": [1, 2, 4, 8, 16],
        "expert_parallel_size": [1, 2, 4, 8, 16, 32, 64] if experts else [1],
        "recompute": ["none", "full"],
    }
    for name in options:
        if name in chosen:
            options[name] = [values[name]]
    found = [dict(zip(options, sizes, strict=True)) for sizes in itertools.product(*options.values())]
    found = [layout for layout in found if _ranks(layout) <= world_size]
    # Of equally many ranks stages come last: they idle at both ends of a step. Recomputing takes a third more time.
    found.sort(key=_cost)
    plain = {name: 0 for name in ("first_stage_layers", "last_stage_layers") if name not in chosen}
    for layout in found:
        yield {**layout, **plain}


def _cost(layout: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    pipeline, experts = layout["pipeline_parallel_size"], layout["expert_parallel_size"]
    return _ranks(layout), pipeline, experts, layout["recompute"] == "full"


def _ranks(layout: Mapping[str, Any]) -> int:
    return layout["tensor_parallel_size"] * layout["pipeline_parallel_size"]


def _batch(values: Mapping[str, Any], chosen: Collection[str], world_size: int) -> dict[str, int]:
    """The global batch as the next multiple of what all GPUs take at once."""
    if "global_batch_size" in chosen:
        return {}
    of = {name: values.get(name, getattr(Recipe, name)) for name in (*SIZES, "micro_batch_size", "global_batch_size")}
    shared = of["tensor_parallel_size"] * of["pipeline_parallel_size"] * of["context_parallel_size"]
    at_once = of["micro_batch_size"] * max(1, world_size // shared)
    return {"global_batch_size": -(-of["global_batch_size"] // at_once) * at_once}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is different, as flags."""
    names = (*LAYOUT, "global_batch_size")
    values = [(name, before.get(name, getattr(Recipe, name)), after.get(name, getattr(Recipe, name))) for name in names]
    return [f"{flag(name)} {old} → {new}" for name, old, new in values if old != new]
