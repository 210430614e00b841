"""Source trees: what the stages of the Dockerfile compile. Each is verified, then kept in the store.

A tree in the store may have been carried in, so it is verified again each time: against the archive that it was
unpacked from, or against the commit. For that the commit and its folders, as git has them, are kept beside the tree.

The variants cpu and index unpack source archives from the package index. `full` takes git commits, with submodules at
the pinned commits. `--source NAME=PLACE` names another place for a source: a clone or the address of a mirror. The
place needs no trust: a commit's name is a hash of its tree, and every file is checked against it (objects.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from images.manifest import Source
from images.objects import (
    EXECUTABLE,
    FILE,
    LINK,
    SUBMODULE,
    Entry,
    MissingObject,
    Objects,
    Proof,
    Trees,
    folder_of_objects,
    listing,
    write,
)
from images.store import BuildError, fetch, store

PREFLIGHT_SECONDS = 15
GIT = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true"}  # fail, and do not wait for a password


def trees(sources: list[Source], variant: str, places: dict[str, str]) -> dict[str, Path]:
    """Source name → folder with its tree; what is missing is fetched.

    Args:
        sources: what the variant is built from. A source that a build context replaces needs no tree.
        variant: for messages.
        places: source or submodule name → clone or mirror to take it from.

    Errors: BuildError for an unknown name (2), a pin without an archive (65), a place that cannot be reached (78).
    """
    if unknown := sorted(places.keys() - _names(sources)):
        known = ", ".join(sorted(_names(sources)))
        raise BuildError(f"--source {unknown[0]}: unknown source; use one of {known}", exit_code=2)
    sources = [source for source in sources if not source.replaced]
    for name in sorted(places.keys() - _names(sources)):
        print(f"--source {name} is not needed: a --context replaces what is built from it", file=sys.stderr)
    by_git = [source for source in sources if source.by_git or source.name in places]
    if lacking := [s.name for s in sources if s not in by_git and not s.archive]:
        raise BuildError(
            f"{lacking[0]}: its pin has no source archive, and variant {variant} is built from source archives; "
            f"add archive and sha256 to the pin, or pass --source {lacking[0]}=CLONE",
            exit_code=65,
        )
    preflight(by_git, places)
    return {s.name: _git_tree(s, places) if s in by_git else _archive_tree(s) for s in sources}


def _names(sources: list[Source]) -> set[str]:
    return {source.name for source in sources} | {name for source in sources for name in source.submodules}


def tree_folder(name: str, state: str) -> Path:
    """The folder for the tree of a source; `state` is a commit or a hash."""
    return store() / "sources" / f"{name}-{state[:16]}"


def _into_place(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make `target` unless it exists: it is filled in a folder next to it and renamed when complete.

    Two builds at once may both fill it; the one that is complete first stays.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fill(Path(scratch) / "tree")
            try:
                os.rename(Path(scratch) / "tree", target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


# ---------------------------------------------------------------------------- source archives


def _archive_tree(source: Source) -> Path:
    archive = source.archive
    assert archive
    fetch([archive], store() / "wheelhouse")

    def unpack(folder: Path) -> None:
        with tarfile.open(store() / "wheelhouse" / archive.name) as tar:
            tar.extractall(folder.parent / "all", members=map(_as_ours, tar), numeric_owner=True)
        (top,) = (folder.parent / "all").iterdir()
        os.rename(top, folder)

    target = _into_place(tree_folder(source.name, archive.sha256), unpack)
    with tempfile.TemporaryDirectory() as scratch:
        unpack(Path(scratch) / "tree")
        _require_tree(target, listing(Path(scratch) / "tree"), f"the archive {archive.name}")
    return target


def _as_ours(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A file or folder of a source archive, as this user's own and with the plain modes, below the folder.

    tarfile's filter "data" does the same; the Python of Debian 12, 3.11.2, does not have it.

    Errors: BuildError (65) for a link, a device, or a path that leads out of the folder.
    """
    if not (member.isfile() or member.isdir()) or Path(member.name).is_absolute() or ".." in Path(member.name).parts:
        raise BuildError(
            f"{member.name} in a source archive is no plain file below its folder; take another archive", 65
        )
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    member.uid, member.gid = os.getuid(), os.getgid()
    return member


def _require_tree(folder: Path, expected: dict[str, tuple[str, str]], what: str) -> None:
    """BuildError (65) unless a tree of the store holds what `what` does, and nothing else."""
    found = listing(folder)
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            why = "missing" if path not in found else "not in it" if path not in expected else "other content"
            raise BuildError(
                f"{folder} is not what {what} holds ({path}: {why}); remove {folder} to have it made again, and ask "
                "whoever filled this store",
                exit_code=65,
            )


# ---------------------------------------------------------------------------- git commits


def preflight(sources: list[Source], places: dict[str, str]) -> None:
    """BuildError, within seconds, that names every source that cannot be reached and what to pass instead.

    A build of `full` may take an hour: a missing source must be found before it starts.
    """
    asked: dict[str, str] = {}
    for source in [source for source in sources if not _is_kept(source)]:
        asked[source.name] = places.get(source.name, source.repository)
        asked |= {name: places.get(name, sub["repository"]) for name, sub in source.read_submodules().items()}
    with ThreadPoolExecutor(max(len(asked), 1)) as pool:
        reached = dict(zip(asked, pool.map(_reachable, asked.values()), strict=True))
    if missing := [name for name, answered in reached.items() if not answered]:
        words = " ".join(f"--source {name}=CLONE" for name in missing)
        raise BuildError(
            f"cannot reach {', '.join(f'{name} ({asked[name]})' for name in missing)}; pass clones or mirrors that "
            f"have the pinned commits: {words}; or build VARIANT=index, which needs no git host"
        )


