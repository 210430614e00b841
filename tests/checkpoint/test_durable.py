"""A power cut at any moment: what every writer shows is on disk, and the next run needs nothing that is not.

`Disk` stands for a disk that keeps only what was synced. It wraps the calls of the `os` module that sync and rename. At
each of them it knows what the kernel shows of every file, and what was there when it was last synced. It need not see
the writes: a file that was written after its last sync differs from what it was then.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_model
from slipway.checkpoint import stream
from slipway.checkpoint.stream import Piece, Plan
from slipway.commands.preprocess import preprocess
from slipway.tokens import inputs, outputs

State = bytes | dict[str, int]  # a file's content, a folder's names with their inodes


class PowerCut(BaseException):
    """The run ends here."""


class Disk:
    """What would be left of a folder after a power cut, and the rule that nothing gets its name before it is on disk.

    Args:
        root: the folder; what is in it already is on disk.
        check: called before every sync and rename.
        until: the number of the sync or rename at which the power is cut.
    """

    def __init__(self, root: Path, check: Callable[[], None] = lambda: None, until: int | None = None) -> None:
        self.root, self.check, self.until = root, check, until
        self.events: list[str] = []
        self._synced: dict[int, State] = {}
        self._held: list[int] = []  # open, so that no inode gets the number of another
        for path in [root, *root.rglob("*")]:
            self._keep(path)

    def __del__(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _keep(self, path: Path) -> None:
        self._held.append(os.open(path, os.O_RDONLY))
        self._synced[path.stat().st_ino] = shown(path)

    def kept(self, path: Path) -> State | None:
        """What is on disk of a file or folder that the kernel shows."""
        return self._synced.get(path.stat().st_ino)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap the calls; `patch` undoes it."""
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._sync)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._renaming(getattr(os, name)))

    def _event(self, what: str, *paths: Path) -> None:
        self.events.append(" ".join([what, *(str(path.relative_to(self.root)) for path in paths)]))
        self.check()
        if len(self.events) == self.until:
            raise PowerCut

    def _sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._event("sync", path)
        self._keep(path)

    def _renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Path, target: Path) -> None:
            source, target = Path(source).absolute(), Path(target).absolute()
            self._event("rename", source, target)
            for path in [source, *source.rglob("*")]:
                assert self.kept(path) == shown(path), f"{path} gets its name before it is on disk"
            real(source, target)

        return rename

    def after_the_cut(self, target: Path) -> None:
        """Write what is left to another folder."""
        self._restore(self.root.stat().st_ino, target)

    def _restore(self, inode: int, target: Path) -> None:
        content = self._synced.get(inode, b"")  # a name may be on disk, and nothing of the file
        if isinstance(content, bytes):
            target.write_bytes(content)
            return
        target.mkdir()
        for name, child in content.items():
            self._restore(child, target / name)


def shown(path: Path) -> State:
    """What the kernel shows."""
    return {entry.name: entry.inode() for entry in os.scandir(path)} if path.is_dir() else path.read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---------------------------------------------------------------------------- checkpoints

SIZE, PIECES = 40_000, 4
CONTENT = {name: random.Random(name).randbytes(SIZE) for name in ("weights/a", "weights/b")}


def plan_of(source: Path) -> Plan:
    """Two files of four pieces each, one small file and one copy."""
    step = SIZE // PIECES

    def piece(name: str, at: int) -> Piece:
        return Piece(step, lambda: [(name, at, CONTENT[name][at : at + step])])

    pieces = [piece(name, at) for name in CONTENT for at in range(0, SIZE, step)]
    sizes = {name: SIZE for name in CONTENT}
    return Plan(sizes, pieces, {"context/small": b"small"}, {"context/copied": source}, "identity")


def check_journal(disk: Disk, partial: Path) -> None:
    """Every piece that the journal shows, synced or not, is on disk."""
    journal = partial / "journal"
    for line in journal.read_text().split("\n")[:-1] if journal.exists() else ():
        file, piece = divmod(int(line), PIECES)
        name, step = list(CONTENT)[file], SIZE // PIECES
        part = slice(piece * step, (piece + 1) * step)
        assert disk.kept(partial / name)[part] == CONTENT[name][part], f"piece {line} is in the journal, not on disk"


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").write_bytes(b"copied")
    return tmp_path / "source"


@pytest.fixture
def one_thread(monkeypatch):
    """One piece after the other, each in the journal before the next: so all runs have the same events."""
    monkeypatch.setattr(stream, "cores", lambda: 1)
    monkeypatch.setattr(stream, "JOURNAL_SECONDS", 0.0)
    add = stream._Journal.add

    def add_and_wait(self: stream._Journal, number: int) -> None:
        add(self, number)
        if self._commit is not None:
            self._commit.result()

    monkeypatch.setattr(stream._Journal, "add", add_and_wait)


