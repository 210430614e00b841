"""Documents of tokens in Megatron's format: PREFIX.bin holds all tokens, PREFIX.idx says where each document begins.

The index (megatron/core/datasets/indexed_dataset.py): "MMIDIDX\\0\\0", version 1 as uint64, the code of the tokens'
dtype as uint8, the numbers of sequences and of document bounds as uint64; then the lengths of the sequences (int32),
the byte where each begins (int64), and the document bounds, counted in sequences (int64); the first bound is 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slipway.errors import DataError
from slipway.tokens.lines import DataFile, Sample

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 22  # numbers that are held in memory at a time; a corpus has billions


def index_of(prefix: Path) -> Path:
    """PREFIX.idx, for PREFIX, PREFIX.bin or PREFIX.idx."""
    return prefix.with_suffix(".idx") if prefix.suffix in (".bin", ".idx") else Path(f"{prefix}.idx")


def write_index(file: BinaryIO, dtype: type[np.integer], lengths: np.ndarray, ends: np.ndarray) -> None:
    """Write the index of sequences that are stored one after the other.

    Args:
        lengths: int32 [sequences] of tokens.
        ends: bool [sequences]: which of them end a document.
    """
    bounds = np.flatnonzero(ends) + 1
    code = next(code for code, known in CODES.items() if known is dtype)
    file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(bounds) + 1))
    file.write(lengths.astype("<i4").tobytes())
    at = 0
    for start in range(0, len(lengths), CHUNK):
        after = at + np.cumsum(lengths[start : start + CHUNK], dtype=np.int64) * np.dtype(dtype).itemsize
        file.write(np.concatenate([[at], after[:-1]]).astype("<i8").tobytes())
        at = int(after[-1])
    file.write(np.concatenate([[0], bounds]).astype("<i8").tobytes())


@dataclass(frozen=True)
class Documents:
    """All tokens of a PREFIX.bin, document after document."""

    path: Path  # PREFIX.bin
    tokens: np.ndarray  # mapped, [tokens]
    lengths: np.ndarray  # int32 [sequences]

    @classmethod
    def open(cls, prefix: Path) -> Documents:
        """Map PREFIX.bin; DataError for a file that is missing, damaged, or does not match the other."""
        index, path = index_of(prefix), index_of(prefix).with_suffix(".bin")
        for file in (index, path):
            if not file.is_file():
                raise DataError(f"{file} does not exist; .bin and .idx need each other; copy both")
        content = index.read_bytes()
        if len(content) < HEADER.size or content[:9] != MAGIC:
            raise DataError(f"{index} is not an index of Megatron's; create it with `slipway preprocess DATA OUT.bin`")
        _, version, code, sequences, bounds = HEADER.unpack_from(content)
        if version != VERSION or code not in CODES or len(content) < HEADER.size + 12 * sequences + 8 * bounds:
            raise DataError(f"{index} is damaged, or its version is not {VERSION}; run `slipway preprocess` again")
        lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
        begins = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
        size = np.dtype(CODES[code]).itemsize
        wanted = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * size
        if not np.array_equal(begins, wanted[:-1]) or path.stat().st_size != wanted[-1]:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, but {index} needs {wanted[-1]}; "
                "run `slipway preprocess` again"
            )
        return cls(path, np.memmap(path, CODES[code], "r") if wanted[-1] else np.empty(0, CODES[code]), lengths)

    def check(self, seq_length: int, vocab_size: int) -> None:
        """DataError unless there are `seq_length` + 1 tokens or more, all of them in the vocabulary."""
        if len(self.tokens) <= seq_length:
            raise DataError(
                f"{self.path} has {len(self.tokens)} tokens, a sample needs {seq_length + 1}; lower --seq-length"
            )
        for start in range(0, len(self.tokens), CHUNK):
            part = self.tokens[start : start + CHUNK]
            if part.max() >= vocab_size or part.min() < 0:
                at = start + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
                raise DataError(
                    f"{self.path}: token {at} is {self.tokens[at]}, the model's vocabulary has {vocab_size} tokens; "
                    "use the tokenizer of this model in `slipway preprocess`"
                )


class Windows:
    """The tokens of all documents, cut into windows of seq_length + 1 tokens.

    Windows overlap by one token: the last token of a window is only a label there, and an input in the next window.
    """

    def __init__(self, documents: Documents, seq_length: int) -> None:
        self.documents, self.seq_length = documents, seq_length
        self._file = DataFile(documents.path)

    def __len__(self) -> int:
        return (len(self.documents.tokens) - 1) // self.seq_length

    def __getitem__(self, unit: int) -> list[Sample]:
        dtype = self.documents.tokens.dtype
        start, size = unit * self.seq_length * dtype.itemsize, (self.seq_length + 1) * dtype.itemsize
        found = self._file.read(start, size)
        return [Sample([], np.frombuffer(found, dtype).tolist())]

    def positions(self, unit: int) -> int:
        """How many positions of a sequence a window takes: all of them."""
        return self.seq_length
