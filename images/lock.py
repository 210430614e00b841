"""uv.lock without addresses, and the environment that is installed from it.

`uv lock` resolves against the machine's package index in a scratch folder; what it finds is written into
uv.lock as file names and hashes alone, in the form uv gives to a local folder of wheels. The files
themselves come to wheelhouse/ (a link into the store), where `uv sync --frozen` finds them.
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

from images.store import BuildError, LockedFile, fetch, index_address, store

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"
VENV = ROOT / ".venv"
STAMP = VENV / "slipway-setup.sha256"

# Built from their source archives in the images, installed from wheels on the host.
BUILT_FROM_SOURCE = ("megatron-core", "nemo-toolkit")
NEWEST_GLIBC = (2, 36)  # Debian 12


def version() -> str:
    """Slipway's own, read as text: here the package is not installed."""
    text = (ROOT / "entrypoints" / "slipway" / "__init__.py").read_text()
    return re.findall(r'(?m)^__version__ = "(.+)"$', text)[0]


def pins() -> dict:
    """The [tool.slipway] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["slipway"]


def locked_packages(lock: Path = LOCK) -> list[dict]:
    """The packages of uv.lock but for the project itself."""
    packages = tomllib.loads(lock.read_text())["package"]
    return [package for package in packages if "registry" in package["source"]]


def locked_files(packages: list[dict]) -> list[LockedFile]:
    """Every file that uv.lock names."""
    return [
        LockedFile(package["name"], entry["path"], entry["hash"].removeprefix("sha256:"))
        for package in packages
        for entry in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
    ]


# ---------------------------------------------------------------------------- uv itself


def uv() -> Path:
    """The pinned uv, fetched by hash and unpacked into the store on first use."""
    pin = pins()["uv"]
    binary = store() / "tools" / f"uv-{pin['version']}"
    if not binary.exists():
        fetch([LockedFile("uv", pin["file"], pin["sha256"])], store() / "tools")
        with zipfile.ZipFile(store() / "tools" / pin["file"]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/scripts/uv"))
            with tempfile.NamedTemporaryFile(dir=binary.parent, delete=False) as part:
                part.write(wheel.read(member))
        os.chmod(part.name, 0o755)
        os.replace(part.name, binary)
    return binary


def run_uv(*arguments: str, cwd: Path = ROOT, **variables: str) -> None:
    """Run uv quietly; its own words are shown only when it fails."""
    environment = {**os.environ, "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never", **variables}
    environment.pop("VIRTUAL_ENV", None)
    done = subprocess.run([uv(), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"uv {arguments[0]} failed:\n{done.stderr.strip()}", exit_code=65)


# ---------------------------------------------------------------------------- locking


def wheel_rank(name: str) -> tuple | None:
    """How well a wheel suits CPython 3.11 on x86-64 Linux with Debian 12's C library; None if not at all."""
    python, abi, platforms = name.removesuffix(".whl").rsplit("-", 3)[1:]
    glibc = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_x86_64", platforms)]
    if "manylinux2014_x86_64" in platforms:
        glibc.append((2, 17))
    if (
        "manylinux2010_x86_64" in platforms
        or "manylinux1_x86_64" in platforms
        or "linux_x86_64" in platforms.split(".")
    ):
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
    """The one wheel that suits the target, and the source archive where that is what gets built."""
    ranked = [(wheel_rank(_file_name(entry)), entry) for entry in package.get("wheels", [])]
    suitable = sorted(((rank, _file_name(entry), entry["hash"]) for rank, entry in ranked if rank), reverse=True)
    files: dict = {}
    if "sdist" in package and (not suitable or package["name"] in BUILT_FROM_SOURCE):
        files["sdist"] = (_file_name(package["sdist"]), package["sdist"]["hash"])
    if suitable:
        files["wheel"] = suitable[0][1:]
    if not files:
        raise BuildError(f"{package['name']} {package['version']} has no wheel for the target and no source archive")
    return files


def _file_name(entry: dict) -> str:
    return entry["url"].rpartition("/")[2]


