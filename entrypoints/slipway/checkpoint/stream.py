"""Moving a plan of cells from a source to a target: bounded memory, resumable, visible only when it is whole.

Work goes on in `.NAME.partial` beside the output: its files have their final size from the start and every piece is
written at its final offset, by several threads. A journal names the pieces that are safely on disk, so that the
same command, started again after any end, goes on and gives the same bytes. At the end the folder gets its name.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import UsageError, WriteError
from slipway.report import Progress, human_bytes

JOURNAL_SECONDS = 2.0
COPIES_IN_MEMORY = 4  # what reading, decoding, transforming and serialising a piece may hold at once
BLOCK = 4096  # what is written past the page cache, in the file
MEMORY_ALIGNMENT = 512  # and in memory
DIRECT_BYTES = 1 << 18  # less is not worth it
FULL = (errno.ENOSPC, errno.EDQUOT)

Write = tuple[str, int, "memoryview | bytes"]  # file, offset, data


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of work: `work()` reads and transforms, and returns what to write where."""

    bytes: int
    work: Callable[[], Iterable[Write]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an output folder will be.

    sizes: file → final bytes; pieces: everything that fills them; small: whole files written at the end (name →
    content); copies: files copied from elsewhere (name → source); identity: what the bytes depend on.
    """

    sizes: Mapping[str, int]
    pieces: Sequence[Piece]
    small: Mapping[str, bytes]
    copies: Mapping[str, Path]
    identity: Any

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values()) + sum(map(len, self.small.values()))


def parse_size(text: str, flag: str) -> int:
    """Bytes of "512MB", "5GB" or a plain number, decimal units; UsageError names `flag`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.upper().rstrip("KMGTB")
    try:
        size = float(number) * units[text.upper()[len(number) :].strip()]
    except (ValueError, KeyError):
        raise UsageError(f"{flag} is {text!r}; give a size such as 500MB or 5GB") from None
    if not 1 <= size < 1 << 60:
        raise UsageError(f"{flag} is {text!r}; give a size such as 500MB or 5GB")
    return int(size)


def identity_of_files(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of each file: what tells a changed source."""
    stats = ((file, file.stat()) for file in files)
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def existing_folder(path: str) -> Path:
    """The folder; UsageError where there is none, with the nearest name beside it."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{folder} is a file; give the folder that holds it")
    beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    raise UsageError(f"{folder} does not exist" + (f", did you mean {folder.parent / near[0]}?" if near else ""))


def refuse_existing(out: Path) -> None:
    """UsageError where the output is there already, or lies under a file."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists; remove it or choose another name")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, so {out} cannot be made; choose another name")


def run(plan: Plan, out: Path, title: str, memory: int) -> None:
    """Make `out` what the plan says.

    Args:
        memory: bytes that pieces at work may hold together; a single larger piece works alone.

    Errors: WriteError where the target is full or cannot be written; the work done so far is kept for the next run.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    with write_errors(out):
        done = _prepare(plan, partial)
        _fill(plan, partial, done, title, memory)
        for name, source in plan.copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        for name, content in plan.small.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        (partial / "journal").unlink()
        for file in partial.rglob("*"):
            sync(file)
        (partial / "plan.json").unlink()
        sync(partial)
        os.rename(partial, out)
        sync(out.absolute().parent)


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turns what the file system refuses into a WriteError that names the output and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise WriteError(
                f"{out}: the disk is full; free some space and run the same command again, it goes on where it was"
            ) from None
        if error.errno in (
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.ENOTDIR,
            errno.ENAMETOOLONG,
            errno.EIO,
        ):
            raise WriteError(f"{out} cannot be written: {error.strerror}; choose another place") from None
        raise


def _prepare(plan: Plan, partial: Path) -> set[int]:
    """The partial folder with all files at their final size; returns the pieces that are done already."""
    fingerprint = hashlib.sha256(json.dumps([plan.identity, plan.sizes], sort_keys=True).encode()).hexdigest()
    note = partial / "plan.json"
    if note.exists() and note.read_text() == fingerprint:
        journal = partial / "journal"
        lines = journal.read_text().split("\n")[:-1]  # a line that was cut off does not count
        journal.write_text("".join(f"{line}\n" for line in lines))
        return {int(line) for line in lines}
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial.parent).free
    if plan.bytes > free:
        raise WriteError(
            f"{partial.parent}: {human_bytes(plan.bytes)} are needed, {human_bytes(free)} are free; free some space"
        )
    for name, size in plan.sizes.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        with (partial / name).open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    (partial / "journal").write_text("")
    note.write_text(fingerprint)
    return set()


