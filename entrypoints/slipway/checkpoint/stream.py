"""Carry out a plan: bounded memory, resumable, and nothing is visible until it is complete.

The work is done in `.NAME.partial` beside the output. Its files have their final size from the start, and several
threads write every piece at its final offset. A journal lists the pieces that are safely on disk. After any end the
same command continues from the journal and writes the same bytes. At the end the folder is renamed to NAME.
"""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError, UsageError, WriteError
from slipway.report import Progress, human_bytes
from slipway.untrusted import HARMFUL, read_text, unreadable

JOURNAL_SECONDS = 2.0  # the most work that a killed run loses; a sync more often would slow the disk down
COPIES_IN_MEMORY = 4  # of a piece: as read, decoded, transformed and serialised
# O_DIRECT takes only whole blocks of the file, from memory that is aligned to a sector.
BLOCK = 4096
MEMORY_ALIGNMENT = 512
DIRECT_BYTES = 1 << 18  # below this, waiting for the disk costs more than the page cache does
LONGEST_NAME = 255  # bytes, of every file system here
LARGEST_JOURNAL = 1 << 28
LARGEST_READ = 1 << 28  # bytes of a file that is read once more to see whether it has changed
PREPARING, DONE = "preparing", " done"  # in plan.json: the files are being created; after the plan's own: all is there
FULL = (errno.ENOSPC, errno.EDQUOT)

Write = tuple[str, int, "memoryview | bytes"]  # file, offset, data


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of work.

    Args:
        bytes: what it reads from the source.
        work: reads and transforms, and gives what must be written where. The data need not stay valid once the next
            is asked for.
    """

    bytes: int
    work: Callable[[], Iterable[Write]]


@dataclass(frozen=True)
class Plan:
    """What an output folder will be.

    Args:
        sizes: file → final bytes.
        pieces: everything that fills these files.
        small: whole files that are written at the end: name → content.
        copies: files that are copied at the end: name → source.
        identity: what the bytes depend on and no other field tells; unfinished work of another plan is thrown away.
        finish: is called with the folder once all pieces are written, to fill in what only these tell. It must give the
            same bytes when it is called again.
        reads: what the command was given to read. The output is none of it, not in it, and not around it.
    """

    sizes: Mapping[str, int]
    pieces: Sequence[Piece]
    small: Mapping[str, bytes]
    copies: Mapping[str, Path]
    identity: Any
    finish: Callable[[Path], None] = lambda folder: None
    reads: Sequence[Path] = ()

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values()) + sum(map(len, self.small.values()))

    @functools.cached_property
    def digest(self) -> str:
        """Of everything that the bytes depend on.

        Errors: DataError where a file that is to be copied cannot be read.
        """
        small = {name: hashlib.sha256(content).hexdigest() for name, content in self.small.items()}
        copies = {name: content_of(source) for name, source in self.copies.items()}
        everything = [self.identity, dict(self.sizes), small, copies]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def parse_size(text: str, flag: str) -> int:
    """Bytes of "512MB", "5GB" or a plain number, in decimal units; UsageError names `flag`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.upper().rstrip("KMGTB")
    try:
        size = float(number) * units[text.upper()[len(number) :].strip()]
    except (ValueError, KeyError):
        size = 0
    if not 1 <= size < 1 << 60:
        raise UsageError(f"{flag} is {text!r}; give a size such as 500MB or 5GB")
    return int(size)


