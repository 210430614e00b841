"""What a person can set of `preprocess`."""

from __future__ import annotations

from dataclasses import dataclass

from slipway.options import LARGEST, check_group, option


@dataclass(frozen=True)
class Wanted:
    """The options of `preprocess`."""

    tokenizer: str = option(..., "model whose tokenizer is used: a folder, hf://org/name[@revision] or nemo://name")
    # A sample must be shorter than seq_length, and two tokens are the least that teaches anything.
    seq_length: int = option(
        6144, "sequence length of the training; samples of this length or more are dropped", unit="tokens", low=3,
        high=LARGEST,
    )  # fmt: skip
    append_eos: bool = option(True, "add the tokenizer's eos_token after each text and each completion")
    workers: int | None = option(None, "processes that tokenise", low=1, high=LARGEST, otherwise="one per core")

    def check(self) -> None:
        """UsageError for a value that is out of range."""
        check_group(self)
