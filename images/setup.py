"""make setup: .venv as uv.lock says, from one copy of every file for any number of clones.

Three things make one copy:

- The wheels: STORE/wheelhouse. `uv sync` would read them through each clone's own link to that folder, and uv's cache
  names an unpacked wheel by the path where the wheel was read: every clone would add a copy of 6 GB. So uv gets the
  lock as a list of requirements, and the store's own path, which is the same for every clone.
- The unpacked wheels: LOCAL/uv is uv's cache, and a .venv holds hard links to its files. An installed file must
  therefore never be changed in place: the change would be in every clone.
- The bytecode: what the first clone compiles is linked into the cache, next to its source. The next clone gets it with
  the source.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from images.lock import ROOT, fetch_wheels, requirements, run_uv, uv_cache
from images.store import BuildError, store

VENV = ROOT / ".venv"
STAMP = VENV / "slipway-setup.sha256"


def setup() -> None:
    """Make .venv what uv.lock says; do nothing if it is so already.

    Errors: BuildError for another Python than 3.11, for a file that cannot be fetched or differs from its hash.
    """
    made_of = b"".join((ROOT / name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
    state = hashlib.sha256(made_of + sys.version.encode() + str(ROOT).encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == state:
        return
    if sys.version_info[:2] != (3, 11):
        raise BuildError(f"Python is {sys.version.split()[0]}, expected 3.11; run `make PYTHON=python3.11 setup`")
    wanted = requirements()
    fetch_wheels(wanted)
    install(wanted)
    share_bytecode()
    STAMP.write_text(state)
    print(f"setup: {VENV} is ready", file=sys.stderr)


def install(wanted: dict[str, str]) -> None:
    """Make .venv hold these requirements (package → line with hashes) and this project, and nothing else."""
    run_uv("venv", "--allow-existing", str(VENV))
    uv_cache().mkdir(parents=True, exist_ok=True)
    if VENV.stat().st_dev != uv_cache().stat().st_dev:
        print(
            f"setup: {VENV} and {uv_cache()} are on different disks, so every file is copied; set SLIPWAY_LOCAL to a "
            "folder on the disk of the clones to have one copy",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as scratch:
        locked, listed = Path(scratch) / "locked.txt", Path(scratch) / "requirements.txt"
        locked.write_text("".join(wanted.values()))
        listed.write_text(f"--requirement {locked}\n--editable {ROOT}\n")
        # --no-config: pyproject.toml names the clone's wheelhouse, whose path would be a key of the cache.
        words = ["--no-config", "--no-index", "--find-links", str(store() / "wheelhouse")]
        # What builds source-only packages is locked too; a wheel without a hash would be unpacked a second time.
        words += ["--build-constraints", str(locked), "--require-build-hashes"]
        # --python: uv would otherwise change the environment that this very program may run in.
        words += ["--python", str(VENV / "bin" / "python"), str(listed)]
        # Compiled here once, or the first import of NeMo takes half a minute.
        run_uv("pip", "sync", "--compile-bytecode", *words, UV_LINK_MODE=link_mode())


def link_mode() -> str:
    """How uv puts files into .venv; a person who wants to edit installed packages sets UV_LINK_MODE=copy."""
    return os.environ.get("UV_LINK_MODE") or "hardlink"


def share_bytecode() -> None:
    """Link the bytecode of .venv into uv's cache, for each module that is a hard link to a file there.

    Python takes bytecode if the time and size of its source are those noted in it: hard links have the same. It
    writes bytecode to a new file and renames it, so that a clone never changes what another one has.
    """
    if link_mode() != "hardlink":
        return
    site = VENV / "lib" / "python3.11" / "site-packages"
    for wheel in (uv_cache() / "archive-v0").glob("*"):
        for kept in wheel.rglob("*.py"):
            source = site / kept.relative_to(wheel)
            if source.exists() and source.samefile(kept):
                _link(Path(importlib.util.cache_from_source(source)), Path(importlib.util.cache_from_source(kept)))


def _link(compiled: Path, target: Path) -> None:
    if compiled.exists() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another clone's set-up was first
            os.link(compiled, target)
