"""Debian packages by hash: the lock, the packages themselves, and root file systems made of them.

images/debian.lock names every package of two root file systems: `base` (what runs) and `build` (base and compilers).
A line holds the sets, the name, the version, the SHA-256 and the path in the archive.

The lock is resolved against the suite bookworm and its area main only. That suite no longer changes, so a locked file
stays on every mirror; the security suite deletes the files that it replaces.

The mirror is the one that this machine's apt uses, or SLIPWAY_DEBIAN_MIRROR. Its address is not written anywhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from images import process
from images.store import DOWNLOADS_AT_ONCE, BuildError, download, sha256_of, store

LOCK = Path(__file__).parent / "debian.lock"
SUITE = "bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# What each root file system holds, in addition to Debian's essential packages. When Triton runs a kernel for the first
# time, it compiles C code that launches it: this needs gcc and the headers of the C library and of Python.
TRITON = ("gcc", "libc6-dev", "libpython3.11-dev")
BASE = ("ca-certificates", "libgomp1", "libstdc++6", "netbase", "python3", "python3.11-venv", "tini", "tzdata", *TRITON)
BUILD = (*BASE, "ccache", "g++", "make", "python3.11-dev")
SETS = {"base": BASE, "build": BUILD}


@dataclass(frozen=True)
class Package:
    """One locked package; `sets` are the root file systems it belongs to."""

    sets: tuple[str, ...]
    name: str
    version: str
    sha256: str
    path: str

    @property
    def file(self) -> str:
        return urllib.parse.unquote(self.path.rpartition("/")[2])


def read_lock() -> list[Package]:
    """The packages of images/debian.lock."""
    rows = [line.split() for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return [Package(tuple(sets.split(",")), *rest) for sets, *rest in rows]


def mirror() -> str:
    """The address of a Debian archive, from the environment or from apt; BuildError if neither has one."""
    if address := os.environ.get("SLIPWAY_DEBIAN_MIRROR"):
        return address
    try:
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
            capture_output=True,
            text=True,
        ).stdout
    except FileNotFoundError:
        listed = ""
    for line in listed.splitlines():
        address, _, place = line.partition(" ")
        if place == f"{SUITE} main" and address.startswith("http"):
            return address
    raise BuildError(f"no mirror of Debian {SUITE} is configured on this machine; set SLIPWAY_DEBIAN_MIRROR to one")


class Apt:
    """apt with a folder of its own, where no package is installed; the machine's own apt is not changed."""

    def __init__(self, folder: Path, suite: str) -> None:
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
        }
        self.options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        self.folder = folder
        self.run("apt-get", "update")

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """Run one apt command and return what it prints; BuildError with apt's own words if it fails."""
        try:
            done = subprocess.run([words[0], *self.options, *words[1:]], capture_output=True, text=True, cwd=cwd)
        except FileNotFoundError:
            raise BuildError("apt-get not found; run this step on Debian or Ubuntu") from None
        if done.returncode:
            raise BuildError(f"{' '.join(words[:2])} failed: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout


def lock() -> None:
    """Resolve both sets again and write images/debian.lock."""
    with tempfile.TemporaryDirectory() as scratch:
        apt = Apt(Path(scratch), SUITE)
        known = _available(apt)
        essential = [name for name, fields in known.items() if fields.get("Essential") == "yes"]
        sets: dict[str, list[str]] = {}
        for name, wanted in SETS.items():
            plan = apt.run("apt-get", "install", "--simulate", *essential, *wanted)
            for package in re.findall(r"(?m)^Inst (\S+) ", plan):
                sets.setdefault(package, []).append(name)
    lines = [
        f"{','.join(sets[p])} {p} {known[p]['Version']} {known[p]['SHA256']} {known[p]['Filename']}"
        for p in sorted(sets)
    ]
    head = f"# set package version sha256 path-in-archive; {SUITE} main, made by `build.py lock`\n"
    LOCK.write_text(head + "\n".join(lines) + "\n")


def _available(apt: Apt) -> dict[str, dict[str, str]]:
    """Package → its fields, for every package of the archive."""
    stanzas = apt.run("apt-cache", "dumpavail").split("\n\n")
    tables = [dict(re.findall(r"(?m)^(\S+): (.*)$", stanza)) for stanza in stanzas]
    return {fields["Package"]: fields for fields in tables if "Package" in fields}


def fetch() -> Path:
    """Fetch every locked package into the store; returns the folder."""
    folder = store() / "debian"
    missing = [package for package in read_lock() if not (folder / package.file).exists()]
    if missing:
        address = mirror().rstrip("/")

        def bring(package: Package) -> None:
            what = f"Debian package {package.name} {package.version}"
            download(f"{address}/{package.path}", folder / package.file, package.sha256, what)

        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            list(pool.map(bring, missing))
    return folder


def root_file_system(name: str) -> Path:
    """The tar of a root file system ("base" or "build"); made once for each state of the lock and kept in the store."""
    target = store() / "rootfs" / f"{name}-{sha256_of(LOCK)[:16]}.tar"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        make_root_file_system(name, target)
    return target


def make_root_file_system(name: str, target: Path) -> None:
    """Make a root file system of its locked packages, always the same bytes; `target` appears when it is complete."""
    debs = fetch()
    packages = [package for package in read_lock() if name in package.sets]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = Path(scratch) / "archive"
        archive.mkdir()
        # mmdebstrap takes packages from an archive: this one holds the locked packages only, so it cannot take others.
        for package in packages:
            os.link(debs / package.file, archive / package.file)
        (archive / "Packages").write_text("\n".join(_stanza(package, archive) for package in packages))
        part = Path(scratch) / "root.tar"
        _mmdebstrap(archive, [package.name for package in packages], part)
        os.replace(part, target)


def _stanza(package: Package, archive: Path) -> str:
    """The package's entry in the archive's index; apt checks the package against the locked hash that stands there."""
    file = archive / package.file
    control = subprocess.run(["dpkg-deb", "--field", file], capture_output=True, text=True, check=True).stdout
    return f"{control}Filename: ./{package.file}\nSize: {file.stat().st_size}\nSHA256: {package.sha256}\n"


def _mmdebstrap(archive: Path, names: list[str], target: Path) -> None:
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=custom",
        "--architectures=amd64",
        f"--include={','.join(names)}",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/info/*",
        # Nothing here compiles with a link-time optimiser, with sanitisers or against a static C library.
        "--dpkgopt=path-exclude=/usr/lib/gcc/*/lto*",
        "--dpkgopt=path-exclude=/usr/bin/*-lto-dump*",
        "--dpkgopt=path-exclude=/usr/lib/*/lib[alt]san.so*",
        "--dpkgopt=path-exclude=/usr/lib/*/libubsan.so*",
        "--dpkgopt=path-exclude=/usr/lib/gcc/*/lib*san*",
        "--dpkgopt=path-exclude=/usr/lib/python3.11/config-*/*.a",
        "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libc.a",
        "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libm-*.a",
        "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libmvec.a",
        "--dpkgopt=path-exclude=/usr/lib/x86_64-linux-gnu/libpython3.11*.a",
        '--customize-hook=rm -rf "$1"/var/log/* "$1"/var/cache/* "$1"/etc/apt/sources.list',
        # No program in an image needs to run as another user than its own.
        '--customize-hook=find "$1" -xdev -perm /6000 -type f -exec chmod ug-s {} +',
        "",
        str(target),
        f"deb [trusted=yes] copy:{archive} ./",
    ]
    try:
        done = process.run(command, capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": "0"})
    except FileNotFoundError:
        raise BuildError("mmdebstrap not found; run `make engine` to install it (Debian, as root)") from None
    if done.returncode:
        raise BuildError(f"mmdebstrap failed:\n{done.stderr.strip()}", exit_code=1)
