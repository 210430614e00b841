"""Debian packages of images: the lock, its age, snapshots, and root file systems made of them."""

from __future__ import annotations

import datetime
import functools
import gzip
import hashlib
import http.server
import lzma
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import audit, debian, image
from images.store import BuildError
from images.target import TARGETS, X86_64

ROOT = Path(__file__).parent.parent


def test_the_age_of_the_locks_is_said():
    day = debian.locked_on(X86_64) + datetime.timedelta(days=40)
    said = image.ages(X86_64, day)
    assert f"Debian packages of {debian.locked_on(X86_64)} (40 days old), Python packages of " in said


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_debian_packages_that_are_behind_are_named_from_a_carried_list(tmp_path, ending):
    locked = {package.name: package for package in debian.read_lock(X86_64)}
    stanza = "Package: {}\nVersion: {}\nFilename: pool/{}\n"
    table = [
        stanza.format("libssl3", locked["libssl3"].version + ".1", "updates/main/o/openssl/x.deb"),
        stanza.format("bash", "1.0", "main/b/bash/x.deb"),  # older than the lock
        stanza.format("g++", "99", "main/g/x.deb"),  # not in an image
        stanza.format("tini", locked["tini"].version + "+b9", "main/t/tini/x.deb"),
    ]
    path = tmp_path / f"Packages{ending}"
    {"": open, ".gz": gzip.open, ".xz": lzma.open}[ending](path, "wb").write("\n".join(table).encode())
    version = locked["libssl3"].version
    found = debian.newer(X86_64, [path])
    assert found[0] == f"libssl3 {version}: {version}.1 is in security" and len(found) == 2
    assert found[1].startswith("tini ") and found[1].endswith(" is in a release")
    with pytest.raises(BuildError, match="no package in it"):
        path.write_bytes(b"" if not ending else {".gz": gzip.compress, ".xz": lzma.compress}[ending](b""))
        debian.newer(X86_64, [path])


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    """The address of a server of the files in tmp_path."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_package_that_the_mirror_no_longer_has_comes_from_a_snapshot(tmp_path, monkeypatch, web):
    content = b"a package"
    package = debian.Package(
        ("base",), "x", "1", hashlib.sha256(content).hexdigest(), "pool/updates/main/x/x_1_all.deb"
    )
    monkeypatch.setattr(debian, "read_lock", lambda _: [package])
    monkeypatch.setattr(debian, "locked_on", lambda _: datetime.date(2026, 11, 25))
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    for name in ("SLIPWAY_DEBIAN_MIRROR", "SLIPWAY_DEBIAN_SECURITY_MIRROR"):
        monkeypatch.setenv(name, f"{web}/mirror")
    with pytest.raises(BuildError, match=r"set SLIPWAY_DEBIAN_SNAPSHOT to .* \(the lock is of 2026-11-25\)"):
        debian.fetch(X86_64)
    place = tmp_path / "snapshots" / "debian-security" / "20261125T235959Z" / package.path
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    monkeypatch.setenv("SLIPWAY_DEBIAN_SNAPSHOT", f"{web}/snapshots")
    assert (debian.fetch(X86_64) / "x_1_all.deb").read_bytes() == content


def test_a_ready_root_file_system_is_taken_if_it_has_the_locked_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SLIPWAY_ROOTFS", str(tmp_path))
    monkeypatch.setattr(debian, "HASHES", tmp_path / "rootfs.lock")
    right = hashlib.sha256(b"right").hexdigest()
    (tmp_path / "rootfs.lock").write_text(f"arm64 base {'1' * 64}\namd64 base {right}\namd64 build {'0' * 64}\n")
    with pytest.raises(BuildError, match=r"base\.tar not found"):
        debian.root_file_system("base", X86_64)
    (tmp_path / "base.tar").write_text("wrong")
    with pytest.raises(BuildError, match=r"base\.tar has SHA-256 \w+, expected \w+ from images/rootfs.lock") as error:
        debian.root_file_system("base", X86_64)
    assert error.value.exit_code == 65 and not list((tmp_path / "store" / "rootfs").iterdir())
    (tmp_path / "base.tar").write_text("right")
    assert debian.root_file_system("base", X86_64).read_text() == "right"


def test_the_hashes_in_the_lock_are_of_both_root_file_systems():
    for target in TARGETS.values():
        found = debian.hashes(target)
        assert set(found) == set(debian.SETS) and all(len(digest) == 64 for digest in found.values())


def test_an_audit_asks_for_both_processors_and_says_the_same_update_once(monkeypatch, capsys):
    asked = []
    update = "bash 5.2-1: 5.2-2 is in security"
    monkeypatch.setattr(debian, "newer", lambda target, lists: asked.append((target, lists)) or [update])
    found = audit._debian([])
    assert [target for target, _ in asked] == list(TARGETS.values())
    assert found[0] == update and found[1].startswith("1 Debian packages of ") and len(found) == 2
    audit._debian([Path("Packages")])
    assert len(asked) == 3, "a carried list is of one processor"
