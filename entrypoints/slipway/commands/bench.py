"""`slipway bench`: how fast a recipe trains on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slipway.errors import UsageError
from slipway.launch.placement import Placement
from slipway.options import option, take, with_options
from slipway.training.recipes import Choice, parse_settings

# Keys of a recipe that decide nothing of what is measured.
NOT_MEASURED = (
    *("steps", "warmup_steps", "constant_steps", "save_every", "keep"),
    *("eval_data", "eval_every", "eval_batches", "wandb_project"),
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    layers: int | None = option(None, "number of layers the model is cut to", low=1, otherwise="all of them")
    steps: int = option(5, "steps that are measured, after two that are not", low=1, high=1000)


@with_options(Size, Choice, Placement)
def bench(
    recipe: str = "",
    *,
    mode: Literal["heads", "lora", "sft", "pretrain"] = "lora",
    lengths: Literal["full", "chat"] = "full",
    **options: Any,
) -> Any:
    """Train a model of the true shape for a few steps, on random weights and tokens, and say how fast that is.

    It prints tokens per second, TFLOP/s and their share of what a large matrix product reaches here, the memory beside
    the estimate, and where the time goes. Nothing is downloaded, and nothing is left behind.

    Args:
        recipe: a shipped recipe; its model is measured.
        mode: what is trained.
        lengths: full = samples as long as a sequence, chat = as long as chats are (lognormal, mean 600 tokens).
    """
    from slipway.training import bench as benching

    choice, size = take(Choice, options), take(Size, options)
    if choice.epochs is not None:
        raise UsageError("bench measures steps, not epochs; give --steps in place of --epochs")
    settings = parse_settings(choice.set or [])
    if idle := next((name for name in settings if name in NOT_MEASURED), ""):
        raise UsageError(
            f"--set {idle} is not for bench, which measures --steps steps without evaluations, checkpoints and logs; "
            "leave it out"
        )
    given = {"mode": mode, **settings}
    name, config = benching.config_for(recipe, choice.config, size.layers)
    choice = Choice(recipe=recipe or None, gpu_memory=choice.gpu_memory)
    return benching.run(benching.Wanted(name, config, given, choice, take(Placement, options), lengths, size.steps))
