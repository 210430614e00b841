"""A piece of the input → its rows: JSON objects with where each of them stands."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from slipway.errors import DataError
from slipway.tokens.inputs import LARGEST_ROW, Piece
from slipway.tokens.sources import ARROW, CSV, LINES, PARQUET, VALUES, decoded
from slipway.untrusted import NotJson, parse_json, parse_next

Row = tuple[str, Any]  # where it stands, and its JSON value
BETWEEN = re.compile(r"[\s,]*")


def rows_of(piece: Piece) -> Iterator[Row]:
    """("FILE:LINE", the value) of each row; DataError names the file and the line that are malformed."""
    return READERS[piece.kind](piece)


def _of_lines(piece: Piece) -> Iterator[Row]:
    for number, line in enumerate(piece.read().removesuffix(b"\n").split(b"\n"), piece.line):
        if not line or line.isspace():
            continue
        where = f"{piece.file}:{number}"
        try:
            value = parse_json(line)
        except NotJson as error:
            raise DataError(f"{where}: {_not_json(error)}") from None
        yield where, value


def _of_values(piece: Piece) -> Iterator[Row]:
    content = piece.read()
    text = decoded(content, str(piece.file), piece.line)
    at, line, number = 0, piece.line, piece.row
    while (begins := BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", at, begins)
        where = f"{piece.file}:{line}, row {number}"
        try:
            value, at = parse_next(text, begins)
        except NotJson as error:
            raise DataError(f"{where}: {_not_json(error)}") from None
        yield where, value
        line, number = line + text.count("\n", begins, at), number + 1


def _of_csv(piece: Piece) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)
    delimiter, *names = piece.columns
    lines = io.StringIO(piece.read().decode(), newline="")
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    line = piece.line
    for record in records:
        where, line = f"{piece.file}:{line}", piece.line + records.line_num
        if len(record) == len(names):
            yield where, dict(zip(names, record, strict=True))
        elif record:
            raise DataError(
                f"{where}: {len(record)} fields, but the first line names {len(names)} columns; "
                "quote fields that hold a delimiter or a new line"
            )


def _of_table(piece: Piece) -> Iterator[Row]:
    import pyarrow as arrow

    number = piece.row
    for batch in arrow.ipc.open_stream(piece.read()):
        for value in _values(piece, batch, number):
            # In a table every object has the keys of all: what one does not have is null. Those of the row itself are
            # told from keys that are missing.
            yield f"{piece.file}: row {number}", {key: _without_nulls(each) for key, each in value.items()}
            number += 1


def _values(piece: Piece, batch: Any, first: int) -> list[Any]:
    """The rows of a batch, with maps as objects; DataError names the row that cannot be read.

    Args:
        first: number of its first row.
    """
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    # A text that is none, a day of no calendar, a map with a key that stands twice.
    except (UnicodeDecodeError, ValueError, OverflowError, KeyError) as error:
        if batch.num_rows > 1:
            parts = (_values(piece, batch.slice(row, 1), first + row) for row in range(batch.num_rows))
            return [value for part in parts for value in part]
        where, said = f"{piece.file}: row {first}", " ".join(str(error).split())
        if "duplicate" in said:  # the library's word
            raise DataError(f"{where}: a map has the same key twice; leave one of them out") from None
        raise DataError(f"{where}: a value cannot be read ({said}); copy the file again") from None


READERS: dict[str, Callable[[Piece], Iterator[Row]]] = {
    LINES: _of_lines, VALUES: _of_values, CSV: _of_csv, PARQUET: _of_table, ARROW: _of_table,
}  # fmt: skip


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _not_json(error: NotJson) -> str:
    said = str(error)
    if said.startswith("not UTF-8"):
        return f"{said}; convert the file to UTF-8"
    return f"not JSON ({said}); fix or delete it"
