"""uv, and uv.lock without addresses.

`uv lock` resolves against this machine's package index, in a scratch folder. What it finds is written into uv.lock as
file names and hashes only, in the form that uv uses for a local folder of wheels: wheelhouse/, a link into the store.
So the lock works behind any mirror, and a user of this repository needs no particular index.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from images.store import BuildError, LockedFile, fetch, index_address, local, sha256_of, store
from images.target import TARGETS, Target, here

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"

# Images build these from their source archives; `make setup` installs their wheels.
BUILT_FROM_SOURCE = ("megatron-core", "nemo-toolkit")
NEWEST_GLIBC = (2, 36)  # Debian 12


def version() -> str:
    """Slipway's version, read as text: this code runs before the package is installed."""
    text = (ROOT / "entrypoints" / "slipway" / "__init__.py").read_text()
    return re.findall(r'(?m)^__version__ = "(.+)"$', text)[0]


def pins() -> dict:
    """The [tool.slipway] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["slipway"]


def locked_packages(lock: Path = LOCK) -> list[dict]:
    """The packages of uv.lock, without the project itself."""
    packages = tomllib.loads(lock.read_text())["package"]
    return [package for package in packages if "registry" in package["source"]]


def wheel_of(package: dict, target: Target) -> dict | None:
    """The wheel of a locked package for a processor, its path and hash; None where it is built from its archive."""
    found = [entry for entry in package.get("wheels", []) if wheel_rank(entry["path"], target)]
    return found[0] if found else None


def is_built(package: dict, target: Target) -> bool:
    """Images build this package from its source archive."""
    return "sdist" in package and (package["name"] in BUILT_FROM_SOURCE or not wheel_of(package, target))


def locked_files(packages: list[dict], target: Target) -> list[LockedFile]:
    """The files that uv.lock names for these packages and this processor."""
    found = []
    for package in packages:
        wheel = wheel_of(package, target)
        archive = package["sdist"] if is_built(package, target) else None
        found += [(package["name"], entry) for entry in (wheel, archive) if entry]
    return [LockedFile(name, entry["path"], entry["hash"].removeprefix("sha256:")) for name, entry in found]


# ---------------------------------------------------------------------------- uv itself


def uv_file(target: Target) -> LockedFile:
    """The wheel of the pinned uv for a processor."""
    pin = pins()["uv"][target.machine]
    return LockedFile("uv", pin["file"], pin["sha256"])


def uv(target: Target | None = None) -> Path:
    """The pinned uv for a processor, this machine's unless said, fetched by hash and unpacked into the store."""
    target = target or here()
    file = uv_file(target)
    binary = store() / "tools" / f"uv-{pins()['uv']['version']}-{target.machine}"
    fetch([file], store() / "tools")
    with zipfile.ZipFile(store() / "tools" / file.name) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith("/scripts/uv"))
        content = wheel.read(member)
    # Each time: a store that was carried in may hold another program under this name.
    if not binary.is_file() or sha256_of(binary) != hashlib.sha256(content).hexdigest():
        with tempfile.NamedTemporaryFile(dir=binary.parent, delete=False) as part:
            part.write(content)
        os.chmod(part.name, 0o755)
        os.replace(part.name, binary)
    return binary


def uv_cache() -> Path:
    """Where uv keeps unpacked wheels: one copy for all clones. Not in the store, since uv believes what it finds."""
    return Path(os.environ.get("UV_CACHE_DIR") or local() / "uv")


