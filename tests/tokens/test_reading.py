"""Every format gives the same samples as JSON lines, in whatever pieces it is read; what is not read is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from sets import PLAIN, model_with, processed, samples, write_rows
from slipway.commands.preprocess import preprocess
from slipway.errors import DataError, UsageError
from slipway.tokens import inputs, outputs
from slipway.tokens.encoder import Encoded, Encoder
from slipway.tokens.inputs import Piece
from slipway.tokens.rows import rows_of
from slipway.tokens.sources import recognise

WORDS = r'the quick brown fox, "jumps" over|the lazy dog; {brackets] and ünïcödé ⟦too⟧ \ {['.replace("|", "\n").split(
    " "
)
# Of many lengths, with everything in them that a reader may stumble over; some are longer than a piece.
ROWS = [
    {
        "instruction": " ".join(WORDS[: n % 9 + 1]) + str(n),
        "input": "",
        "output": " ".join(WORDS[n % 5 :] * (n % 7 + 1)),
    }
    for n in range(60)
]


def zstd(content: bytes) -> bytes:
    return arrow.compress(content, codec="zstd", asbytes=True)


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list, delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet_of(rows: list) -> bytes:
    return parquet_bytes(arrow.Table.from_pylist(rows))


def parquet_bytes(whole: arrow.Table) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(whole, sink, row_group_size=17)
    return sink.getvalue().to_pybytes()


def arrow_of(rows: list, new: Callable = arrow.ipc.new_stream) -> bytes:
    sink, whole = arrow.BufferOutputStream(), arrow.Table.from_pylist(rows)
    with new(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=13)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, tuple[str, Callable[[list], bytes]]] = {
    "array": ("x.json", lambda rows: json.dumps(rows).encode()),
    "array over lines": ("x.json", lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode()),
    "objects over lines": ("x.json", lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode()),
    "lines named json": ("x.json", lines),
    "array named jsonl": ("x.jsonl", lambda rows: json.dumps(rows).encode()),
    "lines without a name": ("rows", lines),
    "lines in a text": ("x.txt", lines),
    "blank lines": ("x.jsonl", lambda rows: b"\n" + lines(rows).replace(b"\n", b"\r\n\r\n")),
    "mark": ("x.jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows)),
    "array after a mark": ("x.json", lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode()),
    "utf-16": ("x.jsonl", lambda rows: lines(rows).decode().encode("utf-16")),
    "utf-16 without a mark": ("x.jsonl", lambda rows: lines(rows).decode().encode("utf-16-be")),
    "utf-32": ("x.json", lambda rows: json.dumps(rows, ensure_ascii=False).encode("utf-32")),
    "gz": ("x.jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    "two members of gz": ("x.jsonl.gz", lambda rows: gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:]))),
    "array in gz": ("x.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "zst": ("x.jsonl.zst", lambda rows: zstd(lines(rows))),
    "two frames of zst": ("x.jsonl.zst", lambda rows: zstd(lines(rows[:9])) + zstd(lines(rows[9:]))),
    "csv": ("x.csv", lambda rows: table(rows, ",")),
    "csv with a mark": ("x.csv", lambda rows: b"\xef\xbb\xbf" + table(rows, ";")),
    "tsv": ("x.tsv", lambda rows: table(rows, "\t")),
    "csv in gz": ("x.csv.gz", lambda rows: gzip.compress(table(rows, ","))),
    "parquet": ("x.parquet", parquet_of),
    "arrow stream": ("x.arrow", arrow_of),
    "arrow file": ("x.arrow", lambda rows: arrow_of(rows, arrow.ipc.new_file)),
}


@pytest.fixture(scope="module")
def model(mxfp4_model, tmp_path_factory) -> Path:
    return model_with(mxfp4_model, tmp_path_factory.mktemp("reading") / "model", PLAIN)


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few rows."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", 600)
    monkeypatch.setattr("slipway.tokens.sources.BLOCK_BYTES", 250)


def written(model: Path, data: Path, name: str, **options: Any) -> Path:
    out = data.parent / name
    preprocess(str(data), str(out), tokenizer=str(model), show=0, **options)
    return out


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_samples(model, small, tmp_path, form):
    name, encode = FORMATS[form]
    data = tmp_path / name
    data.write_bytes(encode(ROWS))
    out = written(model, data, "out.jsonl", workers=1)
    wanted = written(model, write_rows(tmp_path / "plain.jsonl", ROWS), "wanted.jsonl", workers=1)
    assert len(samples(out)) == len(ROWS) and out.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("form", ["array", "gz", "csv", "parquet", "arrow stream", "utf-16"])
def test_many_processes_and_a_kill_give_the_same_bytes(model, small, tmp_path, monkeypatch, form):
    monkeypatch.setattr(outputs, "COMMIT_SECONDS", 0.0)
    name, encode = FORMATS[form]
    data = tmp_path / name
    data.write_bytes(encode(ROWS))
    options = {"eval_split": "20%"}
    whole = written(model, data, "whole.jsonl", workers=1, **options)
    many = written(model, data, "many.jsonl", workers=3, **options)
    done: list[Piece] = []
    original = Encoder.__call__

    def stopping(self: Encoder, piece: Piece) -> Encoded:
        done.append(piece)
        if len(done) in (3, 7):
            raise KeyboardInterrupt
        return original(self, piece)

    monkeypatch.setattr(Encoder, "__call__", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            written(model, data, "killed.jsonl", workers=1, **options)
    killed = written(model, data, "killed.jsonl", workers=1, **options)
    assert [done.count(piece) for piece in dict.fromkeys(done)].count(2) == 2, "only what was cut off is done again"
    for other in (many, killed):
        assert other.read_bytes() == whole.read_bytes()
        assert other.with_suffix(".eval.jsonl").read_bytes() == whole.with_suffix(".eval.jsonl").read_bytes()
    assert len(samples(whole)) + len(samples(whole.with_suffix(".eval.jsonl"))) == len(ROWS)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_file_is_never_in_memory_whole(model, tmp_path, monkeypatch):
    """Pieces of every format stay small, however large the file is."""
    rows = [{"text": "word " * 200}] * 4000  # 4 MB
    monkeypatch.setattr(inputs, "PIECE_BYTES", 50_000)
    for form in ("array", "array over lines", "gz", "zst", "csv", "parquet", "arrow stream", "arrow file", "utf-16"):
        name, encode = FORMATS[form]
        data = tmp_path / name
        data.write_bytes(encode(rows))
        found = [len(piece.read()) for piece in inputs.pieces([recognise(data)])]
        assert len(found) > 5 and max(found) < 700_000, form
        done = sum(piece.size for piece in inputs.pieces([recognise(data)]))
        assert 0.9 < done / data.stat().st_size <= 1, form  # what `preprocess` says while it works


@pytest.mark.parametrize("packing", ["none", "zstd"])
def test_a_row_group_is_never_in_memory_whole(tmp_path, packing):
    """pandas and polars put up to a million rows into one, which may be all of a file of any size."""
    random = np.random.default_rng(0)
    texts = [random.bytes(500).hex() for _ in range(30_000)]  # 30 MB that do not repeat themselves
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "x.parquet", compression=packing)
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    before, most, found = arrow.total_allocated_bytes(), 0, 0
    for piece in inputs.pieces([recognise(tmp_path / "x.parquet")]):
        most, found = max(most, arrow.total_allocated_bytes() - before), found + len(list(rows_of(piece)))
    assert found == len(texts) and most < 10_000_000


def test_no_piece_carries_all_texts_of_a_dictionary(tmp_path, monkeypatch):
    """A categorical column of pandas is numbers, and a dictionary of all texts beside them."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", 50_000)
    texts = [f"{number} " * 100 for number in range(2000)]
    rows = [*texts, None, *texts]
    whole = arrow.table({"text": arrow.array(rows).dictionary_encode()})
    parquet.write_table(whole, tmp_path / "x.parquet")
    with arrow.ipc.new_file(tmp_path / "x.arrow", whole.schema) as file:
        file.write_table(whole)
    (column,) = whole["text"].chunks
    views = arrow.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(arrow.string_view()))
    with arrow.ipc.new_file(tmp_path / "polars.arrow", arrow.schema({"text": views.type})) as file:
        file.write_table(arrow.table({"text": views}))
    for name in ("x.parquet", "x.arrow", "polars.arrow"):
        found = [*inputs.pieces([recognise(tmp_path / name)])]
        assert [row.get("text") for piece in found for _, row in rows_of(piece)] == rows
        assert sum(len(piece.read()) for piece in found) < 4_000_000 and len(found) < 100, name


