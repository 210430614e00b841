"""`slipway verify`: are two checkpoints the same model?"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from slipway.checkpoint.classic import Options
from slipway.options import check_group, given_of, option, take, with_options
from slipway.report import human_bytes

if TYPE_CHECKING:
    from slipway.training.forward import Logits


@dataclass
class Verified:
    """Two checkpoints that are the same model.

    Args:
        bytes: of one of them, dequantised.
        logits: how far the forward passes are apart, where they were run.
    """

    a: str
    b: str
    tensors: int
    bytes: int
    seconds: float
    logits: Logits | None

    def __str__(self) -> str:
        rate = human_bytes(self.bytes / self.seconds)
        what = f"{self.tensors:,} tensors, {human_bytes(self.bytes)} in {self.seconds:.1f} s, {rate}/s"
        return f"verify: {self.a} and {self.b} are the same model: {what}" + (f"; {self.logits}" if self.logits else "")

    def as_dict(self) -> dict[str, Any]:
        """The same as one JSON-ready object."""
        return {"command": "verify", "same": True, **asdict(self), "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Wanted:
    """The options of `verify`."""

    atol: float = option(0.0, "largest difference of two elements that still counts as equal; 0 = the same bits", low=0)
    forward: bool = option(
        False, "also run both models (transformers in float32, or NeMo) on random tokens and compare the logits"
    )
    tolerance: float | None = option(
        None, "largest difference of two logits that is allowed", low=0, otherwise="0.0001 on the CPU, 0.02 on a GPU"
    )
    memory: str = option("1GB", "most memory for the tensors that are being compared, such as 500MB or 1GB")


@with_options(Wanted, Options)
def verify(a: str, b: str, *, config: str | None = None, **options: Any) -> Verified:
    """Tell whether two checkpoints are the same model, whatever their formats.

    Compares the dequantised tensors bit for bit, as a stream. Exit code 1 means that they differ; the message names
    the first difference. Each of the two may be a Hugging Face model (in BF16 or quantised), a checkpoint of NeMo,
    Megatron-Bridge, Megatron-LM or MindSpeed-LLM, or a model merged with heads (the heads are not compared). If only
    one of them has layers for multi-token prediction, these are not compared, because `import` leaves them out by
    default.

    Args:
        a: a model: a folder, hf://org/name[@revision] or nemo://name.
        b: the other model.
        config: config.json of the model, for a Megatron checkpoint that does not say which model it is.
    """
    from slipway.checkpoint import compare, locate, stream
    from slipway.checkpoint.opened import Given
    from slipway.training import forward

    wanted = take(Wanted, options)
    check_group(wanted)
    started, budget = time.monotonic(), stream.parse_size(wanted.memory, "--memory")
    check_group(take(Options, options))
    given = Given(config=locate.config_file(config), layout=given_of(Options, options))
    first, second = compare.open_pair(locate.folder(a), locate.folder(b), given)
    size = compare.compare(first, second, wanted.atol, budget)
    seconds = time.monotonic() - started
    logits = forward.compare_logits(first, second, wanted.tolerance) if wanted.forward else None
    return Verified(a, b, len(first.rules.hf), size, seconds, logits)
