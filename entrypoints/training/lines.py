"""Data files of tokens: JSON lines `{"inputs": {"p_ids": [...], "r_ids": [...]}}`, checked and indexed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrypoints.errors import DataError


@dataclass(frozen=True)
class Index:
    """Where the usable lines of a data file begin, and how many were left out."""

    offsets: np.ndarray  # int64 [lines]
    too_long: int


def index_lines(path: Path, seq_length: int, vocab_size: int) -> Index:
    """Read the file once: every line checked, those of `seq_length` tokens or more left out.

    Errors: DataError that names file and line of the first malformed one, or says that nothing is left.
    """
    offsets, too_long, at = [], 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            prompt, response = read_line(line, f"{path}:{number}")
            if max(max(prompt, default=0), max(response)) >= vocab_size:
                raise DataError(
                    f"{path}:{number}: a token id is {max(prompt + response)}, the model's vocabulary has "
                    f"{vocab_size}; was the data tokenised for another model?"
                )
            if len(prompt) + len(response) >= seq_length:
                too_long += 1
            else:
                offsets.append(at)
            at += len(line)
    if not offsets:
        raise DataError(
            f"{path}: no sample is left ({too_long} of {seq_length} tokens or more were dropped); raise --seq-length"
        )
    return Index(np.asarray(offsets, dtype=np.int64), too_long)


def read_line(line: bytes, where: str) -> tuple[list[int], list[int]]:
    """(p_ids, r_ids) of one line; DataError that names `where` when it is anything else."""
    try:
        inputs = json.loads(line)["inputs"]
        prompt, response = inputs["p_ids"], inputs["r_ids"]
        if not response or not all(type(token) is int and token >= 0 for token in prompt + response):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{where}: not a sample of the form {{"inputs": {{"p_ids": [...], "r_ids": [...]}}}} with token ids; '
            "`slipway preprocess` makes such files"
        ) from None
    return prompt, response
