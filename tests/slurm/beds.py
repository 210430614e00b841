"""A bed for the tests of a file, and a person at its client. A file of tests names this one as its plug-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bed import Bed, missing, sweep
from person import Client, person, place

MUST = "SLIPWAY_TESTS_NEED_SLURM"  # set in CI: no reason is good enough there, and packages are installed


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where there can be no Slurm, and says why."""
    must = os.environ.get(MUST)
    if why := missing(install=bool(must)):
        (pytest.fail if must else pytest.skip)(why)
    sweep()


@pytest.fixture(scope="module")
def bed(possible: None) -> Iterator[Bed]:
    """A Slurm of an ordinary user."""
    with Bed() as one:
        yield one


@pytest.fixture(scope="module")
def roots_bed(possible: None) -> Iterator[Bed]:
    """A Slurm of root, whose jobs can use this Python: its interpreter may be in a folder that is root's alone."""
    with Bed(user=False) as one:
        yield one


@pytest.fixture
def client(bed: Bed, tmp_path: Path) -> Client:
    """A client whose commands are stand-ins."""
    return person(bed, tmp_path)


@pytest.fixture
def out(bed: Bed, tmp_path: Path) -> Path:
    """A folder of one's own on the cluster."""
    return place(bed, tmp_path.name)