def _fill(plan: Plan, partial: Path, done: set[int], title: str, memory: int) -> None:
    todo = {number: piece.bytes for number, piece in enumerate(plan.pieces) if number not in done}
    files = {name: _File(partial / name) for name in plan.sizes}
    journal = _Journal(partial / "journal", [file.descriptor for file in files.values()])

    def do(number: int) -> None:
        for name, offset, data in plan.pieces[number].work():
            files[name].write(offset, memoryview(data))
        journal.add(number)

    try:
        in_parallel(todo, do, title, memory)
        journal.close()
        journal.commit()
    finally:
        journal.close()
        for file in files.values():
            file.close()


def in_parallel(sizes: Mapping[int, int], do: Callable[[int], None], title: str, memory: int) -> None:
    """Call `do(number)` for every number, begun in order, by one thread per core; the first error ends it.

    Args:
        sizes: number → bytes that its work reads, for progress and for the budget.
        memory: bytes that the work of all threads may hold together; larger work is done alone.
    """
    from slipway.tensors import bits

    workers = os.cpu_count() or 1
    budget = _Budget(memory)
    with ThreadPoolExecutor(workers) as pool, Progress(title, sum(sizes.values())) as progress:

        def work(number: int) -> None:
            with budget.take(COPIES_IN_MEMORY * sizes[number]), bits.piece():
                do(number)
            progress.advance(sizes[number])

        _run_all(pool, work, sizes, 4 * workers)


def _run_all(pool: ThreadPoolExecutor, do: Callable[[int], None], numbers: Iterable[int], ahead: int) -> None:
    """Run every number through the pool, at most `ahead` of them queued; the first error ends it."""
    running = set()
    for number in numbers:
        running.add(pool.submit(do, number))
        if len(running) >= ahead:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
    for future in running:
        future.result()


_buffers = threading.local()


class _File:
    """A file of known size that is written at given places, past the page cache where the file system lets one.

    The kernel's copy into fresh pages, and its writing them back, take more of the processor than all that is done here
    with the data. Only whole blocks can go past it, from memory that is aligned as they are; the ends go the usual way.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY)
        try:
            self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = None
        # One thread at a time writes a file: the kernel lets in no more, and those that wait there burn their cores.
        self._turn = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        """All of the data."""
        start = -offset % BLOCK
        end = start + (len(data) - start) // BLOCK * BLOCK
        with self._turn:
            if self._direct is None or end - start < DIRECT_BYTES:
                _write(self.descriptor, offset, data)
                return
            _write(self.descriptor, offset, data[:start])
            try:
                _write_blocks(self._direct, offset + start, data[start:end])
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a file system that does not say so when the file is opened
                    raise
                self._direct = None
                _write(self.descriptor, offset + start, data[start:end])
            _write(self.descriptor, offset + end, data[end:])

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _write_blocks(descriptor: int, offset: int, data: memoryview) -> None:
    """Whole blocks, past the page cache."""
    from slipway.tensors.bits import address

    if address(data) % MEMORY_ALIGNMENT == 0:
        _write(descriptor, offset, data)
        return
    buffer = _aligned_buffer()
    for at in range(0, len(data), len(buffer)):
        part = buffer[: len(data) - at]
        part[:] = data[at : at + len(part)]
        _write(descriptor, offset + at, part)


def _aligned_buffer() -> memoryview:
    """This thread's memory for data that lies otherwise than its blocks in the file; it begins at a page."""
    if not hasattr(_buffers, "memory"):
        _buffers.memory = memoryview(mmap.mmap(-1, 4 << 20))
    return _buffers.memory


def _write(descriptor: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Budget:
    """Bytes that several threads share; one that asks for more than there is waits until it is alone."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        count = min(count, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self.used + count <= self.total)
            self.used += count
        try:
            yield
        finally:
            with self._changed:
                self.used -= count
                self._changed.notify_all()


class _Journal:
    """The numbers of finished pieces, each written down only after its data is on disk, by a thread of its own."""

    def __init__(self, path: Path, descriptors: Iterable[int]) -> None:
        self._path, self._descriptors = path, list(descriptors)
        self._waiting: list[int] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None

    def add(self, number: int) -> None:
        with self._lock:
            self._waiting.append(number)
            busy = self._commit is not None and not self._commit.done()
            if busy or time.monotonic() - self._last < JOURNAL_SECONDS:
                return
            finished, self._commit = self._commit, self._writer.submit(self.commit)
        if finished is not None:
            finished.result()

    def commit(self) -> None:
        with self._lock:
            numbers, self._waiting = self._waiting, []
            self._last = time.monotonic()
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)
        with self._path.open("a") as file:
            file.write("".join(f"{number}\n" for number in numbers))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Waits for a commit under way."""
        self._writer.shutdown()