def identity_of_files(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of the last change) of each file; it tells whether a source has changed."""
    stats = ((file, file.stat()) for file in files)
    return [(str(file), about.st_size, about.st_mtime_ns) for file, about in stats]


def content_of(file: Path) -> str | list[Any]:
    """What tells whether a file has changed: its content, or for a large one that it is the same as it was.

    Errors: DataError where it cannot be read, which is so before any work is done.
    """
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size > LARGEST_READ:
                return list(identity_of_files([file])[0])
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error) from None


def existing_folder(path: str) -> Path:
    """The folder; UsageError if there is none, with the most similar name that is there."""
    folder = Path(path)
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise UsageError(f"{path[:40]}… has a name of more than {LONGEST_NAME} bytes; give the folder of a model")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"{folder} is a file; give the folder that contains it")
    beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    raise UsageError(f"{folder} does not exist" + (f", did you mean {folder.parent / near[0]}?" if near else ""))


def refuse_existing(out: Path) -> None:
    """UsageError if the output exists, if a part of its path is a file, or if no folder can have its name."""
    check_name(out)
    if os.path.lexists(out):
        raise UsageError(f"{out} exists; remove it or choose another name")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file, so {out} cannot be created; choose another name")


def check_name(out: Path) -> None:
    """UsageError for the name of an output that a file system, or a terminal, would not take."""
    if HARMFUL.search(str(out)):
        raise UsageError(f"{out} has characters that are not for names; choose another name")
    for part in out.parts:
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise UsageError(f"{part[:40]}… is longer than {LONGEST_NAME} bytes, as names can be; choose another name")
    if len(os.fsencode(partial_of(out).name)) > LONGEST_NAME:
        raise UsageError(f"{out.name[:40]}… is too long for the name of the folder of the work; choose a shorter name")


def partial_of(out: Path) -> Path:
    """Where an output is while it is being made."""
    return out.with_name(f".{out.name}.partial") if out.name else out


def is_plain_folder(partial: Path) -> bool:
    """There is a folder, not a link to one, in which nothing is a link: no work of ours is written through it."""
    if not os.path.lexists(partial):
        return False
    if not stat.S_ISDIR(partial.lstat().st_mode) or any(path.is_symlink() for path in partial.rglob("*")):
        raise not_ours(partial)
    return True


def not_ours(partial: Path) -> UsageError:
    """For a folder where the work would be, which Slipway did not make."""
    return UsageError(
        f"{partial} is not a folder of unfinished work of Slipway, which would stand there; move it away, or choose "
        "another name"
    )


def run(
    plan: Plan,
    out: Path,
    title: str,
    memory: int,
    publish: Callable[[Path, Path], None] = lambda new, out: os.rename(new, out),
) -> None:
    """Create `out` as the plan says.

    Args:
        memory: most bytes for all pieces that are at work; a piece that needs more works alone.
        publish: gives the finished folder, its first argument, the name `out`.

    Errors: WriteError if the disk is full or cannot be written; the work so far is kept for the next run.
    """
    partial = partial_of(out)
    with write_errors(out):
        done = _prepare(plan, partial)
        _fill(plan, partial, done, title, memory)
        plan.finish(partial)
        for name, source in plan.copies.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        for name, content in plan.small.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        # Everything is on disk before the new name is: after a power cut there is a whole output or none.
        for file in partial.rglob("*"):
            sync(file)
        # In this order: plan.json that says so, without a journal, tells the next run that all pieces are done.
        note = partial / "plan.json"
        note.write_text(plan.digest + DONE)
        sync(note)
        (partial / "journal").unlink()
        (partial / "plan.json").unlink()
        sync(partial)
        publish(partial, out)
        sync(out.absolute().parent)


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an error of the file system into a WriteError that names the output and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise WriteError(
                f"cannot write {out}: the disk is full; free some space and run the same command again, it continues"
            ) from None
        if error.errno == errno.EFBIG:
            raise WriteError(
                f"cannot write {out}: no file may be so large here; raise the limit (`ulimit -f`), choose another "
                "place, or give a smaller --shard-size"
            ) from None
        if error.errno in (
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.ENOTDIR,
            errno.ENAMETOOLONG,
            errno.EIO,
        ):
            raise WriteError(f"cannot write {out}: {error.strerror}; choose another place") from None
        raise


def _prepare(plan: Plan, partial: Path) -> set[int]:
    """Create the partial folder with all files at their final size, or find an earlier one; the pieces that are done.

    Errors: WriteError if there is less space than the plan needs.
    """
    fingerprint, note = plan.digest, partial / "plan.json"
    if is_plain_folder(partial):
        said = _noted(note)
        if said == fingerprint + DONE:
            return set(range(len(plan.pieces)))
        if said == fingerprint and (done := _pieces_done(partial / "journal", len(plan.pieces))) is not None:
            return done
        if said is None and not _is_what_was_made(plan, partial):
            raise not_ours(partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    note.write_text(PREPARING)  # from here on it can be seen whose folder this is
    free = shutil.disk_usage(partial.parent).free
    if plan.bytes > free:
        raise WriteError(
            f"{partial.parent} has {human_bytes(free)} free, but {human_bytes(plan.bytes)} are needed; free some space"
        )
    for name, size in plan.sizes.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        with (partial / name).open("wb") as file:
            if size:  # taken from the disk now, so that a full disk shows before hours of work
                os.posix_fallocate(file.fileno(), 0, size)
    (partial / "journal").write_text("")
    # plan.json vouches for all the rest, so the rest is on disk first.
    for path in partial.rglob("*"):
        sync(path)
    note.write_text(fingerprint)
    for path in (note, partial, partial.parent):
        sync(path)
    return set()


def _noted(note: Path) -> str | None:
    """What plan.json says; None where nothing of ours does. Half of it was written when the power went."""
    try:
        said = read_text(note, 100)
    except DataError:
        return None
    return said if re.fullmatch(rf"[0-9a-f]*({DONE})?|{PREPARING}", said) else None


def _pieces_done(journal: Path, count: int) -> set[int] | None:
    """The pieces that a journal names; None where it is not there, or names what is no piece."""
    try:
        # Without a last line that was cut off: "12" may have been "123".
        lines = read_text(journal, LARGEST_JOURNAL).split("\n")[:-1]
    except DataError:
        return None
    if not all(re.fullmatch(r"[0-9]{1,12}", line) and int(line) < count for line in lines):
        return None
    journal.write_text("".join(f"{line}\n" for line in lines))
    return {int(line) for line in lines}


def _is_what_was_made(plan: Plan, partial: Path) -> bool:
    """Nothing but whole files of this plan, as it stands just before it gets its name; or nothing at all."""
    small = {name: len(content) for name, content in plan.small.items()}
    sizes = {**plan.sizes, **small, **{name: source.stat().st_size for name, source in plan.copies.items()}}
    files = [file for file in partial.rglob("*") if not file.is_dir()]
    return all(sizes.get(str(file.relative_to(partial))) == file.stat().st_size for file in files)


def _fill(plan: Plan, partial: Path, done: set[int], title: str, memory: int) -> None:
    """Carry out the pieces that are not done."""
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
    """Call `do(number)` for every number, started in order, on one thread per core; the first error ends it.

    Args:
        sizes: number → bytes that its work reads, for the progress and the memory.
        memory: most bytes for the work of all threads; work that needs more is done alone.
    """
    from slipway.tensors import bits  # brings NumPy, which planning alone does not need

    workers = _workers(sizes, memory)
    budget = _Budget(memory)
    with ThreadPoolExecutor(workers) as pool, Progress(title, sum(sizes.values())) as progress:

        def work(number: int) -> None:
            with budget.take(COPIES_IN_MEMORY * sizes[number]), bits.piece():
                do(number)
            progress.advance(sizes[number])

        _run_all(pool, work, sizes, 4 * workers)


def cores() -> int:
    """Cores that this process may use: a container or Slurm may give it some of the machine's."""
    return len(os.sched_getaffinity(0))


