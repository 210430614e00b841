"""The edges of writing a plan: sizes, names, full disks, memory that is shared, work that goes on."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slipway.checkpoint import stream
from slipway.checkpoint.stream import Piece, Plan
from slipway.errors import UsageError, WriteError

MEMORY = 1 << 20


@pytest.mark.parametrize(
    "text, size",
    [
        ("1", 1), ("512", 512), ("7B", 7), ("3KB", 3000), ("2MB", 2 * 10**6), ("5GB", 5 * 10**9), ("1TB", 10**12),
        ("1.5gb", 1_500_000_000), ("20 MB", 20 * 10**6), ("1152921504606", 1152921504606),
    ],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert stream.parse_size(text, "--shard-size") == size


@pytest.mark.parametrize("text", ["", "0", "0.9", "-1GB", "GB", "5XB", "5G", "five", str(1 << 60), "nan", "1e30TB"])
def test_no_sizes_are_refused(text):
    with pytest.raises(UsageError, match="--shard-size is "):
        stream.parse_size(text, "--shard-size")
    assert stream.parse_size(str((1 << 60) - 128), "--shard-size") == (1 << 60) - 128


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "model-tiny").mkdir()
    (tmp_path / "file").touch()
    assert stream.existing_folder(str(tmp_path / "model-tiny")) == tmp_path / "model-tiny"
    with pytest.raises(UsageError, match="is a file; give the folder"):
        stream.existing_folder(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=f"model-tine does not exist, did you mean {tmp_path}/model-tiny"):
        stream.existing_folder(str(tmp_path / "model-tine"))
    for other in ("nothing-like-it", "none/model-tiny"):
        with pytest.raises(UsageError, match=r"does not exist$"):
            stream.existing_folder(str(tmp_path / other))


def test_an_output_that_is_there_or_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match=f"{name} exists"):
            stream.refuse_existing(tmp_path / name)
    with pytest.raises(UsageError, match=r"file is a file, so .*file/a/b cannot be created"):
        stream.refuse_existing(tmp_path / "file" / "a" / "b")
    stream.refuse_existing(tmp_path / "new" / "model")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EROFS, "choose another place"),
        (errno.EACCES, "choose another place"), (errno.EPERM, "choose another place"),
        (errno.ENOTDIR, "choose another place"), (errno.ENAMETOOLONG, "choose another place"),
        (errno.EIO, "choose another place"),
    ],
)  # fmt: skip
def test_an_error_of_the_file_system_names_the_output(number, words):
    with pytest.raises(WriteError, match=f"cannot write out: .*{words}"), stream.write_errors(Path("out")):
        raise OSError(number, os.strerror(number))


def test_another_error_stays_what_it_is():
    with pytest.raises(OSError) as error, stream.write_errors(Path("out")):
        raise OSError(errno.ECHILD, "No child processes")
    assert error.value.errno == errno.ECHILD


def plan_of(sizes: dict[str, int], pieces: list[Piece], **options) -> Plan:
    return Plan(**{"sizes": sizes, "pieces": pieces, "small": {}, "copies": {}, "identity": "x", **options})


def test_a_plan_becomes_a_folder(tmp_path):
    (tmp_path / "source").write_text("copied")
    pieces = [
        Piece(3, lambda: [("very/deep/a", 1, b"bcd"), ("b", 0, b"xy")]),
        Piece(1, lambda: [("very/deep/a", 0, b"a")]),
    ]
    small, copies = {"config/of/c.json": b"{}"}, {"files/of/copy": tmp_path / "source"}
    plan = plan_of({"very/deep/a": 5, "b": 2, "empty": 0}, pieces, small=small, copies=copies)
    assert plan.bytes == 9
    stream.run(plan, tmp_path / "out" / "model", "test", MEMORY)
    found = {str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in tmp_path.rglob("out/**/*") if f.is_file()}
    assert found == {
        "model/very/deep/a": b"abcd\0", "model/b": b"xy", "model/empty": b"", "model/config/of/c.json": b"{}",
        "model/files/of/copy": b"copied",
    }  # fmt: skip


def test_a_disk_that_is_too_small_is_refused_and_one_that_just_suffices_is_not(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    plan = plan_of({"a": 60}, [Piece(1, lambda: [])], small={"b": bytes(40)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 901, 99))
    with pytest.raises(WriteError, match=r"has 99 B free, but 100 B are needed"):
        stream.run(plan, tmp_path / "out", "test", MEMORY)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    stream.run(plan, tmp_path / "out", "test", MEMORY)


def begun(tmp_path: Path, identity: str, lines: str | None) -> tuple[set[int], Path]:
    """What is taken as done when a run finds such a journal; and the partial folder."""
    plan = plan_of({"a": 3}, [Piece(1, lambda: [])] * 13, identity=identity)
    partial = tmp_path / ".out.partial"
    assert stream._prepare(plan, partial) == set()
    (partial / "a").write_bytes(b"abc")
    if lines is None:
        (partial / "journal").unlink()
    else:
        (partial / "journal").write_text(lines)
    return stream._prepare(plan, partial), partial


def test_the_journal_tells_what_is_done(tmp_path):
    done, partial = begun(tmp_path, "x", "0\n12\n1")
    assert done == {0, 12}, "the last line may have been cut off"
    assert (partial / "journal").read_text() == "0\n12\n" and (partial / "a").read_bytes() == b"abc"


def test_a_plan_without_a_journal_is_done_if_its_note_says_so(tmp_path):
    done, partial = begun(tmp_path, "x", None)
    assert done == set(), "a journal that is lost says nothing"
    (partial / "journal").unlink()
    note = partial / "plan.json"
    note.write_text(note.read_text() + stream.DONE)
    plan = plan_of({"a": 3}, [Piece(1, lambda: [])] * 13, identity="x")
    assert stream._prepare(plan, partial) == set(range(13))


@pytest.mark.parametrize("changes", [{"identity": "y"}, {"sizes": {"a": 4}}])
def test_work_for_another_plan_is_thrown_away(tmp_path, changes):
    _, partial = begun(tmp_path, "x", "0\n12\n")
    (partial / "left").touch()
    assert stream._prepare(plan_of(**{"sizes": {"a": 3}, "pieces": [], **changes}), partial) == set()
    assert not (partial / "left").exists() and (partial / "a").read_bytes() == bytes(len((partial / "a").read_bytes()))


def test_only_what_is_not_done_is_done_and_the_journal_has_it(tmp_path):
    done: list[int] = []
    pieces = [Piece(1, lambda number=number: done.append(number) or []) for number in range(9)]
    plan = plan_of({"a": 3}, pieces)
    stream._prepare(plan, tmp_path / "partial")
    stream._fill(plan, tmp_path / "partial", {2, 5}, "test", MEMORY)
    assert sorted(done) == [0, 1, 3, 4, 6, 7, 8]
    assert sorted(map(int, (tmp_path / "partial" / "journal").read_text().split())) == sorted(done)


def test_the_first_error_ends_the_work_and_what_is_done_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(stream, "cores", lambda: 1)
    began: list[int] = []

    def work(number: int):
        began.append(number)
        if number == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return []

    pieces = [Piece(1, lambda number=number: work(number)) for number in range(1000)]
    with pytest.raises(WriteError, match="the disk is full"):
        stream.run(plan_of({"a": 3}, pieces), tmp_path / "out", "test", MEMORY)
    assert len(began) < 30, "a short queue, so that an error is seen soon"
    journal = (tmp_path / ".out.partial" / "journal").read_text().split()
    assert not (tmp_path / "out").exists() and journal and set(map(int, journal)) <= set(began) - {7}


def test_threads_share_the_memory(monkeypatch):
    """A piece that needs more than there is works alone; others as many at a time as fit."""
    budget, inside, most = stream._Budget(100), [], []
    lock = threading.Lock()

    def take(count: int) -> None:
        with budget.take(count):
            with lock:
                inside.append(count)
                most.append(list(inside))
            time.sleep(0.01)
            with lock:
                inside.remove(count)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, [50, 50, 500, 40, 60, 30, 1000, 100]))
    assert all(sum(min(count, 100) for count in now) <= 100 for now in most)
    assert any(len(now) == 2 for now in most) and budget.used == 0


def test_the_work_of_a_piece_counts_as_often_as_it_is_in_memory(monkeypatch):
    asked: list[int] = []
    take = stream._Budget.take
    monkeypatch.setattr(stream._Budget, "take", lambda self, count: asked.append(count) or take(self, count))
    done: list[int] = []
    stream.in_parallel({3: 10, 4: 20}, done.append, "test", MEMORY)
    assert sorted(done) == [3, 4] and sorted(asked) == [40, 80]


def test_a_budget_is_given_back_after_an_error():
    budget = stream._Budget(10)
    with pytest.raises(ZeroDivisionError), budget.take(10):
        raise ZeroDivisionError
    with budget.take(10):
        assert budget.used == 10


def test_the_kernel_may_write_less_than_it_is_given(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    (tmp_path / "file").write_bytes(bytes(12))
    file = stream._File(tmp_path / "file")
    file.write(1, memoryview(b"abcdefghij"))
    file.close()
    assert (tmp_path / "file").read_bytes() == b"\0abcdefghij\0"


def test_pieces_larger_than_the_buffer_for_memory_that_is_not_aligned(tmp_path):
    content = random.Random(0).randbytes(9_000_000)
    memory = memoryview(mmap.mmap(-1, len(content) + 1))[1:]
    memory[:] = content
    (tmp_path / "file").write_bytes(bytes(len(content)))
    file = stream._File(tmp_path / "file")
    file.write(0, memory)
    file.close()
    assert (tmp_path / "file").read_bytes() == content


def test_an_error_that_is_no_refusal_of_direct_writes_is_raised(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    file = stream._File(tmp_path / "file")
    if file._direct is None:
        pytest.skip("no direct writes here")

    def full(descriptor, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "_write_blocks", full)
    with pytest.raises(OSError, match="No space"):
        file.write(0, memoryview(bytes(1 << 20)))
    file.close()
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space"):
        stream._File(tmp_path / "file")


def test_a_journal_is_written_when_it_is_time_and_once_at_a_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "journal").touch()
    journal = stream._Journal(tmp_path / "journal", [])
    journal.add(1)
    assert journal._commit is None
    now[0] += stream.JOURNAL_SECONDS - 0.01
    journal.add(2)
    assert journal._commit is None, "too early"
    now[0] += 0.01
    journal.add(3)
    journal._commit.result()
    assert (tmp_path / "journal").read_text() == "1\n2\n3\n"
    journal.add(4)
    assert (tmp_path / "journal").read_text() == "1\n2\n3\n", "the time begins anew"
    journal.commit()
    journal.close()
    assert (tmp_path / "journal").read_text() == "1\n2\n3\n4\n"


def test_an_error_of_a_commit_is_raised_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "JOURNAL_SECONDS", 0.0)
    journal = stream._Journal(tmp_path / "none" / "journal", [])
    journal.add(1)
    journal.close()
    monkeypatch.setattr(journal, "_writer", ThreadPoolExecutor(1))
    with pytest.raises(FileNotFoundError):
        journal.add(2)
    journal.close()


def test_files_are_known_by_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_text("abc")
    os.utime(file, ns=(1, 2))
    assert json.loads(json.dumps(stream.identity_of_files([file]))) == [[str(file), 3, 2]]
