"""make image: everything fetched and verified first, laid out for BuildKit, then built with the network off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import entrypoints
from images import debian, engine, lock, provenance, sbom
from images.manifest import HERE, Manifest, check_variant, families, read_manifest, sources
from images.sources import trees
from images.store import BuildError, store

NEEDED_BYTES = 16_000_000_000  # build cache, image and unpacked image
BYTES_PER_JOB = 4_000_000_000  # what one compiler of CUDA or torch code takes at most
# What the built layer takes as wheels, beside what it compiles; and what only compiles.
READY = {"cpu": (), "index": ("te",), "full": ("te",)}
COMPILED = {
    "cpu": (),
    "index": ("transformer-engine-torch",),
    "full": ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"),
}
SCRIPTS = ("slim.py", "import_check.py")


def image(model: str, variant: str, source: list[str] | None = None) -> None:
    """Build slipway/MODEL:VARIANT; print its digest and size; leave SBOM and provenance in the store.

    Args:
        model: a family with a manifest.
        variant: full, index or cpu.
        source: NAME=PLACE for each source that comes from another clone or mirror than its pin says.
    """
    started = time.monotonic()
    check_variant(variant)
    manifest = read_manifest(model)
    places = places_of(source)
    wanted = sources(manifest, variant)
    folders = trees(wanted, variant, places)
    engine.require()
    fetch_for(variant)
    fetched = time.monotonic()
    # Uncompressed, since this engine keeps the image where it was built; `docker push` compresses.
    name = tag(model, variant)
    build(manifest, variant, folders, name, f"type=image,name={name},unpack=true,compression=uncompressed")
    digest, size = inspect(name)
    provenance.write(manifest, variant, wanted, name, digest)
    print(
        f"image: {name} {digest}, {size / 1e9:.2f} GB, fetched in {fetched - started:.0f} s, "
        f"built in {time.monotonic() - fetched:.0f} s"
    )


def images(variant: str, source: list[str] | None = None) -> None:
    """Build every family's image."""
    for model in families():
        image(model, variant, source)


def tag(model: str, variant: str) -> str:
    """The image's name."""
    return f"slipway/{model}:{variant}"


def places_of(given: list[str] | None) -> dict[str, str]:
    """Source name → place, of words NAME=PLACE."""
    places = dict(word.partition("=")[::2] for word in given or [])
    for name, place in places.items():
        if not name or not place:
            raise BuildError(f"--source {name}: write it as NAME=PLACE, PLACE being a clone or an address", exit_code=2)
    return places


def fetch() -> None:
    """Bring everything that images of the variants cpu and index are made of into the store."""
    for variant in ("cpu", "index"):
        fetch_for(variant)
        for model in families():
            trees(sources(read_manifest(model), variant), variant, {})


def fetch_for(variant: str) -> None:
    """Bring the packages of one variant into the store."""
    groups = ("build", *READY[variant], *(["cuda"] if variant != "cpu" else []))
    words = [word for group in groups for word in ("--group", group)]
    lock.fetch_wheels(lock.requirements("--no-default-groups", *words))
    for name in debian.SETS:
        debian.root_file_system(name)


def build(
    manifest: Manifest,
    variant: str,
    folders: dict[str, Path],
    name: str,
    output: str,
    *options: str,
    proof: bool = False,
) -> None:
    """Run BuildKit on a fresh staging folder.

    Args:
        manifest, variant: what to build.
        folders: source name → its tree.
        name: the image's name.
        output: buildx's.
        options: for `docker buildx bake`.
        proof: let no compiler's cache help.
    """
    free = shutil.disk_usage(store()).free
    if free < NEEDED_BYTES:
        needed = f"{NEEDED_BYTES / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
        raise BuildError(f"{store()}: {needed}; free some space or set SLIPWAY_STORE", exit_code=73)
    with tempfile.TemporaryDirectory(dir=store(), prefix="staging-") as scratch:
        staging = Path(scratch)
        stage(staging, manifest, variant)
        command = [engine.client(), "buildx", "bake", "--file", str(HERE / "docker-bake.hcl"), *options, "image"]
        variables = _variables(staging, manifest, variant, folders)
        variables |= {"TAG": name, "OUTPUT": output, "CCACHE_DISABLE": "1" if proof else ""}
        done = subprocess.run(command, env={**engine.environment(), **variables}, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError(f"the build of {name} failed; its last lines stand above", exit_code=1)


def _variables(staging: Path, manifest: Manifest, variant: str, folders: dict[str, Path]) -> dict[str, str]:
    trees_of = {
        name.replace("-", "_").upper(): str(folders.get(name, staging / "empty"))
        for name in ("nemo", "megatron-core", "transformer-engine", "apex")
    }
    return trees_of | {
        "MODEL": manifest.family,
        "VARIANT": variant,
        "STAGING": str(staging),
        "PINS": json.dumps(provenance.pins(sources(manifest, variant)), sort_keys=True),
        "VERSION": entrypoints.__version__,
        "BUILDER": provenance.builder(),
        "MAX_JOBS": str(compile_jobs()),
        "CUDA_ARCHITECTURES": " ".join(manifest.cuda_architectures),
    }


def compile_jobs() -> int:
    """As many compilers at once as there are cores and as memory holds."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


# ---------------------------------------------------------------------------- the build contexts


def stage(folder: Path, manifest: Manifest, variant: str) -> None:
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
    _stage_packages(folder, variant)
    _stage_family(folder / "family", manifest, variant)


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


def _stage_family(folder: Path, manifest: Manifest, variant: str) -> None:
    """What the last layer holds: the manifest, the pins as they are for this family, the SBOM."""
    shutil.copy(HERE / f"{manifest.family}.toml", folder / "image.toml")
    wanted = sources(manifest, variant)
    (folder / "pins.json").write_text(json.dumps(provenance.pins(wanted), indent=1, sort_keys=True) + "\n")
    (folder / "sbom.cdx.json").write_text(sbom.text(manifest, variant, wanted))


def inspect(name: str) -> tuple[str, int]:
    """(digest, bytes on disk) of an image."""
    done = engine.docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", name, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{name} is not there ({done.stderr.strip()}); `make image` builds it")
    digest, size = done.stdout.split()
    return digest, int(size)
