"""The input of `preprocess`, cut into pieces that can be tokenised in parallel.

Plain text and JSON lines are cut by place: whoever tokenises a piece reads it from the file. Everything else has to be
read in order, so its pieces carry what they hold. Either way no more than a few pieces are in memory.
"""

from __future__ import annotations

import csv
import io
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from slipway.errors import DataError
from slipway.tokens.sources import ARROW, CSV, PARQUET, TABLES, TEXT, VALUES, Source, damage_named, decoded
from slipway.untrusted import DEEPEST

CUT = 2  # raise it where any file is cut into other pieces than before: unfinished work is counted in pieces
PIECE_BYTES = 1 << 20  # enough work to be worth sending to another process, little enough to keep in memory
LARGEST_TEXT = 1 << 24  # bytes of a line of text that stay together; a longer one is cut where there is a space
DELIMITERS, MOST_FIELDS = ",;\t", 1 << 20  # of a csv
OTHER_DELIMITERS = "|^~\x01\x1f"  # that other programs write
LARGEST_ROW = 1 << 26  # bytes; a row that does not end by then is a bracket or a quote that is never closed
# Whole strings, so that brackets in them do not count; a quote alone begins a string that goes on in the next block.
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """Whole rows, or whole lines of a text.

    Args:
        kind: of the file, as in sources.py.
        size: bytes of the file that it takes.
        line: number of the first line, or of the first row of a table; counted from 1.
        row: number of the first row in the file, of JSON.
        start, end: the bytes [start, end) of the file, where there is no content.
        content: what it holds; of a table as a stream of Arrow's.
        columns: of csv: the delimiter, then the names.
        begins_file, ends_file: there is nothing before it, nothing after it.
    """

    file: Path
    kind: str
    size: int
    line: int = 1
    row: int = 1
    start: int = 0
    end: int = 0
    content: bytes | None = None
    columns: tuple[str, ...] = ()
    begins_file: bool = False
    ends_file: bool = False

    def read(self) -> bytes:
        """What it holds."""
        if self.content is not None:
            return self.content
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


def pieces(sources: Iterable[Source]) -> Iterator[Piece]:
    """The files in order, in pieces of about PIECE_BYTES."""
    for source in sources:
        if not source.path.stat().st_size:
            continue
        if source.kind in TABLES:
            yield from _of_table(source)
        elif source.kind == VALUES:
            yield from _of_values(source)
        elif source.kind == CSV:
            yield from _of_csv(source)
        else:
            yield from _by_place(source) if source.is_plain else _streamed(source)


def _by_place(source: Source) -> Iterator[Piece]:
    """Pieces of a file that can be read from anywhere; each ends at the end of a line."""
    size = source.path.stat().st_size
    with source.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, line, taken = source.mark, 1, 0
        while start < size:
            end = start + _whole(source, content, start, size - start)
            yield Piece(
                source.path, source.kind, end - taken, line,
                start=start, end=end, begins_file=not taken, ends_file=end == size,
            )  # fmt: skip
            line += content[start:end].count(b"\n")
            start = taken = end


