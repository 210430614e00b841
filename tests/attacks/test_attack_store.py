"""A store that others have filled.

What they do: the folder SLIPWAY_STORE that was carried in holds another wheel under a name of the lock, another program
under the name of uv, an unpacked source with one more file, a cache of uv with unpacked wheels, a Docker engine.

What must happen: what differs from the lock is refused with one line that names it. What no lock can say, unpacked
wheels and the engine, is not read from the store at all.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import git

from images import engine, licences, lock, sources, store
from images.store import BuildError, LockedFile
from images.target import here


def test_a_file_of_the_store_is_compared_with_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "a.whl").write_bytes(b"good")
    good = LockedFile("a", "a.whl", hashlib.sha256(b"good").hexdigest())
    assert store.fetch([good], tmp_path) == 0 == store.fetch([good], tmp_path)
    (tmp_path / "a.whl").write_bytes(b"evil")
    with pytest.raises(BuildError, match="is not what the lock names"):
        store.fetch([good], tmp_path)


def test_another_uv_in_the_store_is_not_run(tmp_path, monkeypatch):
    """The store of this machine, as it would be carried in, with a program of somebody's in place of uv."""
    real = store.store() / "tools" / lock.uv_file(here()).name
    if not real.is_file():
        pytest.skip("this machine was set up without the store")
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    tools = tmp_path / "store" / "tools"
    tools.mkdir(parents=True)
    shutil.copy(real, tools)
    lock.uv().write_text("#!/bin/sh\nexec evil\n")
    assert lock.uv().read_bytes()[:4] == b"\x7fELF"


def another_file(tree: Path) -> None:
    (tree / "inner" / "part" / "setup.py").write_text("evil")


def a_hidden_file(tree: Path) -> None:
    (tree / ".pth").write_text("evil")


def other_content(tree: Path) -> None:
    (tree / "file.txt").write_text("evil!")


def other_content_of_a_submodule(tree: Path) -> None:
    (tree / "inner" / "part" / "file.txt").write_text("evil")


def a_program(tree: Path) -> None:
    (tree / "file.txt").chmod(0o755)


def a_link_of_the_same_content(tree: Path) -> None:
    (tree.parent / "copy").write_bytes((tree / "file.txt").read_bytes())
    (tree / "file.txt").unlink()
    (tree / "file.txt").symlink_to("../copy")


def a_link_to_a_folder(tree: Path) -> None:
    shutil.move(tree / "inner", tree.parent / "elsewhere")
    (tree / "inner").symlink_to("../elsewhere")


def a_pipe(tree: Path) -> None:
    (tree / "file.txt").unlink()
    os.mkfifo(tree / "file.txt")


def nothing(tree: Path) -> None:
    (tree / "file.txt").unlink()


SPOILED = [another_file, a_hidden_file, other_content, other_content_of_a_submodule, a_program, a_pipe, nothing]
SPOILED += [a_link_of_the_same_content, a_link_to_a_folder]


@pytest.fixture
def places(clone) -> dict[str, str]:
    return {name: str(clone[0] / name) for name in ("whole", "part")}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_an_unpacked_commit_is_compared_with_its_name(clone, places, spoil):
    tree = sources.trees([clone[1]], "full", places)["whole"]
    shutil.rmtree(clone[0] / "whole")
    assert sources.trees([replace(clone[1], by_git=True)], "full", {})["whole"] == tree, "as it was, it is taken"
    spoil(tree)
    with pytest.raises(BuildError, match=r"is not what commit \w+ holds \(.*\); remove ") as error:
        sources.trees([replace(clone[1], by_git=True)], "full", {})
    assert error.value.exit_code == 65 and "\n" not in str(error.value)


