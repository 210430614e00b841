"""Source trees of images: from clones that have what is read, and from archives; each is checked against its pin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import git

from images import (
    objects,
    sources,
)
from images.manifest import Source
from images.store import BuildError

ROOT = Path(__file__).parent.parent


def test_a_commit_and_its_submodules_come_from_the_clones_given(clone):
    folder, source = clone
    places = {"whole": str(folder / "whole"), "part": str(folder / "part")}
    tree = sources.trees([source], "full", places)["whole"]
    assert (tree / "file.txt").read_text() == "whole" and (tree / "inner" / "part" / "file.txt").read_text() == "part"
    shutil.rmtree(folder / "whole")  # what is in the store is not asked for again
    assert sources.trees([replace(source, by_git=True)], "full", {})["whole"] == tree


def test_the_preflight_names_what_cannot_be_reached_within_seconds(clone):
    folder, source = clone
    started = time.monotonic()
    with pytest.raises(BuildError) as error:
        sources.trees([source], "full", {"whole": str(folder / "whole")})
    assert time.monotonic() - started < 30 and error.value.exit_code == 78
    message = str(error.value)
    assert "cannot reach part (https://host.invalid/part)" in message and "--source part=CLONE" in message
    assert "--source whole" not in message and "\n" not in message


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"commit": "1" * 40},
            r"does not have all of commit 1111\w+: the commit \(object 1111\w+\) is missing; run `git",
        ),
        ({"submodules": {}}, r"submodule inner/part is at commit \w+, which has no pin"),
    ],
)
def test_a_clone_that_is_not_as_pinned_is_refused(clone, change, message):
    folder, source = clone
    with pytest.raises(BuildError, match=message):
        other = replace(source, **change)
        sources.trees([other], "full", {name: str(folder / name) for name in ("whole", *other.submodules)})
    assert not [path for path in (folder / "store").rglob("*") if path.name == "file.txt"]


def test_a_wrong_source_is_one_line_with_the_names_that_exist(clone):
    with pytest.raises(BuildError, match="--source hole: unknown source; use one of part, whole") as error:
        sources.trees([clone[1]], "full", {"hole": "/"})
    assert error.value.exit_code == 2
    with pytest.raises(BuildError, match="its pin has no source archive") as error:
        sources.trees([clone[1]], "cpu", {})
    assert error.value.exit_code == 65


def test_a_clone_that_is_not_whole_will_do_if_it_has_what_the_build_reads(clone):
    """A shallow clone by another owner, with a submodule that lacks a file, and of which the build reads one folder."""
    folder, source = clone
    part = folder / "part"
    for name, text in {"include/a/b.h": "b", "docs/picture": "p" * 1000, "include/run": "r"}.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text(text)
    (part / "include" / "run").chmod(0o755)
    (part / "include" / "link").symlink_to("a/b.h")
    git(part, "add", ".")
    git(part, "commit", "--quiet", "-m", "two")
    commit = git(part, "rev-parse", "HEAD").strip()
    git(folder / "whole" / "inner" / "part", "fetch", "--quiet", str(part), "HEAD")
    git(folder / "whole" / "inner" / "part", "checkout", "--quiet", commit)
    git(folder / "whole", "commit", "--quiet", "--all", "-m", "three")
    top = git(folder / "whole", "rev-parse", "HEAD").strip()
    git(folder, "clone", "--quiet", "--bare", "--depth=1", f"file://{folder}/whole", "shallow")
    picture = git(part, "rev-parse", "HEAD:docs/picture").strip()
    (part / ".git" / "objects" / picture[:2] / picture[2:]).unlink()
    subprocess.run(["chown", "-R", "4242:4343", part, folder / "shallow"], check=True)
    places = {"whole": str(folder / "shallow"), "part": str(part)}

    def pinned(**keys: object) -> Source:
        return replace(source, commit=top, submodules={"part": {"commit": commit, "repository": "x", **keys}})

    with pytest.raises(
        BuildError, match=rf"part: \S+ does not have all of .*docs/picture \(object {picture}\) is missing"
    ):
        sources.trees([pinned()], "full", places)
    tree = sources.trees([pinned(paths=["include"])], "full", places)["whole"] / "inner" / "part"
    assert sorted(str(p.relative_to(tree)) for p in tree.rglob("*")) == [
        "include", "include/a", "include/a/b.h", "include/link", "include/run",
    ]  # fmt: skip
    assert (tree / "include" / "link").read_text() == "b" and os.access(tree / "include" / "run", os.X_OK)
    # A submodule of which nothing is read need not be anywhere.
    bare = sources.trees([pinned(paths=[])], "full", {"whole": places["whole"], "part": "/nonexistent"})["whole"]
    assert bare != tree.parents[1] and not (bare / "inner" / "part" / "include").exists()


def test_a_file_with_other_content_than_its_hash_says_is_refused(clone):
    folder, source = clone
    objects = folder / "whole" / ".git" / "objects"
    sha = git(folder / "whole", "rev-parse", "HEAD:file.txt").strip()
    other = git(folder / "part", "rev-parse", "HEAD:file.txt").strip()
    shutil.copy(folder / "part" / ".git" / "objects" / other[:2] / other[2:], objects / "new")
    os.replace(objects / "new", objects / sha[:2] / sha[2:])
    with pytest.raises(BuildError, match=rf"file.txt \(object {sha}\) (is missing|has other content)"):
        sources.trees([source], "full", {"whole": str(folder / "whole"), "part": str(folder / "part")})


def test_no_file_of_a_tree_leaves_its_folder():
    for name in (b"..", b".git", b"a/b"):
        with pytest.raises(BuildError, match="no valid name in a git tree"):
            list(objects.parsed("", b"100644 " + name + b"\0" + b"x" * 20))


def test_a_source_that_a_context_makes_needless_is_said_and_no_error(clone, capsys):
    source = clone[1]
    given = {"whole": "/nonexistent", "part": "/nonexistent"}
    assert sources.trees([replace(source, replaced="whole-source")], "full", given) == {}
    assert "--source part is not needed: a --context replaces" in capsys.readouterr().err


def test_full_without_a_git_host_is_said_in_seconds(tmp_path):
    words = [sys.executable, ROOT / "build.py", "image", "--variant", "full", "--source", "nemo=/nonexistent"]
    started = time.monotonic()
    environment = {**os.environ, "GIT_SSL_NO_VERIFY": "1", "https_proxy": "http://127.0.0.1:9", "DOCKER_HOST": "x"}
    environment["SLIPWAY_STORE"] = str(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 78 and time.monotonic() - started < 60
    assert len(done.stderr.splitlines()) == 1 and "--source nemo=CLONE" in done.stderr and "apex" in done.stderr


def test_two_builds_at_once_may_make_the_same_tree(clone):
    folder, source = clone
    places = {"whole": str(folder / "whole"), "part": str(folder / "part")}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: sources.trees([source], "full", places)["whole"], range(8)))
    assert len(set(made)) == 1 and (made[0] / "inner" / "part" / "file.txt").read_text() == "part"
    assert sorted(path.name for path in made[0].parent.iterdir()) == [made[0].name, f"{made[0].name}.objects"]


@pytest.mark.parametrize(
    "kind, name", [(tarfile.SYMTYPE, "t/link"), (tarfile.REGTYPE, "t/../../x"), (tarfile.REGTYPE, "/x")]
)
def test_a_source_archive_holds_plain_files_below_its_folder(kind, name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(BuildError, match="is no plain file below its folder"):
        sources._as_ours(member)


def test_what_a_source_archive_holds_is_this_users_with_plain_modes():
    """As tarfile's own filter makes it, which Debian 12's Python does not have."""
    for mode, is_folder in ((0o600, False), (0o4777, False), (0o700, True)):
        member = tarfile.TarInfo("t/a")
        member.mode, member.uid, member.type = mode, 4242, tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
        expected = 0o755 if is_folder or mode & 0o100 else 0o644
        assert (sources._as_ours(member).mode, member.uid) == (expected, os.getuid())
