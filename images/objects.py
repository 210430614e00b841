"""Files of a commit, read from a git repository that needs no trust and need not be complete.

Git is asked for raw objects only. Every object that is used is hashed here, from the commit down to the files: a
commit's name is a hash of its tree, and a tree holds the hashes of its files. git itself hashes objects only when it
fetches them. A clone that lacks other objects will do: a shallow or a partial one, or one that lost a file that no
build reads.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from images.store import BuildError

DIRECTORY, LINK, SUBMODULE, EXECUTABLE, FILE = "40000", "120000", "160000", "100755", "100644"


@dataclass(frozen=True)
class Entry:
    """An entry of a commit's tree: its path, git's mode, and the hash of the object."""

    path: str
    mode: str
    sha: str


class MissingObject(BuildError):
    """An object that the repository does not have, or that has other content than its name says."""


def folder_of_objects(clone: Path) -> Path | None:
    """Where a clone keeps its objects: a bare one, one with a working tree, a submodule's or a linked working tree."""
    git = clone / ".git" if (clone / ".git").exists() else clone
    if git.is_file():
        git = clone / git.read_text().removeprefix("gitdir:").strip()
    if (git / "commondir").is_file():
        git = git / (git / "commondir").read_text().strip()
    return git / "objects" if (git / "objects").is_dir() else None


class Trees:
    """Objects by name, of which commits and trees can be walked."""

    def read(self, sha: str, kind: str, what: str) -> bytes:
        """The content of an object of this kind; MissingObject that names `what` if it is not there or not as named."""
        raise NotImplementedError

    def entries(self, commit: str, paths: Iterable[str] | None = None) -> Iterator[Entry]:
        """The files and submodules of a commit; with `paths`, only those that are in these folders."""
        text = self.read(commit, "commit", "the commit")
        tree = text.partition(b"\n")[0].removeprefix(b"tree ").decode()
        yield from self._below("", tree, None if paths is None else set(paths))

    def _below(self, folder: str, tree: str, paths: set[str] | None) -> Iterator[Entry]:
        for entry in parsed(folder, self.read(tree, "tree", folder or "the tree")):
            wanted = paths is None or any(_is_in(entry.path, path) for path in paths)
            if entry.mode == DIRECTORY:
                above = paths is not None and any(_is_in(path, entry.path) for path in paths)
                if wanted or above:
                    yield from self._below(f"{entry.path}/", entry.sha, None if wanted else paths)
            elif wanted:
                yield entry


class Proof(Trees):
    """Commits and trees without files: what a folder that was made of them is compared with.

    A file of them holds no names. Each object is named by the hash of what is read, so the file needs no trust.
    """

    def __init__(self) -> None:
        self._objects: dict[str, tuple[str, bytes]] = {}

    def add(self, kind: str, content: bytes) -> None:
        self._objects[name_of(kind, content)] = kind, content

    def read(self, sha: str, kind: str, what: str) -> bytes:
        if self._objects.get(sha, ("", b""))[0] != kind:
            raise MissingObject(f"{what} (object {sha}) is missing")
        return self._objects[sha][1]

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            for kind, content in self._objects.values():
                file.write(b"%s %d\n" % (kind.encode(), len(content)) + content)

    @classmethod
    def load(cls, path: Path) -> Proof:
        """Those of a file; of one that is not as `save` writes it, what can be read."""
        proof = cls()
        with path.open("rb") as file:
            while len(head := file.readline(64).split()) == 2 and head[1].isdigit() and len(head[1]) < 9:
                proof.add(head[0].decode(errors="replace"), file.read(int(head[1])))
        return proof


def name_of(kind: str, content: bytes) -> str:
    """git's name of an object."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content, usedforsecurity=False).hexdigest()


class Objects(Trees):
    """The objects of a repository, each checked against its name. What is walked is added to the proof."""

    def __init__(self, repository: Path, proof: Proof | None = None) -> None:
        self._proof = proof or Proof()
        command = ["git", f"--git-dir={repository}", "cat-file", "--batch"]
        pipe = subprocess.PIPE
        self._git = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Objects:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._git.communicate()

    def read(self, sha: str, kind: str, what: str) -> bytes:
        assert self._git.stdin and self._git.stdout
        self._git.stdin.write(f"{sha}\n".encode())
        self._git.stdin.flush()
        head = self._git.stdout.readline().split()
        if len(head) != 3:  # "SHA missing", or the end
            raise MissingObject(f"{what} (object {sha}) is missing")
        content = self._git.stdout.read(int(head[2]))
        self._git.stdout.read(1)
        if head[1] != kind.encode() or name_of(kind, content) != sha:
            raise MissingObject(f"{what} (object {sha}) has other content than its name says")
        if kind != "blob":
            self._proof.add(kind, content)
        return content


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def parsed(folder: str, tree: bytes) -> Iterator[Entry]:
    """The entries of one tree object: "MODE NAME\\0" and 20 bytes each."""
    while tree:
        head, _, rest = tree.partition(b"\0")
        mode, _, name = head.decode("utf-8", "surrogateescape").partition(" ")
        if name in ("", ".", "..", ".git") or "/" in name:
            raise BuildError(f"{folder}{name}: no valid name in a git tree", exit_code=65)
        yield Entry(folder + name, mode, rest[:20].hex())
        tree = rest[20:]


def write(objects: Objects, entries: Iterable[Entry], folder: Path) -> None:
    """Write files into `folder`, which may have others already. No path leads out of it through a link."""
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for entry in entries:
        content = objects.read(entry.sha, "blob", entry.path)
        target = folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.mode == LINK:
            links.append((content, target))  # made last: until then no folder on the way to a file is a link
            continue
        target.write_bytes(content)
        target.chmod(0o755 if entry.mode == EXECUTABLE else 0o644)
    for content, target in links:
        os.symlink(content, target)


def listing(folder: Path) -> dict[str, tuple[str, str]]:
    """Path → (mode, name of the object) of everything in a folder that is no folder, as a tree of git would have it."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in [*folders, *files]):
            about = path.lstat()
            if stat.S_ISLNK(about.st_mode):
                known = LINK, name_of("blob", os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(about.st_mode):
                mode = EXECUTABLE if about.st_mode & stat.S_IXUSR else FILE
                known = mode, name_of("blob", path.read_bytes())
            elif stat.S_ISDIR(about.st_mode):
                continue
            else:
                known = "a device or a pipe", ""
            found[str(path.relative_to(folder))] = known
    return found