def test_the_proof_beside_a_tree_needs_no_trust(clone, places):
    """The list of what the tree should hold is carried too: one of another commit, or a garbled one, proves nothing."""
    folder, source = clone
    tree = sources.trees([source], "full", places)["whole"]
    proof = tree.with_name(f"{tree.name}.objects")
    good = proof.read_bytes()
    (folder / "whole" / "file.txt").write_text("evil")
    git(folder / "whole", "commit", "--quiet", "--all", "-m", "evil")
    evil = replace(source, commit=git(folder / "whole", "rev-parse", "HEAD").strip())
    other = sources.trees([evil], "full", places)["whole"]
    forged = other.with_name(f"{other.name}.objects").read_bytes()
    (tree / "file.txt").write_text("evil")
    for content in (forged, good[:-40], b"", b"commit 99999999\n", b"x" * 1000, good.replace(b"tree", b"blob", 2)):
        proof.write_bytes(content)
        with pytest.raises(BuildError, match="does not hold all folders of commit") as error:
            sources.trees([replace(source, by_git=True)], "full", {})
        assert error.value.exit_code == 65
    proof.write_bytes(good + forged)
    with pytest.raises(BuildError, match=r"file.txt: other content"):
        sources.trees([replace(source, by_git=True)], "full", {})


def test_a_tree_without_its_proof_is_compared_with_the_clones(clone, places):
    """As stores of earlier versions have them."""
    tree = sources.trees([clone[1]], "full", places)["whole"]
    proof = tree.with_name(f"{tree.name}.objects")
    proof.unlink()
    with pytest.raises(BuildError, match="cannot reach"):
        sources.trees([replace(clone[1], by_git=True)], "full", {})
    assert sources.trees([clone[1]], "full", places)["whole"] == tree and proof.exists()
    proof.unlink()
    another_file(tree)
    with pytest.raises(BuildError, match=r"inner/part/setup.py: not in it"):
        sources.trees([clone[1]], "full", places)


def test_an_unpacked_archive_is_compared_with_the_archive(clone, monkeypatch):
    wheelhouse = store.store() / "wheelhouse"
    wheelhouse.mkdir(parents=True)
    with tarfile.open(wheelhouse / "thing-1.tar.gz", "w:gz") as tar:
        for name in ("file.txt", "run"):
            about = tarfile.TarInfo(f"thing-1/{name}")
            about.size, about.mode = len(name), 0o755 if name == "run" else 0o644
            tar.addfile(about, io.BytesIO(name.encode()))
    digest = store.sha256_of(wheelhouse / "thing-1.tar.gz")
    source = replace(clone[1], archive=LockedFile("thing", "thing-1.tar.gz", digest), submodules={})
    tree = sources.trees([source], "cpu", {})["whole"]
    assert sources.trees([source], "cpu", {})["whole"] == tree and os.access(tree / "run", os.X_OK)
    for number, spoil in enumerate((a_hidden_file, other_content, a_program, a_pipe)):
        shutil.copytree(tree, tree.parent / str(number))
        spoil(tree)
        with pytest.raises(BuildError, match=r"is not what the archive thing-1\.tar\.gz holds"):
            sources.trees([source], "cpu", {})
        shutil.rmtree(tree)
        (tree.parent / str(number)).rename(tree)


def test_what_no_lock_can_say_is_not_read_from_the_store(tmp_path, monkeypatch):
    """uv links what its cache holds into every environment, and the engine's programs run as root."""
    place = tmp_path / "store"
    monkeypatch.setenv("SLIPWAY_STORE", str(place))
    monkeypatch.setenv("SLIPWAY_LOCAL", str(tmp_path / "local"))
    for name in ("UV_CACHE_DIR", "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)
    planted = place / "engine" / "root" / "usr" / "bin" / "docker"
    planted.parent.mkdir(parents=True)
    planted.write_text("#!/bin/sh\n")
    planted.chmod(0o755)
    (place / "engine" / "unpacked").write_text(" ".join(engine.UNPACKED))
    socket = tmp_path / "docker.sock"
    socket.touch()
    monkeypatch.setattr(engine, "socket", lambda: socket)  # the private engine is the one in use
    assert engine.client() != str(planted) and engine.environment()["DOCKER_CONFIG"].startswith(str(tmp_path / "local"))
    assert lock.uv_cache() == tmp_path / "local" / "uv"
    debian = place / "debian" / f"licences-{store.sha256_of(licences.debian.lock_of(here()))[:16]}.json"
    debian.parent.mkdir()
    debian.write_text('{"planted": "evil"}')
    monkeypatch.setattr(licences.debian, "read_lock", lambda _: [])
    licences.of_debian.cache_clear()
    assert licences.of_debian(here()) == {}
    licences.of_debian.cache_clear()
