"""`slipway verify`: are two checkpoints the same model?"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from slipway.errors import UsageError
from slipway.report import human_bytes


@dataclass
class Verified:
    """Two checkpoints that are the same model."""

    a: str
    b: str
    tensors: int
    bytes: int
    seconds: float
    logits: Any

    def __str__(self) -> str:
        rate = human_bytes(self.bytes / self.seconds)
        what = f"{self.tensors:,} tensors, {human_bytes(self.bytes)} in {self.seconds:.1f} s, {rate}/s"
        return f"verify: {self.a} and {self.b} are the same model: {what}" + (f"; {self.logits}" if self.logits else "")

    def as_dict(self) -> dict[str, Any]:
        """The same as one JSON-ready object."""
        return {"command": "verify", "same": True, **asdict(self), "seconds": round(self.seconds, 3)}


def verify(
    a: str,
    b: str,
    *,
    atol: float = 0.0,
    forward: bool = False,
    tolerance: float | None = None,
    memory: str = "1GB",
) -> Verified:
    """Tell whether two checkpoints are the same model, whatever their formats.

    Compares the dequantised tensors bit for bit, streamed; exit code 1 names the first difference. Hugging Face
    models, BF16, FP8 or MXFP4, NeMo checkpoints, and models merged with heads (without the heads), in any pair.
    Layers for multi-token prediction that only one of them has are left out, as `import` leaves them out.

    Args:
        a: folder of a model, hf://org/name[@revision] or nemo://name.
        b: another.
        atol: largest difference of two elements that is no difference; 0 = the same bits.
        forward: run both as well, by transformers in float32 or by NeMo, and compare the logits of random tokens.
        tolerance: largest difference of two logits (0.0001 on the CPU; 0.5 on a GPU, where NeMo computes in bfloat16).
        memory: bytes that tensors at work may take.
    """
    from slipway.checkpoint import compare, locate, stream
    from slipway.training import forward as forward_pass

    if atol < 0 or (tolerance is not None and tolerance < 0):
        raise UsageError("verify: --atol and --tolerance cannot be negative")
    started, budget = time.monotonic(), stream.parse_size(memory, "--memory")
    first, second = compare.open_pair(locate.folder(a), locate.folder(b))
    size = compare.compare(first, second, atol, budget)
    seconds = time.monotonic() - started
    logits = forward_pass.compare_logits(first, second, tolerance) if forward else None
    return Verified(a, b, len(first.rules.hf), size, seconds, logits)
