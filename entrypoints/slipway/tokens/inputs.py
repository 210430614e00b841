"""The input of `preprocess`, cut into pieces that can be tokenised in parallel."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slipway.errors import DataError, UsageError

TEXT_SUFFIXES = (".txt", ".md", ".py")
PIECE_BYTES = 1 << 20  # enough work to be worth sending to another process, little enough to keep in memory


@dataclass(frozen=True)
class Piece:
    """Whole lines of a file.

    Args:
        start, end: the bytes [start, end) of the file.
        line: number of the first line, counted from 1.
        ends_file: there is nothing after it.
    """

    file: Path
    start: int
    end: int
    line: int
    ends_file: bool

    def read(self) -> bytes:
        """The bytes."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


def input_files(data: Path) -> list[Path]:
    """The file, or the text and .jsonl files in the folder, sorted; UsageError or DataError for none."""
    if not data.exists():
        raise UsageError(f"DATA {data} does not exist; give a file or a folder")
    if data.is_file():
        return [data]
    files = sorted(file for file in data.rglob("*") if file.suffix in (*TEXT_SUFFIXES, ".jsonl") and file.is_file())
    if not files:
        raise DataError(f"{data} has no {', '.join(TEXT_SUFFIXES)} or .jsonl file; give a folder with such files")
    return files


def pieces(files: list[Path]) -> Iterator[Piece]:
    """The files in order, in pieces of about PIECE_BYTES; each piece ends at the end of a line."""
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start, line = 0, 1
            while start < size:
                newline = content.find(b"\n", min(start + PIECE_BYTES, size) - 1)
                end = newline + 1 or size
                yield Piece(path, start, end, line, end == size)
                line += content[start:end].count(b"\n")
                start = end