def write_checkpoint(root: Path, source: Path, until: int | None = None) -> Disk:
    """Carry the plan out in a folder, watched; the disk as it is in the end."""
    root.mkdir(exist_ok=True)
    disk = Disk(root, lambda: check_journal(disk, root / ".out.partial"), until)
    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch)
        try:
            stream.run(plan_of(source), root / "out", "test", 1 << 20)
        except PowerCut:
            assert until
    return disk


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, source):
    """With all threads at work."""
    root = tmp_path / "root"
    disk = write_checkpoint(root, source)
    assert disk.events[-2:] == ["rename .out.partial out", "sync ."]
    disk.after_the_cut(tmp_path / "left")
    small = {"out/context/small": b"small", "out/context/copied": b"copied"}
    assert files(tmp_path / "left") == {f"out/{name}": content for name, content in CONTENT.items()} | small


def test_each_commit_puts_the_journal_on_disk(tmp_path, source, one_thread):
    events = write_checkpoint(tmp_path / "root", source).events
    assert events.count("sync .out.partial/journal") >= len(CONTENT) * PIECES


def test_after_any_power_cut_the_same_checkpoint_is_written(tmp_path, source, one_thread):
    whole = write_checkpoint(tmp_path / "whole", source)
    fewer = 0
    for moment in range(1, len(whole.events) + 1):
        left = tmp_path / f"left{moment}"
        write_checkpoint(tmp_path / f"cut{moment}", source, moment).after_the_cut(left)
        if not (left / "out").exists():
            fewer += len(write_checkpoint(left, source).events) < len(whole.events)
        assert files(left) == files(whole.root)
    assert fewer > PIECES, "what was on disk is not done again"


def test_a_run_that_ends_amid_the_last_steps_is_finished_by_the_next(tmp_path, source, one_thread):
    """A kill, after which everything is left that the kernel has shown; also between the removal of two notes."""
    root = tmp_path / "root"
    for name in ("unlink", "rename"):
        for number in range(1, 3 if name == "unlink" else 2):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
                count, real = iter(range(1, 9)), getattr(os, name)
                patch.setattr(os, name, lambda *a, c=count, r=real, n=number: kill() if next(c) == n else r(*a))
                stream.run(plan_of(source), root / "out", "test", 1 << 20)
            stream.run(plan_of(source), root / "out", "test", 1 << 20)
            assert files(root / "out").keys() == {*CONTENT, "context/small", "context/copied"}
            shutil.rmtree(root / "out")


def kill() -> None:
    raise PowerCut


# ---------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A file of some pieces, each with its commit."""
    monkeypatch.setattr(inputs, "PIECE_BYTES", 300)
    monkeypatch.setattr(outputs, "COMMIT_SECONDS", 0.0)
    lines = [json.dumps({"text": f"line {number} " + "of words " * number}) for number in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.jsonl"


def write_tokens(root: Path, text: Path, model: Path, suffix: str, until: int | None = None) -> Disk:
    """Preprocess in a folder, watched; the disk as it is in the end."""
    root.mkdir(exist_ok=True)
    disk = Disk(root, lambda: check_tokens(disk, root / f".out{suffix}.partial"), until)
    with pytest.MonkeyPatch.context() as patch:
        disk.watch(patch)
        try:
            preprocess(str(text), str(root / f"out{suffix}"), tokenizer=str(model), workers=1, seq_length=64)
        except PowerCut:
            assert until
    return disk


def check_tokens(disk: Disk, partial: Path) -> None:
    """Every byte that the journal shows, synced or not, is on disk."""
    if (partial / "journal.json").exists():
        for name, size in json.loads((partial / "journal.json").read_text())["sizes"].items():
            if (partial / name).exists():  # until it gets its name
                assert len(disk.kept(partial / name)) >= size, f"the journal shows more of {name} than is on disk"


@pytest.mark.parametrize("suffix", [".jsonl", ".bin"])
def test_tokens_are_on_disk_before_they_have_their_name(suffix, text, model, tmp_path):
    disk = write_tokens(tmp_path / "root", text, model, suffix)
    steps = [f"rename .out{suffix}.partial/content out{suffix}", "sync ."]
    if suffix == ".bin":  # never without its index
        steps = [f"sync .out{suffix}.partial/index", "rename .out.bin.partial/index out.idx", "sync .", *steps]
    assert disk.events[-len(steps) :] == steps
    disk.after_the_cut(tmp_path / "left")
    for end in (suffix, ".idx") if suffix == ".bin" else (suffix,):
        assert (tmp_path / "left" / f"out{end}").read_bytes() == (tmp_path / "root" / f"out{end}").read_bytes() != b""


def tokens_in(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.startswith("out")}


@pytest.mark.parametrize("suffix", [".jsonl", ".bin"])
def test_after_any_power_cut_the_same_tokens_are_written(suffix, text, model, tmp_path):
    whole = write_tokens(tmp_path / "whole", text, model, suffix)
    fewer = 0
    for moment in range(1, len(whole.events) + 1):
        left = tmp_path / f"left{moment}"
        write_tokens(tmp_path / f"cut{moment}", text, model, suffix, moment).after_the_cut(left)
        if not (left / f"out{suffix}").exists():
            fewer += len(write_tokens(left, text, model, suffix).events) < len(whole.events)
        assert tokens_in(left) == tokens_in(whole.root)
    assert fewer > 5, "what was on disk is not done again"
