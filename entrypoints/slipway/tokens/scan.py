"""A file of tokens of either kind: it is checked before anything starts, then read by number."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from slipway.tokens.indexed import Documents, Windows, index_of
from slipway.tokens.lines import Index, Lines, Sample, index_lines, pack, read_line

LONGEST_LINE = 1 << 26  # bytes; what has no line is read no further
Units = Lines | Windows  # len(units) of them; units[i] → list[Sample]
__all__ = ["Index", "Sample", "Units", "check_beginning", "is_indexed", "open_units", "scan"]


def is_indexed(path: Path) -> bool:
    """It is PREFIX.bin with PREFIX.idx, not JSON lines."""
    return path.suffix == ".bin"


def check_beginning(path: Path) -> None:
    """DataError for a file that does not begin as tokens do: text, rows or a table that are still to be tokenised."""
    if is_indexed(path):
        Documents.open(path)
        return
    with path.open("rb") as file:
        read_line(file.readline(LONGEST_LINE), f"{path}:1")


def scan(path: Path, seq_length: int, vocab_size: int, packed: bool = False, multiple: int = 1) -> Index:
    """Check every token once.

    Args:
        packed: put several samples into one sequence where they fit; only for JSON lines.
        multiple: a packed sample takes a multiple of so many positions, see Samples.

    Errors: DataError for malformed data, for tokens outside the vocabulary, or if nothing is left to train on.
    """
    if not is_indexed(path):
        index = index_lines(path, seq_length, vocab_size)
        # A sample of n tokens takes n - 1 places: its last token is only a label.
        places = index.lengths - 1 + (1 - index.lengths) % multiple
        return replace(index, packs=pack(places, seq_length)) if packed else index
    documents = Documents.open(path)
    documents.check(seq_length, vocab_size)
    begins = np.arange(len(Windows(documents, seq_length))) * seq_length
    digest = hashlib.sha256(index_of(path).read_bytes()).hexdigest()
    return Index(begins, np.full(len(begins), seq_length + 1, np.int32), too_long=0, digest=digest)


def open_units(path: Path, index: Index, seq_length: int) -> Units:
    """The data that `scan` has checked."""
    return Windows(Documents.open(path), seq_length) if is_indexed(path) else Lines(path, index)
