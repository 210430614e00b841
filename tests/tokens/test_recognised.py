"""What a file is, by its first bytes and its name; which split it belongs to; what a name of the hub means."""

from __future__ import annotations

import bz2
import codecs
import gzip
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet
from slipway.errors import DataError, UsageError
from slipway.tokens import folders, hub, sources
from slipway.tokens.folders import inputs_of
from slipway.tokens.sources import ARROW, CSV, LINES, PARQUET, TEXT, VALUES, Source, recognise

ROW = b'{"text": "a"}'


def written(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name, content, kind", [
    ("a.txt", b"words", TEXT), ("a.txt", ROW + b"\n" + ROW, LINES), ("a", ROW, LINES), ("a.txt", b"[" + ROW, VALUES),
    ("a.txt", b' [ {"a b\\"c" : 1', VALUES), ("a.txt", b"[1, 2]", TEXT), ("a.txt", b"{ words }", TEXT),
    ("a.py", ROW, TEXT), ("a.md", ROW, TEXT), ("a.rst", ROW, LINES),
    ("a.jsonl", ROW + b"\n" + ROW, LINES), ("a.jsonl", b"[" + ROW + b"]", VALUES), ("a.jsonl", b"words", LINES),
    ("a.json", ROW, LINES), ("a.json", b'{\n"text": "a"\n}', VALUES), ("a.json", b"  \n" + ROW + b"\n" + ROW, LINES),
    ("a.json", b'{"text":\n"a"}\n' + ROW, VALUES), ("a.ndjson", b"{broken\n" + ROW, LINES), ("a.JSON", ROW, LINES),
    ("a.csv", b"a,b\n1,2", CSV), ("a.TSV", ROW, CSV), ("a.jsonl", b"", LINES), ("a.json", b" ", LINES),
    ("a", b"PAR1", PARQUET), ("a.parquet", b"PAR1", PARQUET), ("a.arrow", b"ARROW1", ARROW),
    ("a.arrow", b"\xff\xff\xff\xff", ARROW),
])  # fmt: skip
def test_what_a_file_holds(tmp_path, name, content, kind):
    assert recognise(written(tmp_path, name, content)) == Source(tmp_path / name, kind)


@pytest.mark.parametrize("encoding, mark", [
    ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", codecs.BOM_UTF32_LE), ("utf-32-be", codecs.BOM_UTF32_BE), ("utf-16-le", b""), ("utf-16-be", b""),
])  # fmt: skip
def test_in_which_encoding(tmp_path, encoding, mark):
    text = '{"text": "words and ünïcödé"}\n' * 20
    file = written(tmp_path, "a.jsonl", mark + text.encode(encoding))
    found = recognise(file)
    assert found == Source(file, LINES, "", encoding, len(mark))
    assert found.is_plain == (encoding == "utf-8")
    with file.open("rb") as raw:
        assert b"".join(found.blocks(raw)).decode() == text
    assert found.describe() == "JSON lines" + (f", {encoding}" if encoding != "utf-8" else "")


def test_token_ids_are_no_utf_16(tmp_path):
    """In 16 bits, as Megatron and nanoGPT write them, the second byte of most is 0 where ids are small."""
    ids = np.random.default_rng(0).integers(1, 400, 10_000).astype("<u2")
    with pytest.raises(DataError, match=r"train\.bin:\d+ is binary and is not read"):
        recognise(written(tmp_path, "train.bin", ids.tobytes()))
    written(tmp_path, "letters.bin", "only letters".encode("utf-16-le"))
    assert recognise(tmp_path / "letters.bin").encoding == "utf-16-le"
    written(tmp_path, "letters.idx", b"MMIDIDX")
    with pytest.raises(DataError, match=r"letters\.bin has tokens of Megatron's, which are ready for training"):
        recognise(tmp_path / "letters.bin")


def test_short_texts_are_utf_8(tmp_path):
    assert recognise(written(tmp_path, "a.txt", "abc".encode("utf-16-le")[:6].replace(b"\0", b"x"))).encoding == "utf-8"
    assert recognise(written(tmp_path, "b.txt", "abcd".encode("utf-16-le"))).encoding == "utf-16-le"
    with pytest.raises(DataError, match=r"c\.txt:1 holds a NUL byte"):
        recognise(written(tmp_path, "c.txt", "abc".encode("utf-16-le")))


