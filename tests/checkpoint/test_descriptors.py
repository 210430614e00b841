"""A reader's files stay open while it lives, and not longer."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slipway.checkpoint.descriptors import Descriptors


def are_open(path: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(1 for link in links if link.is_symlink() and os.readlink(link) == str(path))


def test_threads_share_one_that_is_closed_in_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    descriptors = Descriptors()
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(descriptors.of, [path] * 200))
    assert len(found) == 1 and os.pread(*found, 7, 0) == b"content" and are_open(path) == 1
    del descriptors
    assert are_open(path) == 0


def test_what_cannot_be_opened_is_said_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        Descriptors().of(tmp_path / "none")
