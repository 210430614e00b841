"""A file of the input: what it holds is recognised from its first bytes, and it is opened as UTF-8, unpacked.

The name alone decides between formats that look alike, such as csv and text. A format that is not read is refused by
name: bytes of it would otherwise be learned as if they were text.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slipway.errors import DataError
from slipway.tokens.indexed import index_of
from slipway.untrusted import NotJson, open_file, parse_json, unreadable

HEAD_BYTES = 1 << 16  # what is looked at of a file
BLOCK_BYTES = 1 << 18
TEXT, LINES, VALUES, CSV, PARQUET, ARROW = "text", "JSON lines", "JSON", "csv", "parquet", "arrow"
ROWS = (LINES, VALUES, CSV, PARQUET, ARROW)  # kinds of files that hold one row after the other
TABLES = (PARQUET, ARROW)  # that pyarrow reads
TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")  # the last two are one format
ROW_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *TABLE_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".zst")
PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# Zstandard's frames that are skipped: pzstd begins with one, which has the size of the next.
PACKINGS |= {bytes([number]) + b"\x2a\x4d\x18": "zstd" for number in range(0x50, 0x60)}
TABLE_MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW}
ENCRYPTED = b"PARE"  # parquet whose footer is
# UTF-32 comes first: its mark begins like that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Characters that no text has: numbers of 16 bits, as token ids are, look like UTF-16 but for them.
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
# An object, or an array of objects, with a name in it: no text begins like this.
ROWS_BEGIN = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
# What people hand over by mistake, by its first bytes.
NOT_READ = {
    b"PK\x03\x04": "a zip archive (xlsx, docx and npz are such too)",
    b"\xfd7zXZ\x00": "packed by xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"%PDF": "a PDF",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "an array of NumPy's",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF89a": "an image",
    b"Obj\x01": "Avro",
    b"FEA1": "Feather of version 1, which is not arrow",
    b"SQLite format 3": "a data base of SQLite's",
    b"MMIDIDX": "an index of Megatron's: its tokens are ready for training",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
NOT_READ |= {f"BZh{level}1AY&SY".encode(): "packed by bzip2" for level in range(1, 10)}
CURE = "give JSON lines, a JSON array, parquet, arrow, csv or UTF-8 text, also packed as .gz or .zst"


@dataclass(frozen=True)
class Source:
    """A file and how it is read.

    Args:
        kind: TEXT or one of ROWS.
        packing: gzip or zstd; empty: none.
        encoding: of the text in it.
        mark: bytes before the text: a byte order mark.
    """

    path: Path
    kind: str
    packing: str = ""
    encoding: str = "utf-8"
    mark: int = 0

    @property
    def is_plain(self) -> bool:
        """Its bytes on disk are those of the text, so that it can be read from anywhere."""
        return not self.packing and self.encoding == "utf-8"

    def describe(self) -> str:
        """What was recognised, in words: "JSON lines, gzip, utf-16-le"."""
        kind = "a JSON array or JSON objects" if self.kind == VALUES else self.kind
        return ", ".join([kind, *filter(None, [self.packing]), *([self.encoding] if self.encoding != "utf-8" else [])])

    def blocks(self, raw: BinaryIO) -> Iterator[bytes]:
        """What the file holds as UTF-8, unpacked and without its mark, from the file's opened bytes.

        Errors: DataError for a file that ends too early, is damaged or is not of its encoding.
        """
        unpacked, left = _unpacked(raw, self.packing), self.mark
        decoder = codecs.getincrementaldecoder(self.encoding)() if self.encoding != "utf-8" else None
        with damage_named(self.path):
            while block := unpacked.read(BLOCK_BYTES):
                block, left = block[left:], max(0, left - len(block))
                yield decoder.decode(block).encode() if decoder else block
            if decoder:
                decoder.decode(b"", final=True)


def recognise(path: Path) -> Source:
    """How a file is read; DataError for one that is not read, by name."""
    if path.suffix == ".bin" and index_of(path).is_file():
        raise DataError(f"{path} has tokens of Megatron's, which are ready for training; {CURE}")
    try:
        with open_file(path) as raw:
            head = raw.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error, "copy it again") from None
    packing = next((name for magic, name in PACKINGS.items() if head.startswith(magic)), "")
    if packing:
        with path.open("rb") as raw, damage_named(path):
            head = _unpacked(raw, packing).read(HEAD_BYTES)
    elif path.suffix in PACKED_SUFFIXES and head:
        raise DataError(f"{path} is named {path.suffix} but is not packed; correct its name")
    if known := next((name for magic, name in NOT_READ.items() if head.startswith(magic)), None):
        raise DataError(f"{path} is {known}, which is not read; {CURE}")
    if (kind := _table(path, head)) is not None:
        if packing:
            raise DataError(f"{path} is {kind} packed by {packing}; unpack it first")
        return Source(path, kind)
    encoding, mark = _encoding(head)
    text = head[mark:].decode(encoding, errors="replace")
    _check_text(path, text)
    return Source(path, _kind(path, text), packing, encoding, mark)


def decoded(content: bytes, file: str, line: int) -> str:
    """UTF-8 as text; DataError names the line where it is anything else."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise DataError(f"{file}:{line}: not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8") from None


