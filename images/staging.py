"""The build contexts that BuildKit gets: hard links into the store and the project's own files, in one folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from images import debian, lock, provenance, sbom
from images.manifest import HERE
from images.store import store

if TYPE_CHECKING:
    from images.image import Request

# What the built layer takes as wheels, beside what it compiles; and what only compiles.
READY = {"cpu": (), "index": ("te",), "full": ("te",)}
COMPILED = {
    "cpu": (),
    "index": ("transformer-engine-torch",),
    "full": ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"),
}
SCRIPTS = ("slim.py", "import_check.py")


def stage(folder: Path, request: Request) -> None:
    """Lay out the build contexts: hard links into the store and the project's own files."""
    for name in ("rootfs", "uv", "locked", "building", "variant", "scripts", "family", "empty"):
        (folder / name).mkdir()
    shutil.copy(HERE / "Dockerfile", folder)
    for name in debian.SETS:
        os.link(debian.root_file_system(name), folder / "rootfs" / f"{name}.tar")
    for script in SCRIPTS:
        shutil.copy(HERE / script, folder / "scripts")
    shutil.copytree(HERE / "root", folder / "files")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(lock.ROOT / "entrypoints", folder / "entrypoints", ignore=ignore)
    _stage_packages(folder, request.variant)
    _stage_family(folder / "family", request)


def _stage_packages(folder: Path, variant: str) -> None:
    """uv, and a context for each of: what every image installs, what builds wheels, what the variant takes beside."""
    os.link(lock.uv(), folder / "uv" / "uv")
    runtime = lock.requirements("--no-default-groups")
    archives = {p["name"]: p["sdist"]["path"] for p in lock.locked_packages() if "sdist" in p}
    pure = [name for name in runtime if name in archives and name not in lock.BUILT_FROM_SOURCE]
    wheels = {name: line for name, line in runtime.items() if name not in archives}
    _stage_list(folder / "locked", "runtime.txt", wheels)
    for name in pure:
        os.link(store() / "wheelhouse" / archives[name], folder / "locked" / archives[name])
    (folder / "locked" / "source-only.txt").write_text("".join(f"{archives[name]}\n" for name in pure))
    build_tools = lock.requirements("--only-group", "build")
    _stage_list(folder / "building", "build.txt", build_tools)
    ready: dict[str, str] = {}
    for group in READY[variant]:
        ready |= lock.requirements("--only-group", group)
    ready = {name: line for name, line in ready.items() if name not in {*runtime, *COMPILED[variant]}}
    cuda = lock.requirements("--only-group", "cuda") if variant != "cpu" else {}
    cuda = {name: line for name, line in cuda.items() if name not in build_tools}
    _stage_list(folder / "variant", "ready.txt", ready)
    _stage_list(folder / "variant", "cuda.txt", cuda, besides=wheels)


def _stage_list(folder: Path, file: str, lines: dict[str, str], besides: Iterable[str] = ()) -> None:
    """A list of requirements in `folder`, and beside it the wheels of all that are not elsewhere."""
    (folder / file).write_text("".join(lines.values()))
    wanted = lines.keys() - set(besides)
    for package in lock.locked_packages():
        if package["name"] in wanted:
            path = package["wheels"][0]["path"]
            os.link(store() / "wheelhouse" / path, folder / path)


def _stage_family(folder: Path, request: Request) -> None:
    """What the last layer holds: the manifest, the pins as they are for this family, the SBOM."""
    shutil.copy(HERE / f"{request.manifest.family}.toml", folder / "image.toml")
    (folder / "pins.json").write_text(json.dumps(provenance.pins(request.wanted), indent=1, sort_keys=True) + "\n")
    (folder / "sbom.cdx.json").write_text(sbom.text(request.manifest, request.variant, request.wanted))