def _workers(sizes: Mapping[int, int], memory: int) -> int:
    """Threads: one per core, but no more than can work at once within `memory` on pieces of the common size.

    Each thread keeps the memory of its largest piece, so idle ones would cost as much as busy ones.
    """
    common = sorted(sizes.values())[len(sizes) * 9 // 10] if sizes else 0
    return max(1, min(cores(), memory // max(1, COPIES_IN_MEMORY * common)))


def _run_all(pool: ThreadPoolExecutor, do: Callable[[int], None], numbers: Iterable[int], ahead: int) -> None:
    """Run every number in the pool, with at most `ahead` of them in the queue; the first error ends it."""
    # A short queue, so that an error is seen soon and a plan of a million pieces needs no million futures.
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
    """A file of known size that is written at given offsets, past the page cache (O_DIRECT) where that is possible.

    The kernel needs more processor time to copy data into the page cache and to write it back than all that is done
    here with the data. Only whole blocks from aligned memory can go past the cache; the two ends are written normally.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY)
        try:
            self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which means: no O_DIRECT on this file system (tmpfs, some networks)
                raise
            self._direct = None
        # The kernel lets one thread at a time write a file, and the others would wait there with a busy processor.
        self._turn = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of the data; any thread may call it."""
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
                if error.errno != errno.EINVAL:  # some file systems refuse O_DIRECT only here, not when opening
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
    """This thread's buffer for data that is not aligned in memory; mmap aligns it to a page."""
    if not hasattr(_buffers, "memory"):
        _buffers.memory = memoryview(mmap.mmap(-1, 4 << 20))
    return _buffers.memory


def _write(descriptor: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):  # the kernel may write less than it is given, 2 GB at most
        done += os.pwrite(descriptor, data[done:], offset + done)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Budget:
    """Bytes that several threads share. A thread that asks for more than the total waits until it is alone."""

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
    """Writes down the numbers of finished pieces, each only after its data is on disk.

    A thread of its own does it, because a sync can take seconds and the pieces need not wait for it.
    """

    def __init__(self, path: Path, descriptors: Iterable[int]) -> None:
        self._path, self._descriptors = path, list(descriptors)
        self._waiting: list[int] = []
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None

    def add(self, number: int) -> None:
        """A piece is written; raises the error of an earlier commit, if there was one."""
        with self._lock:
            self._waiting.append(number)
            busy = self._commit is not None and not self._commit.done()
            if busy or time.monotonic() - self._last < JOURNAL_SECONDS:
                return
            finished, self._commit = self._commit, self._writer.submit(self.commit)
        if finished is not None:
            finished.result()

    def commit(self) -> None:
        """Put the pieces so far on disk, then write down their numbers."""
        # The numbers are taken before the sync: what is written during the sync is not covered by it.
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
        """Wait for a commit that is in progress."""
        self._writer.shutdown()
