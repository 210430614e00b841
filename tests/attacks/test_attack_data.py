"""Data of strangers: packed, in tables, in lines that never end.

What they do: a file of 80 kB unpacks to 80 MB without an end of a line; a bracket, a quote or a
record of a csv is never closed; one cell of a table has more than any sample; a text in a table is no text; a packed
file ends in the middle.

What must happen: exit code 65 and one line, within ten seconds of the processor and 600 MB. A text without an end of a
line is no fault: it is cut into pieces, whose bytes are those of the text.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from slipway.errors import DataError
from slipway.tokens import inputs
from slipway.tokens.sources import recognise

MANY = 80 << 20  # a row has at most 64
EVIL = "\x1b[2J\u202eevil"


def zstd(content: bytes) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def table(columns: dict[str, Iterable[object]]) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def ipc(columns: dict[str, Iterable[object]]) -> bytes:
    sink, rows = arrow.BufferOutputStream(), arrow.table(columns)
    with arrow.ipc.new_file(sink, rows.schema, options=arrow.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(rows)
    return sink.getvalue().to_pybytes()


def no_text() -> bytes:
    """A text of bytes that are no UTF-8, as a writer that does not look leaves it."""
    words = arrow.array([b"good", b"\xff\xfe bad"]).view(arrow.string())
    return ipc({"text": words})


def beyond_the_text() -> bytes:
    """Where the second text of a column ends is changed to far outside of the file."""
    sink, rows = arrow.BufferOutputStream(), arrow.table({"text": ["a" * 20] * 5})
    with arrow.ipc.new_file(sink, rows.schema) as file:
        file.write_table(rows)
    content, ends = sink.getvalue().to_pybytes(), struct.pack("<6i", *range(0, 101, 20))
    assert content.count(ends) == 1
    return content.replace(ends, struct.pack("<6i", 0, 20, 1 << 30, 60, 80, 100))


def of_another_calendar() -> bytes:
    return ipc({"text": arrow.array([1 << 62]).view(arrow.timestamp("s"))})


ATTACKS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a row without an end, gzip": ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "' + b"a" * MANY, 1), "64 MiB"),
    "a row without an end, zstd": ("a.jsonl.zst", lambda: zstd(b'{"text": "' + b"a" * MANY), "64 MiB"),
    "a string in an array": ("a.json.gz", lambda: gzip.compress(b'[{"text": "' + b"a" * MANY, 1), "64 MiB"),
    "brackets in an array": ("a.json.gz", lambda: gzip.compress(b"[" * 10_000, 1), "nested too deeply"),
    "a field of a csv": ("a.csv.gz", lambda: gzip.compress(b'text\n"' + b"a" * MANY, 1), "64 MiB"),
    "a record of a csv": ("a.csv.gz", lambda: gzip.compress(b"text\n" + b'"a\n",' * (5 << 20), 1), "fields"),
    "names of a csv": ("a.csv", lambda: b",".join(b"%d" % n for n in range(10**6)) + b"\n1\n", "columns"),
    "fields of a csv": ("a.csv", lambda: b"a\n" + b"," * (5 << 20) + b"\n", "fields"),
    "a cell of parquet": ("a.parquet", lambda: table({"text": ["a" * MANY]}), "64 MiB"),
    "a cell of arrow": ("a.arrow", lambda: ipc({"text": ["a" * MANY]}), "64 MiB"),
    "a text that is none": ("a.arrow", no_text, "cannot be read"),
    "a text that ends elsewhere": ("a.arrow", beyond_the_text, "cannot be read"),
    "a day of no calendar": ("a.arrow", of_another_calendar, "cannot be read"),
    "columns": ("a.parquet", lambda: table({f"c{n}": [1] for n in range(5000)}), "no form"),
    "gzip is cut": ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "a"}\n' * 9999)[:-20], "cut off"),
    "zstd is cut": ("a.jsonl.zst", lambda: zstd(bytes(range(256)) * 999)[:-20], ""),
    "names with controls": ("a.jsonl", lambda: json.dumps({EVIL: 1, "messages": [{"role": EVIL}]}).encode(), "\\x1b"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_data(arena, mxfp4_model, tmp_path, name):
    file, content, said = ATTACKS[name]
    (tmp_path / file).write_bytes(content())
    found = arena.run("preprocess", tmp_path / file, tmp_path / "out.jsonl", "--tokenizer", mxfp4_model, "--show", "0")
    assert said in found.check(65, lines=None)


MERGED = "\n".join(f"  a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}], x{n}: 1}}" for n in range(40))
DOUBLED = "[" + "&a0 [x], " + "".join(f"&a{n + 1} [*a{n}, *a{n}], " for n in range(40)) + "]"
CONFIG = "configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {path}\n"
CARDS = {
    "merge keys": f"x:\n  a0: &a0 {{y: 1}}\n{MERGED}\n",
    "a list in itself": "configs: &a [*a, {data_files: *a}]",
    "a list of lists of lists": CONFIG.format(split=DOUBLED, path=DOUBLED),
    "a number of many digits": CONFIG.format(split="0x" + "f" * 5000, path="*"),
    "a fraction of many parts": CONFIG.format(split="1" + ":1" * 5000 + ".5", path="*"),
    "patterns that are none": CONFIG.format(split="train", path="[1, null, {a: b}]"),
    "a pattern of many stars": CONFIG.format(split="train", path='"' + "*a" * 500 + '"'),
    "brackets": "configs: " + "[" * 100_000,
    "an object of Python": "configs: !!python/object/apply:os.system [touch marker]",
    "a table as a name": "? {a: b}\n: c",
    "a list": "- configs",
    "configs that are none": "configs: 3",
    "a long one": "x: " + "a" * (2 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_the_card_of_a_data_set(arena, mxfp4_model, tmp_path, name):
    """Its head is YAML of a stranger's: it is read, or it is said what is wrong with it."""
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "train" / "a.jsonl").write_text('{"text": "some words"}\n')
    (data / "README.md").write_text(f"---\n{CARDS[name]}\n---\nwords\n")
    found = arena.run("preprocess", data, tmp_path / "out.jsonl", "--tokenizer", mxfp4_model, "--show", "0")
    found.check(0, 2, 65, lines=None)
    assert not list(Path.cwd().glob("marker"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("letter", ["a", "é", "a b "])
def test_a_text_without_an_end_of_a_line_is_cut(tmp_path, monkeypatch, packed, letter):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 100)
    monkeypatch.setattr(inputs, "LARGEST_TEXT", 301)
    text = f"first\n{letter * 1000}\n{letter * 99}".encode()
    file = tmp_path / ("a.txt.gz" if packed else "a.txt")
    file.write_bytes(gzip.compress(text) if packed else text)
    pieces = list(inputs.pieces([recognise(Path(file))]))
    contents = [piece.read() for piece in pieces]
    assert b"".join(contents) == text and max(map(len, contents)) <= (len(text) if packed else 401)
    assert all(content.decode() for content in contents), "no character is cut"
    assert [piece.ends_file for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_how_many_fields_a_record_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MOST_FIELDS", 50)
    monkeypatch.setattr(inputs, "PIECE_BYTES", 100)
    for content, taken in ((b"," * 140, True), (b"," * 200, False), (b'"a\n",' * 140, True), (b'"a\n",' * 200, False)):
        (tmp_path / "a.csv").write_bytes(b"a\n" + content + b"b\n")
        if taken:
            assert (
                b"".join(piece.read() for piece in inputs.pieces([recognise(tmp_path / "a.csv")])) == content + b"b\n"
            )
        else:
            with pytest.raises(DataError, match="a record has more than 50 fields"):
                list(inputs.pieces([recognise(tmp_path / "a.csv")]))