def without_addresses(lock_text: str) -> str:
    """uv's lock file with every address taken out and every file kept by name and hash.

    Works on uv's own layout, line by line, so that everything else (dependencies, markers) stays as uv wrote it.
    """
    packages = {(p["name"], p.get("version")): p for p in tomllib.loads(lock_text)["package"]}
    blocks = re.split(r"(?m)^(?=\[\[package\]\]$)", lock_text)
    return blocks[0] + "".join(_block_without_addresses(block, packages) for block in blocks[1:])


def _block_without_addresses(block: str, packages: dict) -> str:
    name = re.search(r'(?m)^name = "(.+)"$', block).group(1)
    version = re.search(r'(?m)^version = "(.+)"$', block)
    package = packages[name, version.group(1) if version else None]
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
    if "wheel" in files:
        path, digest = files["wheel"]
        lines += f'wheels = [\n    {{ path = "{path}", hash = "{digest}" }},\n]\n'
    # uv puts the files after the plain keys and before the package's own tables.
    head, table, tail = block.partition("\n[package.")
    return head.rstrip("\n") + "\n" + lines + (table.replace("\n[", "\n[") + tail if table else "\n")


def lock() -> None:
    """Resolve anew and write uv.lock; then check that uv accepts it."""
    text = (ROOT / "pyproject.toml").read_text()
    text = re.sub(r"(?m)^(no-index|find-links) = .*\n", "", text)
    text = text.replace("[tool.uv]\n", f'[tool.uv]\nexclude-newer = "{pins()["exclude-newer"]}"\n')
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pyproject.toml").write_text(text)
        package = Path(scratch) / "entrypoints" / "slipway"
        package.mkdir(parents=True)
        shutil.copy(ROOT / "entrypoints" / "slipway" / "__init__.py", package)
        shutil.copy(ROOT / "README.md", scratch)
        run_uv("lock", cwd=Path(scratch), UV_DEFAULT_INDEX=index_address())
        resolved = (Path(scratch) / "uv.lock").read_text()
    resolved = re.sub(r"(?ms)^\[options\]\n.*?(?=^\[)", "", resolved)
    LOCK.write_text(without_addresses(resolved))
    check()


def check() -> None:
    """Fail unless uv.lock is what pyproject.toml asks for and names no address."""
    if "://" in LOCK.read_text():
        raise BuildError("uv.lock names an address; run `make lock`", exit_code=65)
    fetch_wheels()
    run_uv("lock", "--check")


# ---------------------------------------------------------------------------- installing


def requirements(*options: str) -> dict[str, str]:
    """Package → its line, pinned and with hashes, in the list that uv makes of the lock; `options` are uv export's."""
    words = ["export", "--frozen", "--no-emit-project", "--no-header", "--no-annotate", *options]
    done = subprocess.run([uv(), *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"uv export failed:\n{done.stderr.strip()}", exit_code=65)
    blocks = re.findall(r"(?m)^[\w.-]+==.*(?:\n[ ]+.*)*", done.stdout)
    return {block.partition("==")[0]: block + "\n" for block in blocks}


def fetch_wheels(names: Iterable[str] | None = None) -> None:
    """Fill wheelhouse/ with the files that uv.lock has of these packages, or of all."""
    wheelhouse = store() / "wheelhouse"
    wanted = None if names is None else set(names)
    fetch(locked_files([p for p in locked_packages() if wanted is None or p["name"] in wanted]), wheelhouse)
    link = ROOT / "wheelhouse"
    if not link.exists() or link.resolve() != wheelhouse.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(wheelhouse)


def setup() -> None:
    """Make .venv what uv.lock says; does nothing when it is already."""
    made_of = b"".join((ROOT / name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
    state = hashlib.sha256(made_of + sys.version.encode() + str(ROOT).encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == state:
        return
    if sys.version_info[:2] != (3, 11):
        raise BuildError(f"Python 3.11 is needed, this is {sys.version.split()[0]}; try `make PYTHON=python3.11`")
    fetch_wheels(requirements())
    # Compiled once here, or every first import of NeMo takes half a minute.
    run_uv("sync", "--frozen", "--compile-bytecode")
    STAMP.write_text(state)
    print(f"setup: {VENV} is ready", file=sys.stderr)
