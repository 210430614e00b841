"""make image: everything fetched and verified first, laid out for BuildKit, then built with the network off."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

from images import debian, engine, lock
from images.store import BuildError, sha256_of, store

HERE = Path(__file__).parent
VARIANTS = ("cpu",)
MANIFEST_KEYS = {"family", "models", "cuda_architectures"}
NEEDED_BYTES = 25_000_000_000  # build cache, image and unpacked image


def families() -> list[str]:
    """The families that have a manifest."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def read_manifest(model: str) -> dict:
    """images/MODEL.toml; BuildError for an unknown model or a wrong key."""
    if model not in families():
        near = difflib.get_close_matches(model, families(), n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise BuildError(f"there is no model {model!r}{hint} (there are: {', '.join(families())})", exit_code=2)
    path = HERE / f"{model}.toml"
    try:
        manifest = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"{path.name}: {error}", exit_code=65) from None
    if odd := sorted(manifest.keys() ^ MANIFEST_KEYS):
        verb = "is missing" if odd[0] in MANIFEST_KEYS else "is no key of a manifest"
        raise BuildError(f"{path.name}: {odd[0]} {verb}; the keys are {', '.join(sorted(MANIFEST_KEYS))}", exit_code=65)
    return manifest


def image(model: str, variant: str) -> None:
    """Build slipway/MODEL:VARIANT and print its digest and size."""
    started = time.monotonic()
    check_variant(variant)
    read_manifest(model)
    engine.require()
    fetch()
    fetched = time.monotonic()
    # Uncompressed, since this engine keeps the image where it was built; `docker push` compresses.
    build(model, variant, f"type=image,name={tag(model, variant)},unpack=true,compression=uncompressed")
    digest, size = inspect(tag(model, variant))
    print(
        f"image: {tag(model, variant)} {digest}, {size / 1e9:.2f} GB, fetched in {fetched - started:.0f} s, "
        f"built in {time.monotonic() - fetched:.0f} s"
    )


def check_variant(variant: str) -> None:
    """BuildError unless the variant is one that is built today."""
    if variant not in VARIANTS:
        raise BuildError(f"VARIANT is {variant!r}; there is {', '.join(VARIANTS)}", exit_code=2)


def tag(model: str, variant: str) -> str:
    """The image's name."""
    return f"slipway/{model}:{variant}"


def fetch() -> None:
    """Bring everything that images are made of into the store."""
    lock.fetch_wheels()
    for name in debian.SETS:
        debian.root_file_system(name)


def build(model: str, variant: str, output: str, *options: str) -> None:
    """Run BuildKit on a fresh staging folder. `output` is buildx's, `options` go to `docker buildx bake`."""
    free = shutil.disk_usage(store()).free
    if free < NEEDED_BYTES:
        raise BuildError(f"{store()}: 25 GB are needed, {free / 1e9:.0f} GB are free; free some space", exit_code=73)
    with tempfile.TemporaryDirectory(dir=store(), prefix="staging-") as scratch:
        staging = Path(scratch)
        stage(staging, model)
        variables = {
            "MODEL": model,
            "VARIANT": variant,
            "STAGING": str(staging),
            "PINS": json.dumps(pins(), sort_keys=True),
            "OUTPUT": output,
            "SOURCE_DATE_EPOCH": "0",
        }
        command = [engine.client(), "buildx", "bake", "--file", str(HERE / "docker-bake.hcl"), *options, "image"]
        done = subprocess.run(command, env={**engine.environment(), **variables}, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError(f"the build of {tag(model, variant)} failed; its last lines stand above", exit_code=1)


def pins() -> dict[str, str]:
    """What identifies the inputs: source commits and the hashes of both locks."""
    sources = tomllib.loads((lock.ROOT / "entrypoints" / "pins.toml").read_text())
    versions = {name: f"{pin['version']} {pin['commit']}" for name, pin in sources.items() if name in BUILT}
    return {**versions, "uv.lock": sha256_of(lock.LOCK), "debian.lock": sha256_of(debian.LOCK)}


BUILT = ("nemo", "megatron-core")


def stage(folder: Path, model: str) -> None:
    """Lay out the build contexts: hard links into the store and the project's own files."""
    for name in ("rootfs", "wheels", "tools"):
        (folder / name).mkdir()
    shutil.copy(HERE / "Dockerfile", folder)
    for name in debian.SETS:
        os.link(debian.root_file_system(name), folder / "rootfs" / f"{name}.tar")
    packages = lock.locked_packages()
    from_source = [p for p in packages if "sdist" in p]
    for package in packages:
        entry = package["sdist"] if package in from_source else package["wheels"][0]
        os.link(store() / "wheelhouse" / entry["path"], folder / "wheels" / entry["path"])
    tools = folder / "tools"
    os.link(lock.uv(), tools / "uv")
    (tools / "runtime.txt").write_text(_requirements(["--no-default-groups"], {p["name"] for p in from_source}))
    (tools / "build.txt").write_text(_requirements(["--only-group", "build"], set()))
    archives = [p["sdist"]["path"] for p in from_source if p["name"] not in lock.BUILT_FROM_SOURCE]
    (tools / "source-only.txt").write_text("".join(f"{archive}\n" for archive in archives))
    shutil.copy(HERE / "import_check.py", tools)
    shutil.copy(HERE / f"{model}.toml", tools / "manifest.toml")
    shutil.copytree(HERE / "root", tools / "image")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(lock.ROOT / "entrypoints", folder / "entrypoints", ignore=ignore)


def _requirements(options: list[str], without: set[str]) -> str:
    """The hash-pinned list that uv makes of the lock, less some packages."""
    left_out = [word for name in sorted(without) for word in ("--no-emit-package", name)]
    words = ["export", "--frozen", "--no-emit-project", "--no-header", "--no-annotate", *options, *left_out]
    done = subprocess.run([lock.uv(), *words], cwd=lock.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"uv export failed:\n{done.stderr.strip()}", exit_code=65)
    return "".join(
        line + "\n" for line in done.stdout.splitlines() if not line.startswith(("--find-links", "--no-index"))
    )


def inspect(name: str) -> tuple[str, int]:
    """(digest, bytes on disk) of an image."""
    done = engine.docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", name, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{name} is not there: {done.stderr.strip()}")
    digest, size = done.stdout.split()
    return digest, int(size)