@pytest.mark.parametrize("packing, pack", [
    ("gzip", gzip.compress), ("zstd", lambda content: arrow.compress(content, codec="zstd", asbytes=True))
])  # fmt: skip
def test_what_is_packed(tmp_path, packing, pack):
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.jsonl", "A.JSONL.GZ"):
        file = written(tmp_path, name, pack(ROW + b"\n"))
        found = recognise(file)
        assert found == Source(file, LINES, packing) and not found.is_plain
        assert found.describe() == f"JSON lines, {packing}"
        with file.open("rb") as raw:
            assert b"".join(found.blocks(raw)) == ROW + b"\n"
    with pytest.raises(DataError, match=f"is parquet packed by {packing}; unpack it first"):
        recognise(written(tmp_path, "b.parquet", pack(b"PAR1")))


@pytest.mark.parametrize("begin", sources.NOT_READ)
def test_what_is_handed_over_by_mistake_is_named(tmp_path, begin):
    """By its own bytes alone: whatever follows, and whatever the name says."""
    for name, rest in (("a.txt", b""), ("a.jsonl", b" more"), ("a", bytes(9))):
        with pytest.raises(DataError) as error:
            recognise(written(tmp_path, name, begin + rest))
        assert f"{name} is {sources.NOT_READ[begin]}, which is not read; give JSON lines" in str(error.value)


def test_the_first_bytes_are_those_that_such_files_have(tmp_path):
    import io
    import pickle
    import zipfile

    for protocol in (2, 3, 4, 5):
        with pytest.raises(DataError, match="is a pickle"):
            recognise(written(tmp_path, "a.txt", pickle.dumps(["a"], protocol)))
    for make, said in (
        (lambda file: np.save(file, np.zeros(2)), "an array of NumPy's"),
        (lambda file: zipfile.ZipFile(file, "w").writestr("a", "b"), "a zip archive"),
    ):
        file = io.BytesIO()
        make(file)
        with pytest.raises(DataError, match=said):
            recognise(written(tmp_path, "a.txt", file.getvalue()))