def bare_name(path: Path) -> str:
    """The name without .gz or .zst, in small letters."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in PACKED_SUFFIXES else name


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What unpacking and decoding raise as a DataError of the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {error.encoding}: {error.reason}; convert it to UTF-8") from None
    except EOFError:
        raise DataError(f"{path} ends too early: it was cut off; copy it again") from None
    except (OSError, ValueError, NotImplementedError, zlib.error) as error:  # pyarrow's are of all three kinds
        if "too much memory for decoding" in str(error):  # the words of zstd
            raise DataError(
                f"{path} was packed with a larger window than is read (zstd --long); unpack it: zstd -d --long=31"
            ) from None
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}; copy it again") from None


def _unpacked(raw: BinaryIO, packing: str) -> Any:
    """A reader of the bytes that are packed in `raw`."""
    if packing == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if packing == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return raw


def _table(path: Path, head: bytes) -> str | None:
    """The kind of table that a file is, if it is one."""
    found = next((kind for magic, kind in TABLE_MAGIC.items() if head.startswith(magic)), None)
    if found is None and path.suffix.lower() in TABLE_SUFFIXES:
        if head.startswith(ENCRYPTED):
            raise DataError(f"{path} is encrypted; write it without encryption")
        raise DataError(f"{path} is named {path.suffix} but does not begin like such a file; copy it again")
    return found


def _encoding(head: bytes) -> tuple[str, int]:
    """(the encoding, the bytes of its mark); without a mark UTF-16 shows by the zeros in its common letters."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    sample = head[:256]
    zeros = [sample[place::2].count(0) for place in (0, 1)]
    if len(sample) >= 8 and max(zeros) > len(sample) // 4 and min(zeros) == 0:
        encoding = "utf-16-be" if zeros[0] else "utf-16-le"
        if not NO_TEXT.search(head.decode(encoding, errors="replace")):
            return encoding, 0
    return "utf-8", 0


def _check_text(path: Path, text: str) -> None:
    """DataError for bytes that are no text: they would be learned as if they were."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        kind = "holds a NUL byte" if bare_name(path).endswith((*ROW_SUFFIXES, *TEXT_SUFFIXES)) else "is binary"
        raise DataError(f"{path}:{line} {kind} and is not read; {CURE}")


def _kind(path: Path, text: str) -> str:
    name, begins = bare_name(path), text.lstrip()[:1]
    if name.endswith(CSV_SUFFIXES):
        return CSV
    if name.endswith(JSON_SUFFIXES):
        if begins and begins not in "[{" and not name.endswith(".jsonl"):
            raise DataError(f"{path}:1: not JSON: it begins with {begins!r}; {CURE}")
        return _json_kind(text)
    # Whatever the name says, such a file is not learned as text; code and documents may well begin so.
    looks_like_rows = not name.endswith((".py", ".md")) and ROWS_BEGIN.match(text)
    return _json_kind(text) if looks_like_rows else TEXT


def _json_kind(text: str) -> str:
    """LINES are read faster; VALUES may go over many lines, and may stand in an array."""
    if text.lstrip().startswith("["):
        return VALUES
    first, _, rest = text.lstrip().partition("\n")
    is_lines = not rest.strip() or _is_json(first) or _is_json(rest.lstrip().partition("\n")[0])
    return LINES if is_lines else VALUES


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except NotJson:
        return False
    return True