def run_uv(*arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run uv and return what it prints; BuildError with uv's own words if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    environment |= {"UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never", "UV_CACHE_DIR": str(uv_cache())}
    words = [str(uv()), *arguments]
    done = subprocess.run(words, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"uv {arguments[0]} failed:\n{done.stderr.strip()}", exit_code=65)
    return done.stdout


# ---------------------------------------------------------------------------- locking


def wheel_rank(name: str, target: Target) -> tuple | None:
    """How well a wheel fits CPython 3.11 on Linux with Debian 12's C library; None if it does not fit."""
    python, abi, platforms = name.removesuffix(".whl").rsplit("-", 3)[1:]
    machine = target.machine
    glibc = [(int(major), int(minor)) for major, minor in re.findall(rf"manylinux_(\d+)_(\d+)_{machine}", platforms)]
    if f"manylinux2014_{machine}" in platforms:
        glibc.append((2, 17))
    oldest = (f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}")
    if any(name in platforms.split(".") for name in oldest):
        glibc.append((2, 5))
    if platforms != "any" and not glibc:
        return None
    if glibc and min(glibc) > NEWEST_GLIBC:
        return None
    tags = python.split(".")
    if "cp311" in tags and abi in ("cp311", "abi3", "none"):
        fit = 3
    elif abi == "abi3" and any(re.fullmatch(r"cp3(\d|10)", tag) for tag in tags):
        fit = 2
    elif abi == "none" and {"py3", "py311"} & set(tags):
        fit = 1
    else:
        return None
    return (fit, min(glibc, default=(0, 0)))


def files_to_lock(package: dict) -> dict:
    """The wheel that fits best for each processor, and the source archive if one has none or images build from source.

    Errors: BuildError for a package with nothing to install. One that only one processor needs may have that one's.
    """
    best = [_best_wheel(package, target) for target in TARGETS.values()]
    files: dict = {"wheels": list(dict.fromkeys(wheel for wheel in best if wheel))}
    if "sdist" in package and (None in best or package["name"] in BUILT_FROM_SOURCE):
        files["sdist"] = (_file_name(package["sdist"]), package["sdist"]["hash"])
    elif not files["wheels"]:
        raise BuildError(
            f"{package['name']} {package['version']} has no wheel for CPython 3.11 on Linux and no source archive; "
            "choose another version in pyproject.toml"
        )
    return files


def _best_wheel(package: dict, target: Target) -> tuple[str, str] | None:
    """(file name, hash) of the wheel that fits a processor best."""
    ranked = [(wheel_rank(_file_name(entry), target), entry) for entry in package.get("wheels", [])]
    suitable = [(rank, _file_name(entry), entry["hash"]) for rank, entry in ranked if rank]
    return max(suitable)[1:] if suitable else None


def _file_name(entry: dict) -> str:
    return entry["url"].rpartition("/")[2]


def without_addresses(lock_text: str) -> str:
    """uv's lock file without addresses: each file is named by its name and hash.

    The text is changed line by line and not written from a parsed table, so that all else stays as uv wrote it.
    """
    packages = {(p["name"], p.get("version")): p for p in tomllib.loads(lock_text)["package"]}
    blocks = re.split(r"(?m)^(?=\[\[package\]\]$)", lock_text)
    return blocks[0] + "".join(_block_without_addresses(block, packages) for block in blocks[1:])


def _block_without_addresses(block: str, packages: dict) -> str:
    (name,) = re.findall(r'(?m)^name = "(.+)"$', block)
    versions = re.findall(r'(?m)^version = "(.+)"$', block)
    package = packages[name, versions[0] if versions else None]
    if "registry" not in package["source"]:
        return block
    block = re.sub(r"(?m)^source = \{ registry = .*\}$", 'source = { registry = "wheelhouse" }', block)
    block = re.sub(r"(?m)^sdist = .*\n", "", block)
    block = re.sub(r"(?ms)^wheels = \[.*?^\]\n", "", block)
    files = files_to_lock(package)
    lines = ""
    if "sdist" in files:
        path, digest = files["sdist"]
        lines += f'sdist = {{ path = "{path}", hash = "{digest}" }}\n'
    if files["wheels"]:
        wheels = "".join(f'    {{ path = "{path}", hash = "{digest}" }},\n' for path, digest in files["wheels"])
        lines += f"wheels = [\n{wheels}]\n"
    # uv puts the files after the plain keys and before the package's own tables.
    head, table, tail = block.partition("\n[package.")
    return head.rstrip("\n") + "\n" + lines + (table.replace("\n[", "\n[") + tail if table else "\n")


def lock() -> None:
    """Resolve the dependencies again and write uv.lock; then check that uv accepts it."""
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(r"(?m)^(no-index|find-links) = .*\n", "", text)
    of_packages = ", ".join(f'{name} = "{day}"' for name, day in pins()["exclude-newer-package"].items())
    newest = f'exclude-newer = "{pins()["exclude-newer"]}"\nexclude-newer-package = {{ {of_packages} }}\n'
    text = text.replace("[tool.uv]\n", f"[tool.uv]\n{newest}")
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pyproject.toml").write_text(text)
        package = Path(scratch) / "entrypoints" / "slipway"
        package.mkdir(parents=True)
        shutil.copy(ROOT / "entrypoints" / "slipway" / "__init__.py", package)
        shutil.copy(ROOT / "README.md", scratch)
        run_uv("lock", cwd=Path(scratch), UV_DEFAULT_INDEX=index_address())
        resolved = (Path(scratch) / "uv.lock").read_text()
    resolved = re.sub(r"(?ms)^\[options\]\n.*?(?=^\[(?!options))", "", resolved)
    LOCK.write_text(without_addresses(resolved))
    check()


def check() -> None:
    """BuildError unless uv.lock fits pyproject.toml and names no address."""
    if "://" in LOCK.read_text():
        raise BuildError("uv.lock contains an address, expected only file names; run `make lock`", exit_code=65)
    fetch_wheels()
    run_uv("lock", "--check")


# ---------------------------------------------------------------------------- what the lock names


def requirements(*options: str, target: Target | None = None) -> dict[str, str]:
    """Package → its requirement, pinned and with hashes, as `uv export` writes it.

    Args:
        options: those of uv export.
        target: leave out what this processor does not need; None: this machine's.
    """
    target = target or here()
    listed = run_uv("export", "--frozen", "--no-emit-project", "--no-header", "--no-annotate", *options)
    blocks = re.findall(r"(?m)^[\w.-]+==.*(?:\n[ ]+.*)*", listed)
    others = [other.marker for other in TARGETS.values() if other != target]
    needed = [b for b in blocks if target.marker in b or not any(marker in b for marker in others)]
    return {block.partition("==")[0]: block + "\n" for block in needed}


def fetch_wheels(names: Iterable[str] | None = None, target: Target | None = None) -> None:
    """Fill wheelhouse/ with the files that uv.lock names for these packages, or for all, on a processor."""
    wheelhouse = store() / "wheelhouse"
    wanted = None if names is None else set(names)
    chosen = [package for package in locked_packages() if wanted is None or package["name"] in wanted]
    fetch(locked_files(chosen, target or here()), wheelhouse)
    link = ROOT / "wheelhouse"
    if not link.exists() or link.resolve() != wheelhouse.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(wheelhouse)
