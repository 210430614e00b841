"""`slipway verify`: are two checkpoints the same model?"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from entrypoints.errors import UsageError
from entrypoints.report import human_bytes

TOKENS = 64
# The same float32 arithmetic in another order is off by a few units in the last place, wrong weights by 0.1 and more.
TOLERANCE = 1e-4
TOLERANCE_ON_GPU = 0.02  # Transformer Engine multiplies float32 as TF32


@dataclass
class Logits:
    """How far two forward passes are apart: in any logit, and in the share of positions with the same first choice."""

    max_difference: float
    top1_agreement: float
    tolerance: float

    def __str__(self) -> str:
        agreement = f"{self.top1_agreement:.1%} of the first choices agree"
        return f"logits differ by at most {self.max_difference:.2g} (bound {self.tolerance:g}), {agreement}"


@dataclass
class Verified:
    """Two checkpoints that are the same model."""

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
    from entrypoints.checkpoint import compare, locate, stream

    if atol < 0 or (tolerance is not None and tolerance < 0):
        raise UsageError("verify: --atol and --tolerance cannot be negative")
    started, budget = time.monotonic(), stream.parse_size(memory, "--memory")
    first, second = compare.open_pair(locate.folder(a), locate.folder(b))
    size = compare.compare(first, second, atol, budget)
    seconds = time.monotonic() - started
    logits = _forward(first, second, tolerance) if forward else None
    return Verified(a, b, len(first.rules.hf), size, seconds, logits)


def _forward(first: Any, second: Any, tolerance: float | None) -> Logits:
    """Both forward passes; Different where they are further apart than the tolerance."""
    import torch

    from entrypoints.checkpoint import compare

    if tolerance is None:
        tolerance = TOLERANCE_ON_GPU if torch.cuda.is_available() else TOLERANCE
    tokens = compare.random_tokens(first.config["vocab_size"], TOKENS)
    one, other = (compare.logits_of(model, tokens) for model in (first, second))
    difference = (one - other).abs().max().item()
    agreement = (one.argmax(-1) == other.argmax(-1)).float().mean().item()
    logits = Logits(difference, agreement, tolerance)
    if not difference <= tolerance:
        raise compare.Different(f"{first.path} and {second.path} have the same tensors, but their {logits}")
    return logits
