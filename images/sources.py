"""Source trees: what the stages of the Dockerfile compile. Each is verified, then kept in the store.

The variants cpu and index unpack source archives from the package index. `full` takes git commits, with submodules at
the pinned commits. `--source NAME=PLACE` names another place for a source: a clone or the address of a mirror. The
place needs no trust: a commit's name is a hash of its tree, and git checks it.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from images.manifest import Source
from images.store import BuildError, fetch, store

PREFLIGHT_SECONDS = 15
GIT = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true"}  # fail, and do not wait for a password


def trees(sources: list[Source], variant: str, places: dict[str, str]) -> dict[str, Path]:
    """Source name → folder with its tree; what is missing is fetched.

    Args:
        sources: what the variant is built from.
        variant: full takes git commits; the others take source archives unless a place is given.
        places: source or submodule name → clone or mirror to take it from.

    Errors: BuildError for an unknown name (2), a pin without an archive (65), a place that cannot be reached (78).
    """
    if unknown := sorted(places.keys() - _names(sources)):
        known = ", ".join(sorted(_names(sources)))
        reason = f"unknown source; use one of {known}" if known else "a --context replaces every source; drop one flag"
        raise BuildError(f"--source {unknown[0]}: {reason}", exit_code=2)
    by_git = [source for source in sources if variant == "full" or source.name in places]
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
    """Make `target` unless it exists: it is filled in a folder next to it and renamed when complete."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fill(Path(scratch) / "tree")
            os.rename(Path(scratch) / "tree", target)
    return target


# ---------------------------------------------------------------------------- source archives


def _archive_tree(source: Source) -> Path:
    archive = source.archive
    assert archive
    fetch([archive], store() / "wheelhouse")

    def unpack(folder: Path) -> None:
        with tarfile.open(store() / "wheelhouse" / archive.name) as tar:
            tar.extractall(folder.parent / "all", filter="data")
        (top,) = (folder.parent / "all").iterdir()
        os.rename(top, folder)

    return _into_place(tree_folder(source.name, archive.sha256), unpack)


# ---------------------------------------------------------------------------- git commits


def preflight(sources: list[Source], places: dict[str, str]) -> None:
    """BuildError, within seconds, that names every source that cannot be reached and what to pass instead.

    A build of `full` may take an hour: a missing source must be found before it starts.
    """
    asked: dict[str, str] = {}
    for source in [source for source in sources if not _tree_of(source).exists()]:
        asked[source.name] = places.get(source.name, source.repository)
        asked |= {name: places.get(name, sub["repository"]) for name, sub in source.submodules.items()}
    with ThreadPoolExecutor(max(len(asked), 1)) as pool:
        reached = dict(zip(asked, pool.map(_reachable, asked.values()), strict=True))
    if missing := [name for name, answered in reached.items() if not answered]:
        words = " ".join(f"--source {name}=CLONE" for name in missing)
        raise BuildError(
            f"cannot reach {', '.join(f'{name} ({asked[name]})' for name in missing)}; pass clones or mirrors that "
            f"have the pinned commits: {words}; or build VARIANT=index, which needs no git host"
        )


def _reachable(place: str) -> bool:
    try:
        return _git("ls-remote", "--quiet", place, "HEAD", timeout=PREFLIGHT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _tree_of(source: Source) -> Path:
    return tree_folder(source.name, source.commit)


def _git_tree(source: Source, places: dict[str, str]) -> Path:
    return _into_place(_tree_of(source), lambda folder: _check_out(source, places, folder))


def _check_out(source: Source, places: dict[str, str], folder: Path) -> None:
    """Fill `folder` with the tree of the source's commit and the trees of its submodules.

    Not with `git clone` and `git submodule update`: those fetch whole histories, from addresses that a commit names.
    """
    bare = folder.parent / "git"
    _fetch_commit(bare, source.name, places.get(source.name, source.repository), source.commit)
    _extract(bare, source.commit, folder)
    by_commit = {sub["commit"]: (name, sub["repository"]) for name, sub in source.submodules.items()}
    for path, commit in _links(bare, source.commit):
        if commit not in by_commit:
            raise BuildError(
                f"{source.name}: submodule {path} is at commit {commit}, which has no pin; add it to pins.toml",
                exit_code=65,
            )
        name, repository = by_commit[commit]
        _fetch_commit(bare, name, places.get(name, repository), commit)
        _extract(bare, commit, folder / path)


def _fetch_commit(bare: Path, name: str, place: str, commit: str) -> None:
    """Fetch one commit, without its history, into the bare repository `bare`."""
    _git("init", "--quiet", "--bare", str(bare))
    place = str(Path(place).resolve()) if Path(place).exists() else place
    done = _git("-C", str(bare), "fetch", "--quiet", "--depth=1", place, commit)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(
            f"{name}: cannot get commit {commit} from {place} ({reason}); pass a clone that has it: "
            f"--source {name}=CLONE"
        )


def _extract(bare: Path, commit: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder.parent / f"{folder.name}.tar"
    _git("-C", str(bare), "archive", f"--output={archive}", commit)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="tar")
    archive.unlink()


def _links(bare: Path, commit: str) -> list[tuple[str, str]]:
    """(path, commit) of each submodule in a commit's tree."""
    listed = _git("-C", str(bare), "ls-tree", "-r", commit).stdout.splitlines()
    rows = [line.split(maxsplit=3) for line in listed]
    return [(path, sha) for _, kind, sha, path in rows if kind == "commit"]


def _git(*words: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=timeout, env={**os.environ, **GIT}
        )
    except FileNotFoundError:
        raise BuildError("git not found; install it, or build VARIANT=index, which does not need it") from None
