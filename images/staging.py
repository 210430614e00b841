"""The build contexts that BuildKit reads, in one folder: hard links into the store, and the project's own files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from images import debian, lock, provenance, sbom
from images.manifest import COMPILED, HERE, READY
from images.request import Request
from images.store import store
from images.target import Target

# What tools leave in a checkout: an image must not depend on it.
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
SCRIPTS = ("slim.py", "import_check.py")
COMPILE = "compile"  # the folder of what only the stages that compile need


def stage(folder: Path, request: Request) -> None:
    """Lay out the build contexts in an empty folder.

    BuildKit sends only what changed in a context, and a step runs again when a context that it mounts has changed.
    So each context holds what one kind of step needs, and no more.
    """
    for name in ("rootfs", "uv", "locked", "building", "variant", "scripts", "family", "empty"):
        (folder / name).mkdir()
    shutil.copy(HERE / "Dockerfile", folder)
    for name in debian.SETS:
        os.link(debian.root_file_system(name, request.target), folder / "rootfs" / f"{name}.tar")
    for script in SCRIPTS:
        shutil.copy(HERE / script, folder / "scripts")
    shutil.copytree(HERE / COMPILE, folder / "scripts" / COMPILE, ignore=IGNORED)
    shutil.copytree(HERE / "root", folder / "files")
    shutil.copytree(lock.ROOT / "entrypoints", folder / "entrypoints", ignore=IGNORED)
    _stage_packages(folder, request.variant, request.target)
    _stage_family(folder / "family", request)


def _stage_packages(folder: Path, variant: str, target: Target) -> None:
    """uv, and three contexts: what every image installs, what builds wheels, and what only this variant needs."""
    os.link(lock.uv(target), folder / "uv" / "uv")
    runtime = lock.requirements("--no-default-groups", target=target)
    archives = {p["name"]: p["sdist"]["path"] for p in lock.locked_packages() if lock.is_built(p, target)}
    pure = [name for name in runtime if name in archives and name not in lock.BUILT_FROM_SOURCE]
    wheels = {name: line for name, line in runtime.items() if name not in archives}
    _stage_list(folder / "locked", "runtime.txt", wheels, target)
    for name in pure:
        os.link(store() / "wheelhouse" / archives[name], folder / "locked" / archives[name])
    (folder / "locked" / "source-only.txt").write_text("".join(f"{archives[name]}\n" for name in pure))
    build_tools = lock.requirements("--only-group", "build", target=target)
    _stage_list(folder / "building", "build.txt", build_tools, target)
    ready: dict[str, str] = {}
    for group in READY[variant]:
        ready |= lock.requirements("--only-group", group, target=target)
    ready = {name: line for name, line in ready.items() if name not in {*runtime, *COMPILED[variant]}}
    cuda = lock.requirements("--only-group", "cuda", target=target) if variant != "cpu" else {}
    cuda = {name: line for name, line in cuda.items() if name not in build_tools}
    _stage_list(folder / "variant", "ready.txt", ready, target)
    _stage_list(folder / "variant", "cuda.txt", cuda, target, besides=wheels)


def _stage_list(folder: Path, file: str, lines: dict[str, str], target: Target, besides: Iterable[str] = ()) -> None:
    """Write a list of requirements into `folder`, with the wheels of all but `besides`: another context has those."""
    (folder / file).write_text("".join(lines.values()))
    wanted = lines.keys() - set(besides)
    for package in lock.locked_packages():
        if package["name"] in wanted and (wheel := lock.wheel_of(package, target)):
            os.link(store() / "wheelhouse" / wheel["path"], folder / wheel["path"])


def _stage_family(folder: Path, request: Request) -> None:
    """What the last layer holds: the manifest, this family's pins, the SBOM."""
    shutil.copy(HERE / f"{request.manifest.family}.toml", folder / "image.toml")
    (folder / "pins.json").write_text(
        json.dumps(provenance.pins(request.wanted, request.target), indent=1, sort_keys=True) + "\n"
    )
    (folder / "sbom.cdx.json").write_text(sbom.text(request.manifest, request.variant, request.wanted, request.target))
