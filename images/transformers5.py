"""make transformers5: the newest major of transformers in its own environment, for the tests that compare with it.

NeMo needs transformers 4. The tests ask both majors for the same logits, so there is a second environment,
.venv-transformers5: it holds only what differs (200 MB), and sees everything else, torch above all, in .venv.
Its lock, tests/transformers5.lock, has a line for each file: project, name of the file, SHA-256.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from images.lock import ROOT, locked_packages, run_uv, wheel_rank
from images.setup import VENV
from images.store import BuildError, LockedFile, fetch, index_address, open_url, project_files, sha256_of, store
from images.target import X86_64

LOCK = ROOT / "tests" / "transformers5.lock"
WANTED = ("transformers==5.24.0", "peft==0.21.2", "compressed-tensors==0.20.0")
OVERLAY = ROOT / ".venv-transformers5"
STAMP = OVERLAY / "slipway-setup.lock"


def locked() -> list[LockedFile]:
    """The files of the environment."""
    return [LockedFile(*line.split()) for line in LOCK.read_text().splitlines()]


def setup() -> None:
    """Make .venv-transformers5 what the lock says; do nothing if it is so already."""
    state = LOCK.read_text() + sys.version
    if STAMP.exists() and STAMP.read_text() == state:
        return
    wheelhouse = store() / "wheelhouse"
    fetch(locked(), wheelhouse)
    run_uv("venv", "--allow-existing", str(OVERLAY))
    files = [str(wheelhouse / file.name) for file in locked()]
    python = str(OVERLAY / "bin" / "python")
    run_uv("pip", "install", "--no-config", "--no-deps", "--no-index", "--python", python, *files)
    # Named so that it comes last: what lies in this environment goes first.
    base = VENV / "lib" / "python3.11" / "site-packages"
    (OVERLAY / "lib" / "python3.11" / "site-packages" / "zz-base.pth").write_text(f"{base}\n")
    STAMP.write_text(state)
    print(f"transformers5: {OVERLAY} is ready", file=sys.stderr)


def lock() -> None:
    """Resolve again and write the lock: what is needed and .venv does not have in a version that fits."""
    ours = {package["name"]: package["version"] for package in locked_packages()}
    with tempfile.TemporaryDirectory() as scratch:
        wanted, found = Path(scratch) / "wanted.in", Path(scratch) / "found.txt"
        wanted.write_text("\n".join(WANTED) + "\n")
        # uv keeps the versions of an earlier result as far as it can: so it keeps .venv's.
        found.write_text("".join(f"{name}=={version}\n" for name, version in ours.items()))
        words = ["--no-config", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        run_uv("pip", "compile", *words, str(wanted), "-o", str(found), UV_DEFAULT_INDEX=index_address())
        pins = re.findall(r"(?m)^([\w.-]+)==([^ \n]+)(.*(?:\n[ ]+.*)*)", found.read_text())
    files = [
        _wheel(name, version, set(re.findall(r"sha256:(\w+)", hashes)))
        for name, version, hashes in pins
        if ours.get(name) != version
    ]
    LOCK.write_text("".join(f"{file.project} {file.name} {file.sha256}\n" for file in files))


def _wheel(project: str, version: str, hashes: set[str]) -> LockedFile:
    """The wheel of a version that fits best, fetched, with its hash checked against those that uv noted."""
    offered = project_files(index_address(), project)
    of_version = [name for name in offered if name.endswith(".whl") and name.split("-")[1] == version]
    ranked = sorted((rank, name) for name in of_version if (rank := wheel_rank(name, X86_64)))
    if not ranked:
        raise BuildError(f"{project} {version} has no wheel for CPython 3.11 on x86-64 Linux; choose another version")
    name = ranked[-1][1]
    target = store() / "wheelhouse" / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=store()) as scratch:
            part = Path(scratch) / name
            with open_url(offered[name], name) as response, part.open("wb") as file:
                shutil.copyfileobj(response, file)
            part.replace(target)
    if sha256_of(target) not in hashes:
        raise BuildError(f"{name}: its hash is not one that uv resolved; remove {target} and run `make lock` again", 65)
    return LockedFile(project, name, sha256_of(target))