@pytest.mark.parametrize("name, content, said", [
    ("x.json", b'[{"text": "a"}, {"text": "b"', "ends in the middle"),
    ("x.json", b'[{"text": "a"}] {"text": "b"}', "something follows the end"),
    ("x.json", b'[{"text": "a"}, 3]', r"x\.json:1, row 2: a row is an object"),
    ("x.json", b'[{"text": "a"},\n {"text": b}]', r"x\.json:2, row 2: not JSON"),
    ("x.json", b'{"version": 1, "data": [{"text": "a"}]}', "its keys are version, data"),
    ("x.json", b"text", "x.json:1: not JSON"),
    ("x.json", b'{"text": "a"}}\n', "not JSON"),
    ("x.jsonl", b'{"text": "caf\xe9"}\n', r"x\.jsonl:1: not UTF-8 \(byte 0xe9\)"),
    ("x.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    ("x.jsonl", b'{"text": "\\ud83d"}\n', "half of a surrogate pair"),
    ("x.jsonl", b'{"text": "a"}\n' + bytes(64), r"x\.jsonl:2 holds a NUL byte"),
    ("x.json", b"PK\x03\x04" + bytes(100), "zip archive"),
    ("x.txt", b"PAR1" + bytes(100), "x.txt cannot be read"),
    ("x.parquet", b"text", "does not begin like such a file"),
    ("x.bin", bytes(range(256)), "is binary"),
    ("x.pkl", b"\x80\x04\x95", "a pickle"),
    ("x.jsonl.gz", b'{"text": "a"}\n', "is not packed"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-20], "was cut off"),
    ("x.arrow", arrow_of([{"text": "a"}] * 20)[:-8], r"x\.arrow ends too early: it was cut off"),
    ("x.arrow", arrow_of([])[:-8], r"x\.arrow ends too early: it was cut off"),
    ("x.jsonl.zst", zstd(b'{"text": "abcdefgh"}\n' * 100)[:-9], "cannot be read"),
    # A frame with one block as it is, whose window is said to be of 2 GB.
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\xa8" + (15 << 3 | 1).to_bytes(3, "little") + b'{"text": "ab"}\n',
     r"x\.jsonl\.zst was packed with a larger window than is read \(zstd --long\); unpack it"),
    ("x.jsonl.bz2", b"BZh91AY&SY" + bytes(9), "bzip2"),
    ("x.csv", b"prompt,completion\na,b\na\n", r"x\.csv:3: 1 fields, but the first line names 2"),
    ("x.csv", b'prompt,completion\na,"b\n', "not csv"),
    ("x.csv", b'prompt,completion\na,"b\nc"\na,caf\xe9\n', r"x\.csv:4: not UTF-8 \(byte 0xe9\)"),
    ("x.csv", b"prompt,completion,completion\na,b,c\n", "two columns named completion"),
    ("x.parquet", parquet_bytes(arrow.Table.from_arrays([["a"], ["b"], ["c"]], ["prompt", "completion", "completion"])),
     "two columns named completion"),
    ("x.parquet", parquet_of([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]),
     r"x\.parquet: row 2: no form that is known: its keys are prompt \(and null are completion\)"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(model, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        written(model, tmp_path / name, "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("make", [
    lambda path: np.save(path / "x.npy", np.zeros(3)),
    lambda path: zipfile.ZipFile(path / "x.xlsx", "w").writestr("a", "b"),
    lambda path: (path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9)),
])  # fmt: skip
def test_no_other_format_is_learned_as_text(model, tmp_path, make):
    make(tmp_path)
    (file,) = tmp_path.iterdir()
    with pytest.raises(DataError, match="not read"):
        written(model, file, "out.jsonl")
    with pytest.raises(DataError, match="has no file that is read"):
        written(model, tmp_path, "../out.jsonl")


# ---------------------------------------------------------------------------- folders


def folder(tmp_path: Path, files: dict[str, Any]) -> Path:
    """A folder whose row files hold their own name."""
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": name, "completion": "b"}]
        if name.endswith(".parquet"):
            parquet.write_table(arrow.Table.from_pylist(rows), path)
        else:
            path.write_bytes(lines(rows) if content is None else content)
    return tmp_path / "data"


def prompts(model: Path, data: Path | str, **options: Any) -> list[str]:
    return [text.partition("⟦")[0] for text in processed(model, data, **options)[0]]


def fresh(model: Path, tmp_path: Path) -> Path:
    return model_with(model, tmp_path / "model", PLAIN)


def test_a_downloaded_data_set(model, tmp_path, capsys):
    data = folder(tmp_path, {
        "README.md": b"# A card\n", "LICENSE.txt": b"words\n", ".gitattributes": b"x", "set.py": b"code\n",
        "dataset_infos.json": b"{}",
        "data/train-00000-of-00002.parquet": None, "data/train-00001-of-00002.parquet": None,
        "data/test-00000-of-00001.parquet": None, "image.png": b"\x89PNG",
    })  # fmt: skip
    own = fresh(model, tmp_path)
    assert prompts(own, data) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    said = capsys.readouterr().err
    assert "reading data/train-00000-of-00002.parquet, data/train-00001-of-00002.parquet (parquet)" in said
    for left in (
        "README.md (about the data)",
        "image.png (not of a kind that is read)",
        "-of-00001.parquet (split test)",
    ):
        assert left in said
    assert prompts(own, data, split="test") == ["data/test-00000-of-00001.parquet"]
    with pytest.raises(UsageError, match="no split tset, did you mean test"):
        prompts(own, data, split="tset")


def test_the_data_root_of_nemo(model, tmp_path):
    data = folder(tmp_path, {f"{name}.jsonl": None for name in ("training", "validation", "test")})
    own = fresh(model, tmp_path)
    assert prompts(own, data) == prompts(own, data, split="training") == ["training.jsonl"]
    assert prompts(own, data, split="validation") == prompts(own, data, split="dev") == ["validation.jsonl"]


def test_the_splits_of_a_card(model, tmp_path):
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n  - split: gold\n"
    card += b"    path: [b/*.jsonl]\n- config_name: more\n  data_files: c/*\n---\nwords\n"
    data = folder(tmp_path, {"README.md": card, "a/test.jsonl": None, "b/1.jsonl": None, "c/1.jsonl": None})
    own = fresh(model, tmp_path)
    assert prompts(own, data) == ["a/test.jsonl"] and prompts(own, data, split="gold") == ["b/1.jsonl"]
    assert prompts(own, data, split="more/train") == ["c/1.jsonl"]
    (data / "README.md").write_bytes(b"---\n: [\n---\n")
    with pytest.raises(DataError, match="is not YAML"):
        prompts(own, data)


def test_arrow_by_the_name_that_pandas_and_polars_give_it(model, tmp_path):
    """In a folder the name decides what is data; such a file was read alone and left in a folder."""
    (tmp_path / "data").mkdir()
    table = arrow.Table.from_pylist([{"text": "a"}, {"text": "b"}])
    feather.write_feather(table, tmp_path / "data" / "x.feather")
    assert len(samples(written(model, tmp_path / "data", "out.jsonl"))) == 2
    feather.write_feather(table, tmp_path / "data" / "x.feather", version=1)
    with pytest.raises(DataError, match="is Feather of version 1"):
        written(model, tmp_path / "data", "again.jsonl")


@pytest.mark.parametrize("main", ["bbb", "gone", None])
def test_revisions_of_one_data_set_are_not_read_together(model, tmp_path, main):
    """The hub's cache keeps the old one when a data set is downloaded again."""
    data = folder(tmp_path, {"snapshots/aaa/train.jsonl": None, "blobs/0123": b"x"})
    assert len(samples(written(model, data, "out.jsonl"))) == 1
    folder(tmp_path, {"snapshots/bbb/train.jsonl": None} | ({"refs/main": main.encode()} if main else {}))
    with pytest.raises(UsageError, match=rf"2 revisions .*aaa, bbb.*snapshots/{'bbb' if main == 'bbb' else 'aaa'}$"):
        written(model, data, "again.jsonl")
    assert len(samples(written(model, data / "snapshots" / "bbb", "out.jsonl"))) == 1


def test_texts_are_all_of_one_split(model, tmp_path):
    data = folder(tmp_path, {"test_it.py": b"code here\n", "README.md": b"words here\n", "train.txt": b"more words\n"})
    assert len(processed(fresh(model, tmp_path), data)[0]) == 3
    with pytest.raises(UsageError, match="--split x is for a folder"):
        processed(model, data / "train.txt", split="x")


def test_a_folder_without_a_train_split_says_so(model, tmp_path):
    data = folder(tmp_path, {"test.jsonl": None, "dev.jsonl": None})
    with pytest.raises(UsageError, match="no split train; it has validation, test: give one by --split"):
        prompts(model, data)
