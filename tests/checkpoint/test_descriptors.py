"""A reader's files stay open while it lives, and not longer."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
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


def test_more_files_than_a_process_may_have_open_before_it_asks(tmp_path):
    """As of a checkpoint that a thousand ranks have saved."""
    paths = [tmp_path / str(number) for number in range(100)]
    for path in paths:
        path.write_text(path.name)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 50
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
        descriptors = Descriptors()
        with ThreadPoolExecutor(4) as pool:
            found = [*pool.map(descriptors.of, paths)]
        assert [os.pread(one, 9, 0).decode() for one in found] == [path.name for path in paths]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_systems_own_limit_is_named(tmp_path):
    for number in range(60):
        (tmp_path / str(number)).touch()
    script = (
        "import resource, sys; from slipway import cli; from slipway.checkpoint import descriptors\n"
        "from pathlib import Path\n"
        "def read(folder: str) -> None:\n"
        "    'Opens every file of a folder.'\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50)); opened = descriptors.Descriptors()\n"
        "    for path in Path(folder).iterdir(): opened.of(path)\n"
        "cli.COMMANDS['read'] = read; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, "read", tmp_path], capture_output=True, text=True)
    assert done.returncode == 78 and done.stderr.startswith(
        "slipway: this process may have 50 files open, and needs more"
    )


def test_what_cannot_be_opened_is_said_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        Descriptors().of(tmp_path / "none")