def test_a_pointer_of_git_lfs_is_not_the_file(tmp_path):
    """As a clone without Git LFS has it; a text would be learned, and the cure is not to copy it again."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz"):
        with pytest.raises(DataError, match=rf"{name} is not the file itself.*git lfs pull"):
            recognise(written(tmp_path, name, pointer))


def test_every_level_of_bzip2_and_encrypted_parquet_are_named(tmp_path):
    for level in range(1, 10):
        with pytest.raises(DataError, match="is packed by bzip2"):
            recognise(written(tmp_path, "a.jsonl.bz2", bz2.compress(ROW, level)))
    with pytest.raises(DataError, match=r"a\.parquet is encrypted"):
        recognise(written(tmp_path, "a.parquet", b"PARE" + bytes(90) + b"PARE"))
    assert recognise(written(tmp_path, "a.txt", b"PARENTS may read this.")).kind == TEXT


def test_what_of_a_folder_is_no_file_is_named(tmp_path):
    """Nothing behind a link to a folder is read, which may be all of a data set."""
    written(tmp_path / "data", "a.jsonl", ROW)
    written(tmp_path / "other", "b.jsonl", ROW)
    written(tmp_path / "data" / "inside", "c.jsonl", ROW)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "file.jsonl").symlink_to(tmp_path / "other" / "b.jsonl")
    (tmp_path / "data" / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "data" / "pipe.jsonl")
    found = inputs_of(tmp_path / "data", None)
    assert [source.path.name for source in found.sources] == ["a.jsonl", "file.jsonl", "c.jsonl"]
    assert found.left == {"gone.jsonl": "a link to nothing", "more": "a link to a folder", "pipe.jsonl": "no file"}
    with pytest.raises(UsageError, match=r"is a device or a pipe.*write it to a file first"):
        inputs_of(tmp_path / "data" / "pipe.jsonl", None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode, named", [(0o700, "inside"), (0o744, "inside/b.jsonl")])
def test_a_folder_that_may_not_be_read_is_not_left_in_silence(mode, named):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, "a.jsonl", ROW)
        written(folder / "inside", "b.jsonl", ROW)
        folder.chmod(0o755)
        (folder / "inside").chmod(mode)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=f"{named} cannot be read .Permission denied.; let its owner allow it"):
                inputs_of(folder, None)
        finally:
            os.seteuid(0)


def test_a_name_that_promises_something_else(tmp_path):
    for name, content, said in (
        ("a.parquet", ROW, "is named .parquet but does not begin like such a file"),
        ("a.txt.gz", b"words", "is named .gz but is not packed"),
        ("a.json", b"words", "a.json:1: not JSON: it begins with 'w'"),
        ("a.bin", b"a\nb\0", r"a\.bin:2 is binary"),
        ("a.md", b"\0", r"a\.md:1 holds a NUL byte"),
    ):
        with pytest.raises(DataError, match=said):
            recognise(written(tmp_path, name, content))
    assert recognise(written(tmp_path, "empty.gz", b"")).kind == TEXT


# ---------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name, split", [
    *((f"{word}.jsonl", "validation") for word in ("validation", "valid", "val", "dev")),
    *((f"{word}.jsonl", "test") for word in ("test", "testing", "eval", "evaluation")),
    *((f"{word}.jsonl", "train") for word in ("train", "training", "words", "a", "contest", "latest", "devil")),
    ("data/train_sft-00000-of-00003.parquet", "train_sft"), ("data/gold-00000-of-00003-abc.parquet", "gold"),
    ("data/test-00000-of-00001.jsonl.gz", "test"), ("other/gold-00000-of-00003.parquet", "train"),
    ("data/gold-0-of-3.parquet", "train"), ("test/train.jsonl", "test"), ("test/a.jsonl", "test"),
    ("x/Test-1/a.b.jsonl", "test"), ("my_val_2.csv", "validation"), ("data/x-00000-of-00001.y.parquet", "x"),
])  # fmt: skip
def test_the_split_of_a_file(name, split):
    assert folders.splits_of([name], {}) == {split: [name]}


def configs(*data_files: object, **beside: object) -> dict:
    return {"configs": [{"config_name": "default", **({"data_files": [*data_files]} if data_files else {}), **beside}]}


# What `datasets` 5.2 reads as split="train" of a folder with these files and this head of the card.
@pytest.mark.parametrize("files, card, read", [
    ("a.jsonl raw/b.jsonl", configs({"split": "train", "path": "*.jsonl"}), "a.jsonl"),
    ("a.jsonl raw/b.jsonl", configs({"split": "train", "path": "**/*.jsonl"}), "a.jsonl raw/b.jsonl"),
    ("data/a.jsonl data/x/b.jsonl c.jsonl", configs("data/**"), "data/a.jsonl data/x/b.jsonl"),
    ("data/a.jsonl data/x/b.jsonl", configs("data/*"), "data/a.jsonl"),
    ("data/a.jsonl data/x/b.jsonl", configs("./data/?.jsonl"), "data/a.jsonl"),
    ("data/a.jsonl data/b.jsonl", configs("data/[!b]*"), "data/a.jsonl"),
    ("data/a.jsonl other/b.jsonl", configs(data_dir="data"), "data/a.jsonl"),
    ("data/train.jsonl data/test.jsonl train.jsonl", configs(data_dir="./data/"), "data/train.jsonl"),
    ("data/a.jsonl a.jsonl", configs("a.*", data_dir="data"), "data/a.jsonl"),
    ("a.jsonl __cache__/b.jsonl", configs("**"), "a.jsonl"),
    ("a.jsonl __cache__/b.jsonl", configs("__cache__/*"), "__cache__/b.jsonl"),
    ("a.jsonl __cache__/b.jsonl", {}, "a.jsonl"),
    ("train.jsonl _private/x.jsonl", {}, "train.jsonl"),
    ("train/a.jsonl test/a.jsonl valid/a.jsonl", {}, "train/a.jsonl"),
    ("train_test.jsonl b.jsonl", {}, "train_test.jsonl"),
    ("a.jsonl raw/b.jsonl", {}, "a.jsonl raw/b.jsonl"),
    ("data/train-00000-of-00001.csv data/train_sft-00000-of-00001.csv train.csv", {}, "data/train-00000-of-00001.csv"),
    ("train/test.jsonl train.jsonl", {}, "train/test.jsonl"),
])  # fmt: skip
def test_a_folder_is_read_as_the_hub_reads_it(files, card, read):
    assert folders.splits_of(sorted(files.split()), card)["train"] == read.split()


def test_what_the_hub_does_not_take_either():
    with pytest.raises(DataError, match=r"in the pattern \*\*.jsonl, \*\*.jsonl is not known; write \*\*/\*.jsonl"):
        folders.splits_of(["a.jsonl"], configs("**.jsonl"))
    with pytest.raises(DataError, match=r"the data is a/none/\*, b, and no such file is read"):
        card = configs("none/*", data_dir="a")
        folders.splits_of(["a/1.jsonl"], {"configs": [*card["configs"], *configs(data_dir="b")["configs"]]})


def test_many_stars_take_no_time():
    assert not folders.matches("/".join("a" * 1000), "/".join(["**", "a"] * 1000) + "/b")


def test_files_of_no_split_are_named(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "a.jsonl", "train_test.jsonl"):
        written(tmp_path, name, ROW)
    found = folders.inputs_of(tmp_path, None)
    assert [source.path.name for source in found.sources] == ["train.jsonl", "train_test.jsonl"]
    assert found.left == {"test.jsonl": "split test", "a.jsonl": "of no split"}


def test_the_split_that_is_read():
    assert folders.chosen("D", {"train": [], "test": []}, None) == "train"
    assert folders.chosen("D", {"train": [], "validation": []}, "dev") == "validation"
    assert folders.chosen("D", {"dev": [], "validation": []}, "dev") == "dev", "its own word counts first"
    for asked, said in ((None, "no split train; it has test"), ("tets", "no split tets, did you mean test")):
        with pytest.raises(UsageError, match=said):
            folders.chosen("D", {"test": []}, asked)


CONFIG = {"config_name": "default", "data_files": [{"split": "gold", "path": "a/*"}, {"path": ["b/*", "c.jsonl"]}]}


@pytest.mark.parametrize("configs, found", [
    ([CONFIG], {"gold": ["a/1.jsonl"], "train": ["b/1.jsonl", "c.jsonl"]}),
    ([{**CONFIG, "config_name": "x"}], {"gold": ["a/1.jsonl"], "train": ["b/1.jsonl", "c.jsonl"]}),
    ([{"config_name": "x", "data_files": "a/*"}, CONFIG],
     {"x/train": ["a/1.jsonl"], "gold": ["a/1.jsonl"], "train": ["b/1.jsonl", "c.jsonl"]}),
    ([{"config_name": "x", "data_files": "a/*"}, {"config_name": "y", "default": True, "data_files": ["b/*"]}],
     {"x/train": ["a/1.jsonl"], "train": ["b/1.jsonl"]}),
    ([{"config_name": "x", "data_files": "a/*"}, {"config_name": "y", "data_files": "b/*"}],
     {"x/train": ["a/1.jsonl"], "y/train": ["b/1.jsonl"]}),
    ([{"config_name": "x"}, 3], {"train": ["a/1.jsonl", "b/1.jsonl", "c.jsonl", "d.txt"]}),
    ([{"config_name": "x", "data_files": {"split": "s"}}], {"train": ["a/1.jsonl", "b/1.jsonl", "c.jsonl", "d.txt"]}),
    ([], {"train": ["a/1.jsonl", "b/1.jsonl", "c.jsonl", "d.txt"]}),
])  # fmt: skip
def test_the_splits_of_a_card(configs, found):
    assert folders.splits_of(["a/1.jsonl", "b/1.jsonl", "c.jsonl", "d.txt"], {"configs": configs}) == found


def test_what_is_read_and_what_is_left_is_said_shortly(tmp_path):
    for name in ("a.jsonl", "b.json", "test.jsonl", "state.json", ".hidden.jsonl", "c.png", "note.txt"):
        written(tmp_path, name, ROW)
    found = folders.inputs_of(tmp_path, None)
    assert [source.path.name for source in found.sources] == ["a.jsonl", "b.json", "note.txt"]
    assert found.describe(tmp_path) == (
        "reading a.jsonl, b.json, note.txt (JSON lines); left: c.png (not of a kind that is read), "
        "state.json (about the data), test.jsonl (split test)"
    )
    written(tmp_path, "readme.txt", b"about it")
    assert folders.inputs_of(tmp_path, None).left["note.txt"] == "about the data"
    one = folders.inputs_of(tmp_path / "a.jsonl", None)
    assert one.left == {} and one.describe(tmp_path / "a.jsonl") == "reading a.jsonl (JSON lines)"
    for number in range(4, 9):
        written(tmp_path, f"{number}.jsonl", ROW)
    said = folders.inputs_of(tmp_path, "train").describe(tmp_path)
    assert said.startswith("reading 4.jsonl, 5.jsonl, 6.jsonl, 7.jsonl, 8.jsonl, a.jsonl and 1 more (JSON lines)")


def test_columns_in_the_names_of_folders_are_said(tmp_path):
    """As pandas, pyarrow and Spark write a table by one of its columns."""
    table = arrow.table({"text": ["one", "two", "three"], "language": ["de", "en", "de"], "year": [1, 1, 2]})
    parquet.write_to_dataset(table, tmp_path, partition_cols=["language", "year"])
    found = folders.inputs_of(tmp_path, None)
    assert len(found.sources) == 3
    assert found.describe(tmp_path).endswith("what the names of folders say is not read: language, year")
    one = found.sources[0].path
    assert "folders" not in folders.inputs_of(one, None).describe(one)


# ---------------------------------------------------------------------------- names of the hub


@pytest.mark.parametrize("name, found", [
    ("org/set", ("org/set", "main", "", None)), ("set", ("set", "main", "", None)),
    ("org/set@v1", ("org/set", "v1", "", None)), ("org/set/a/b.json", ("org/set", "main", "a/b.json", None)),
    ("org/set@v1/dir:test", ("org/set", "v1", "dir", "test")), ("org/set:test", ("org/set", "main", "", "test")),
    ("org/set:", ("org/set", "main", "", None)),
])  # fmt: skip
def test_the_parts_of_a_name(name, found):
    assert hub.parse(f"hf://datasets/{name}") == hub.Name(*found)
    assert str(hub.Name(*found)) == f"hf://datasets/{found[0]}@{found[1]}"


@pytest.mark.parametrize("name", ["", "/set", "org/", "org//set", "@v1", "org/set//a"])
def test_what_is_no_name(name):
    with pytest.raises(UsageError, match=r"is not the name of a data set; give hf://datasets/ORG/NAME"):
        hub.parse(f"hf://datasets/{name}")


def test_where_data_is_that_is_not_downloaded():
    assert hub.located("dir/a.jsonl") == (Path("dir/a.jsonl"), None)
    assert hub.located("hf:///dir/a.jsonl") == (Path("/dir/a.jsonl"), None)
    with pytest.raises(UsageError, match=r"^DATA hf://org/name names a model; a data set is hf://datasets/org/name$"):
        hub.located("hf://org/name")


def test_which_files_are_downloaded_where_the_hub_cannot_be_asked(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = hub._patterns(hub.parse("hf://datasets/org/set"))
    assert found[0] == "README.md" and len(found) == len({*found})
    for suffix in (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".md", ".py"):
        assert {f"*{suffix}", f"*{suffix}.gz", f"*{suffix}.zst"} <= {*found}
    assert hub._patterns(hub.parse("hf://datasets/org/set/dir/a.csv")) == ["README.md", "dir/a.csv", "dir/a.csv/*"]