def _whole(source: Source, content: bytearray | mmap.mmap, start: int, size: int) -> int:
    """How many of `size` bytes from `start` on make a piece: to the end of a line, of which the longest are cut."""
    most = LARGEST_TEXT if source.kind == TEXT else LARGEST_ROW + PIECE_BYTES
    newline = content.find(b"\n", start + min(PIECE_BYTES, size) - 1, start + most)
    if newline >= 0:
        return newline + 1 - start
    if size <= most:
        return size
    if source.kind != TEXT:
        _check_row(source, size)
    space = content.rfind(b" ", start + most // 2, start + most)
    end = space if space >= 0 else start + most
    while content[end] & 0xC0 == 0x80:  # inside of a character
        end -= 1
    return end - start


def _streamed(source: Source) -> Iterator[Piece]:
    """Pieces of text or JSON lines that are packed or not in UTF-8."""
    with source.path.open("rb") as raw:
        line, taken, begins = 1, 0, True
        for content, ends in _marked_last(_whole_lines(source, source.blocks(raw))):
            size = _taken(raw, source, ends) - taken
            yield Piece(source.path, source.kind, size, line, content=content, begins_file=begins, ends_file=ends)
            line, taken, begins = line + content.count(b"\n"), taken + size, False


def _whole_lines(source: Source, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of about PIECE_BYTES that end at the end of a line."""
    held = bytearray()
    for block in blocks:
        held += block
        newline = held.rfind(b"\n") + 1 if len(held) >= PIECE_BYTES else 0
        if not newline and source.kind == TEXT and len(held) > LARGEST_TEXT:
            newline = _whole(source, held, 0, len(held))
        if newline:
            yield bytes(held[:newline])
            del held[:newline]
        elif source.kind != TEXT:
            _check_row(source, len(held))
    if held:
        yield bytes(held)


def _marked_last(contents: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """(content, it is the last)."""
    held: bytes | None = None
    for content in contents:
        if held is not None:
            yield held, False
        held = content
    if held is not None:
        yield held, True


def _taken(raw: BinaryIO, source: Source, ends: bool) -> int:
    """Bytes of the file that have been read; a reader of what is packed may have closed it at its end."""
    return source.path.stat().st_size if ends or raw.closed else raw.tell()


def _check_row(source: Source, size: int) -> None:
    """DataError for a row that does not end: without it a damaged file would be read into memory whole."""
    if size > LARGEST_ROW + PIECE_BYTES:
        raise DataError(
            f"{source.path}: a row has more than {LARGEST_ROW >> 20} MiB; one row is one sample or one text: "
            "check that brackets and quotes are closed, and that the rows do not stand inside of another object"
        )


# ---------------------------------------------------------------------------- JSON over many lines


def _of_values(source: Source) -> Iterator[Piece]:
    """Pieces of a JSON array, or of JSON values that follow each other; brackets are counted, nothing is parsed."""
    with source.path.open("rb") as raw:
        line, row, taken = 1, 1, 0
        for content, rows in _cut_values(source, source.blocks(raw)):
            size = _taken(raw, source, False) - taken
            yield Piece(source.path, VALUES, size, line, row, content=content)
            line, row, taken = line + content.count(b"\n"), row + rows, taken + size


def _cut_values(source: Source, blocks: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """(values and what stands between them, how many); of an array what its brackets hold.

    The bracket of the array itself is turned into a space, which leaves every line where it was.
    """
    held, at, depth, outer, done, rows = bytearray(), 0, 0, -1, 0, 0
    enough = 0  # bytes, before which it is not looked again: an open string is searched from its beginning each time
    for block in chain(blocks, [b""]):
        held += block
        if block and len(held) < enough:
            continue
        if outer < 0 and (begins := held.lstrip()[:1]):
            outer = 1 if begins == b"[" else 0
            if outer:
                place = held.index(b"[")
                held[place : place + 1] = b" "
                at, depth = place, 1
        view = bytes(held)
        for token in TOKEN.finditer(view, at):
            mark = token.group()
            if mark == b'"':
                at = token.start()
                enough = 2 * len(held) - at
                break
            at = token.end()
            if mark in b"{[":
                depth += 1
                if depth > DEEPEST + 1:
                    raise DataError(f"{source.path}: nested too deeply; a row has a few brackets in one another")
            elif mark in b"}]":
                depth -= 1
                if depth == outer:
                    done, rows = at, rows + 1
                if depth < 0:
                    raise DataError(f"{source.path}: a bracket closes what was never opened; correct the file")
                if depth < outer:
                    yield from _last_values(source, view, at, rows, blocks)
                    return
        else:
            at = len(view)
        if done >= PIECE_BYTES:
            yield view[:done], rows
            del held[:done]
            at, enough, done, rows = at - done, enough - done, 0, 0
        _check_row(source, len(held))
    if outer == 1 or depth:
        raise DataError(f"{source.path} ends in the middle of a value: it was cut off; copy it again")
    if held.strip():
        yield bytes(held), rows


def _last_values(
    source: Source, view: bytes, at: int, rows: int, blocks: Iterable[bytes]
) -> Iterator[tuple[bytes, int]]:
    """What is left before the bracket that closes the array; after it there may be white space."""
    if any(rest.strip() for rest in chain([view[at:]], blocks)):
        raise DataError(f"{source.path}: something follows the end of the array; give one array, or JSON lines")
    if view[: at - 1].strip():
        yield view[: at - 1], rows


def _check_names(source: Source, names: Iterable[str]) -> None:
    """DataError for two columns of one name, of which only the last would be read."""
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"{source.path} has two columns named {twice[:40]}; rename or remove one of them")


# ---------------------------------------------------------------------------- csv


def _of_csv(source: Source) -> Iterator[Piece]:
    """Pieces of whole records; the first record has the names of the columns."""
    csv.field_size_limit(LARGEST_ROW)
    with source.path.open("rb") as raw:
        lines = Recorded(_lines_of(source, raw), source)
        delimiter = _delimiter(source, lines)
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        line, taken, names = 1, 0, tuple[str, ...]()
        try:
            for record in records:
                if not names:
                    names = tuple(name.strip() for name in record)
                    _check_names(source, filter(None, names))  # spreadsheets write empty columns
                    line, _ = 1 + records.line_num, lines.take()
                elif lines.size >= PIECE_BYTES:
                    size, content = _taken(raw, source, False) - taken, lines.take()
                    yield Piece(source.path, CSV, size, line, content=content, columns=(delimiter, *names))
                    line, taken = 1 + records.line_num, taken + size
        except csv.Error as error:
            raise DataError(f"{source.path}:{line + len(lines.held)}: not csv: {error}; correct its quotes") from None
        if lines.held:
            size = _taken(raw, source, False) - taken
            yield Piece(source.path, CSV, size, line, content=lines.take(), columns=(delimiter, *names))


class Recorded:
    """Lines that are given on, and kept until they are taken: the csv reader does not say what it has read."""

    def __init__(self, lines: Iterator[str], source: Source) -> None:
        self.lines, self.source, self.held, self.size = lines, source, list[str](), 0
        self.again: list[str] = []

    def __iter__(self) -> Recorded:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else next(self.lines)
        self.held.append(line)
        self.size += len(line)
        _check_row(self.source, self.size)  # a record may have any number of lines
        fields = max(map(line.count, DELIMITERS)) if len(line) > MOST_FIELDS else 0
        if max(fields, len(self.held)) > MOST_FIELDS + PIECE_BYTES:  # each of them takes more than its bytes
            raise DataError(f"{self.source.path}: a record has more than {MOST_FIELDS:,} fields; correct its quotes")
        return line

    def take(self) -> bytes:
        """What was given on since the last time."""
        content = "".join(self.held).encode()
        self.held, self.size = [], 0
        return content


def _lines_of(source: Source, raw: BinaryIO) -> Iterator[str]:
    """The lines with their ends."""
    number = 1
    for content in _whole_lines(source, source.blocks(raw)):
        # Not splitlines(), which ends a line at characters that may stand in a field.
        yield from io.StringIO(decoded(content, str(source.path), number), newline="")
        number += content.count(b"\n")


def _delimiter(source: Source, lines: Recorded) -> str:
    """A tab in .tsv, else the one that the line of names has most of."""
    try:
        first = next(lines)
    except StopIteration:
        return ","
    lines.again, lines.held, lines.size = [first], [], 0
    if ".tsv" in source.path.suffixes:
        return "\t"
    most = max(DELIMITERS + OTHER_DELIMITERS, key=first.count)
    if most in OTHER_DELIMITERS:
        raise DataError(
            f"{source.path}:1: its columns are separated by {most!r}, which is not read; "
            "separate them by , or ; or a tab"
        )
    return most


# ---------------------------------------------------------------------------- tables


def _of_table(source: Source) -> Iterator[Piece]:
    """Pieces of some rows each, as streams of Arrow's, which cost little to make and to send."""
    import pyarrow as arrow

    row, taken = 1, 0
    with damage_named(source.path):
        for end, batch in _batches(source):
            for part in _split(source, batch):
                _check_names(source, part.schema.names)
                sink = arrow.BufferOutputStream()
                with arrow.ipc.new_stream(sink, part.schema) as stream:
                    stream.write_batch(part)
                content = sink.getvalue().to_pybytes()
                yield Piece(source.path, source.kind, end - taken, row, row, content=content)
                row, taken = row + part.num_rows, end


def _batches(source: Source) -> Iterator[tuple[int, Any]]:
    """The table in batches, each with how many bytes of the file are read with it."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    whole = source.path.stat().st_size
    if source.kind == PARQUET:
        # Without a buffer of its own pyarrow reads the whole of a row group first, and pandas writes files of only one.
        file = parquet.ParquetFile(source.path, buffer_size=PIECE_BYTES, pre_buffer=False)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        bytes_of_all, total, row = sum(group.total_byte_size for group in groups), file.metadata.num_rows, 0
        for group in groups:  # before it is unpacked
            _check_row(source, group.total_byte_size // max(1, group.num_rows))
        rows = max(1, min(1 << 12, PIECE_BYTES * total // max(bytes_of_all, 1)))
        for batch in file.iter_batches(batch_size=rows):
            row += batch.num_rows
            yield whole * row // max(1, total), batch
        return
    assert source.kind == ARROW
    mapped = arrow.memory_map(str(source.path))
    if mapped.read(6) == b"ARROW1":
        reader = arrow.ipc.open_file(mapped)
        count = reader.num_record_batches
        yield from (
            (whole * (n + 1) // count, batch) for n, batch in enumerate(_sound(map(reader.get_batch, range(count))))
        )
        return
    mapped.seek(0)
    stream = arrow.ipc.open_stream(mapped)
    end = mapped.tell()
    for batch in _sound(stream):
        end = mapped.tell()
        yield end, batch
    if mapped.tell() == end:  # writers put a mark at the end, which pyarrow does not miss
        raise EOFError


def _sound(batches: Iterable[Any]) -> Iterator[Any]:
    """The same, each looked through: Arrow itself would follow a damaged offset to anywhere in this process's memory.

    Errors: those of damage_named.
    """
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _split(source: Source, batch: Any) -> Iterator[Any]:
    """A batch in slices of about PIECE_BYTES: unpacked, rows that repeat themselves are larger than their file says."""
    rows = max(1, PIECE_BYTES * batch.num_rows // max(sum(map(_bytes_of, batch.columns)), 1))
    for start in range(0, batch.num_rows, rows):
        part = _spelled_out(batch.slice(start, rows))
        _check_row(source, part.nbytes // part.num_rows)
        yield part


def _bytes_of(column: Any) -> int:
    """The bytes of a column, spelled out."""
    import pyarrow.compute as compute

    if (texts := _texts_of(column)) is None:
        return int(column.nbytes)
    lengths = compute.call_function("binary_length", [texts])
    return compute.call_function("sum", [lengths.take(column.indices)]).as_py() or 0


def _spelled_out(batch: Any) -> Any:
    """The same rows, with texts in place of numbers of a dictionary: every piece would carry all of the dictionary."""
    import pyarrow as arrow

    found = [(column, _texts_of(column)) for column in batch.columns]
    if all(texts is None for _, texts in found):
        return batch
    columns = [column if texts is None else texts.take(column.indices) for column, texts in found]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _texts_of(column: Any) -> Any:
    """The dictionary of a column that has texts in one, else None; of polars' kind of texts no others can be taken."""
    import pyarrow as arrow
    from pyarrow import types

    if not types.is_dictionary(column.type):
        return None
    texts = column.dictionary
    if types.is_string_view(texts.type):
        return texts.cast(arrow.large_string())
    return texts if types.is_string(texts.type) or types.is_large_string(texts.type) else None