def _reachable(place: str) -> bool:
    if Path(place).is_dir():
        return folder_of_objects(Path(place)) is not None
    try:
        return _git("ls-remote", "--quiet", place, "HEAD", timeout=PREFLIGHT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _tree_of(source: Source) -> Path:
    """The folder of a commit's tree. Its name depends on the submodules too: on their commits and paths."""
    if not source.submodules:
        return tree_folder(source.name, source.commit)
    digest = hashlib.sha256(json.dumps(source.submodules, sort_keys=True).encode()).hexdigest()
    return tree_folder(source.name, f"{source.commit[:10]}-{digest[:5]}")


def _proof_of(source: Source) -> Path:
    """The file with the commit and its folders, beside the tree."""
    tree = _tree_of(source)
    return tree.with_name(f"{tree.name}.objects")


def _is_kept(source: Source) -> bool:
    return _tree_of(source).exists() and _proof_of(source).exists()


def _git_tree(source: Source, places: dict[str, str]) -> Path:
    target, proof = _tree_of(source), _proof_of(source)
    if not _is_kept(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _check_out(source, places, Path(scratch) / "tree").save(Path(scratch) / "proof")
            os.replace(Path(scratch) / "proof", proof)
            _into_place(target, lambda folder: os.rename(Path(scratch) / "tree", folder))
    try:
        kept = Proof.load(proof)
        expected = {path: (_plain(entry.mode), entry.sha) for path, entry in _files(source, kept).items()}
    except MissingObject as error:
        raise BuildError(
            f"{proof} does not hold all folders of commit {source.commit} ({error}); remove it to have it made again",
            exit_code=65,
        ) from None
    _require_tree(target, expected, f"commit {source.commit}")
    return target


def _plain(mode: str) -> str:
    """The mode of a file as it is written: old trees have 100664 too."""
    return mode if mode in (LINK, EXECUTABLE) else FILE


def _check_out(source: Source, places: dict[str, str], folder: Path) -> Proof:
    """Fill `folder` with the tree of the source's commit and the trees of its submodules; what it was made from.

    Not with `git clone` and `git submodule update`: those fetch whole histories, from addresses that a commit names.
    """
    proof = Proof()
    entries = _extract(source.name, places.get(source.name, source.repository), source.commit, folder, proof)
    for entry, name, sub in _read_submodules(source, entries):
        _extract(name, places.get(name, sub["repository"]), entry.sha, folder / entry.path, proof, sub.get("paths"))
    return proof


def _read_submodules(source: Source, entries: list[Entry]) -> list[tuple[Entry, str, dict[str, Any]]]:
    """(where it is, its name, its pin) of each submodule of which the build reads anything."""
    by_commit = {sub["commit"]: (name, sub) for name, sub in source.submodules.items()}
    linked = [entry for entry in entries if entry.mode == SUBMODULE]
    for entry in linked:
        if entry.sha not in by_commit:
            raise BuildError(
                f"{source.name}: submodule {entry.path} is at commit {entry.sha}, which has no pin; "
                "add it to pins.toml",
                exit_code=65,
            )
    found = [(entry, *by_commit[entry.sha]) for entry in linked]
    return [(entry, name, sub) for entry, name, sub in found if name in source.read_submodules()]


def _files(source: Source, objects: Trees) -> dict[str, Entry]:
    """Path → entry of every file that the source's tree has, its submodules' too."""
    entries = list(objects.entries(source.commit))
    found = {entry.path: entry for entry in entries}
    for at, _, sub in _read_submodules(source, entries):
        found |= {f"{at.path}/{entry.path}": entry for entry in objects.entries(at.sha, sub.get("paths"))}
    return {path: entry for path, entry in found.items() if entry.mode != SUBMODULE}


def _extract(
    name: str, place: str, commit: str, folder: Path, proof: Proof, paths: list[str] | None = None
) -> list[Entry]:
    """Write the files of a commit, or those in `paths`, into `folder`; returns all entries, also submodules."""
    with tempfile.TemporaryDirectory(dir=folder.parent if folder.parent.exists() else None) as scratch:
        bare = Path(scratch) / "git"
        _git("init", "--quiet", "--bare", str(bare))
        if Path(place).is_dir():
            _borrow(bare, Path(place))
        else:
            _fetch_commit(bare, name, place, commit)
        try:
            with Objects(bare, proof) as objects:
                entries = list(objects.entries(commit, paths))
                write(objects, (entry for entry in entries if entry.mode != SUBMODULE), folder)
        except MissingObject as error:
            raise BuildError(
                f"{name}: {place} does not have all of commit {commit}: {error}; run `git fetch --refetch ORIGIN "
                f"{commit}` there (git 2.36 or newer), or pass another clone: --source {name}=CLONE"
            ) from None
    return entries


def _borrow(bare: Path, clone: Path) -> None:
    """Let the repository `bare` read the objects of a clone on this machine.

    git does not open the clone itself: neither who owns it nor what its configuration says matters, and nothing that
    it lacks is fetched from elsewhere.
    """
    objects = folder_of_objects(clone.resolve())
    (bare / "objects" / "info" / "alternates").write_text(f"{objects}\n")


def _fetch_commit(bare: Path, name: str, place: str, commit: str) -> None:
    """Fetch one commit, without its history, into the bare repository `bare`."""
    done = _git("-C", str(bare), "fetch", "--quiet", "--depth=1", place, commit)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(
            f"{name}: cannot get commit {commit} from {place} ({reason}); pass a clone that has it: "
            f"--source {name}=CLONE"
        )


def _git(*words: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=timeout, env={**os.environ, **GIT}
        )
    except FileNotFoundError:
        raise BuildError("git not found; install it, or build VARIANT=index, which does not need it") from None
