"""Debian packages by hash: the lock, the packages themselves, and root file systems made of them.

images/debian.amd64.lock and its sibling for arm64 name every package of two root file systems: `base` (what runs) and
`build` (base and compilers). A line holds the sets, the name, the version, the SHA-256 and the path in the archive.

The lock is resolved against the area main of bookworm, its updates and its security suite. The security archive deletes
the files that it replaces: a file that a mirror no longer has is taken from an archive of dated snapshots, at the date
of the lock.

The mirror is the one that this machine's apt uses, or SLIPWAY_DEBIAN_MIRROR; the security archive is its sibling, or
SLIPWAY_DEBIAN_SECURITY_MIRROR. SLIPWAY_DEBIAN_SNAPSHOT is an archive of snapshots. No address is written anywhere.
"""

from __future__ import annotations

import datetime
import gzip
import itertools
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from images import process
from images.store import DOWNLOADS_AT_ONCE, BuildError, download, holds, is_noted, require, sha256_of, store
from images.target import TARGETS, Target, here

HASHES = Path(__file__).parent / "rootfs.lock"
SUITE = "bookworm"
UPDATES, SECURITY = f"{SUITE}-updates", f"{SUITE}-security"
SECURITY_PATHS = "pool/updates/"  # every path in the security archive begins so, and no other path does
BINFMT = Path("/proc/sys/fs/binfmt_misc")  # where the kernel lists what emulates other processors
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# What each root file system holds, in addition to Debian's essential packages. When Triton runs a kernel for the first
# time, it compiles C code that launches it: this needs gcc and the headers of the C library and of Python.
TRITON = ("gcc", "libc6-dev", "libpython3.11-dev")
# NCCL opens libibverbs when it starts, and that a driver for each adapter. Without them it takes TCP and says nothing.
INFINIBAND = ("libibverbs1", "ibverbs-providers", "librdmacm1")
# What a person expects in an image to build on, or to look into: apt-get and ps.
PEOPLE = ("apt", "procps")
RUNTIME = ("ca-certificates", "libgomp1", "libstdc++6", "netbase", "python3", "python3.11-venv", "tini", "tzdata")
BASE = (*RUNTIME, *TRITON, *INFINIBAND, *PEOPLE)
BUILD = (*BASE, "ccache", "g++", "make", "python3.11-dev")
SETS = {"base": BASE, "build": BUILD}

USERS = "and lines for the user in /etc/subuid and /etc/subgid"
Available = dict[tuple[str, str], dict[str, str]]  # (package, version) → its fields in a suite's list


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


def lock_of(target: Target) -> Path:
    """The file that names a processor's packages."""
    return Path(__file__).parent / f"debian.{target.debian}.lock"


def read_lock(target: Target) -> list[Package]:
    """The locked packages of a processor."""
    rows = [line.split() for line in lock_of(target).read_text().splitlines() if line and not line.startswith("#")]
    return [Package(tuple(sets.split(",")), *rest) for sets, *rest in rows]


def locked_on(target: Target) -> datetime.date:
    """The day on which a processor's packages were locked."""
    (day,) = re.findall(r"(?m)^#.* on (\d{4}-\d\d-\d\d)", lock_of(target).read_text())
    return datetime.date.fromisoformat(day)


def mirror() -> str:
    """The address of a Debian archive, from the environment or from apt; BuildError if neither has one."""
    if address := os.environ.get("SLIPWAY_DEBIAN_MIRROR") or _configured(SUITE):
        return address
    raise BuildError(f"no mirror of Debian {SUITE} is configured on this machine; set SLIPWAY_DEBIAN_MIRROR to one")


def security_mirror() -> str:
    """The address of Debian's security archive: mirrors have it next to the main one."""
    configured = os.environ.get("SLIPWAY_DEBIAN_SECURITY_MIRROR") or _configured(SECURITY)
    return configured or f"{mirror().rstrip('/')}-security"


def suites() -> dict[str, str]:
    """The suites that the lock is resolved against, each with the address of its archive."""
    return {SUITE: mirror(), UPDATES: mirror(), SECURITY: security_mirror()}


def _configured(suite: str) -> str | None:
    """The address of a suite in this machine's apt."""
    try:
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
            capture_output=True,
            text=True,
        ).stdout
    except FileNotFoundError:
        return None
    for line in listed.splitlines():
        address, _, place = line.partition(" ")
        if place == f"{suite} main" and address.startswith("http"):
            return address
    return None


class Apt:
    """apt with a folder of its own, where no package is installed; the machine's own apt is not changed."""

    def __init__(self, folder: Path, suites: dict[str, str], target: Target) -> None:
        """`suites` holds the address of each suite's archive."""
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        lines = [f"deb [signed-by={KEYRING}] {address} {suite} main\n" for suite, address in suites.items()]
        (folder / "sources.list").write_text("".join(lines))
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "APT::Architecture": target.debian,
            "APT::Architectures": target.debian,
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
    """Resolve both sets again for each processor and write the locks."""
    for target in TARGETS.values():
        _lock(target)


def _lock(target: Target) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        apt = Apt(Path(scratch), suites(), target)
        known = _available(apt)
        essential = {name for (name, _), fields in known.items() if fields.get("Essential") == "yes"}
        sets: dict[tuple[str, str], list[str]] = {}
        for name, wanted in SETS.items():
            plan = apt.run("apt-get", "install", "--simulate", *sorted(essential), *wanted)
            # "Inst NAME (VERSION …": the newest version of all suites.
            for package in re.findall(r"(?m)^Inst (\S+) \((\S+) ", plan):
                sets.setdefault(package, []).append(name)
    lines = [f"{','.join(sets[p])} {p[0]} {p[1]} {known[p]['SHA256']} {known[p]['Filename']}" for p in sorted(sets)]
    today = datetime.datetime.now(datetime.UTC).date()
    source = f"main of {SUITE}, {UPDATES} and {SECURITY} on {today}"
    head = f"# set package version sha256 path-in-archive; {source}, made by `build.py lock`\n"
    lock_of(target).write_text(head + "\n".join(lines) + "\n")


def _available(apt: Apt) -> Available:
    """What apt knows of the packages of its suites."""
    return _stanzas(apt.run("apt-cache", "dumpavail"))


def _stanzas(text: str) -> Available:
    tables = [dict(re.findall(r"(?m)^(\S+): (.*)$", stanza)) for stanza in text.split("\n\n")]
    return {(fields["Package"], fields["Version"]): fields for fields in tables if "Package" in fields}


def newer(target: Target, lists: list[Path] | None = None) -> list[str]:
    """A line for each locked package of a processor's images of which the suites have a newer version.

    Args:
        target: the processor.
        lists: files Packages of suites (also .gz or .xz), carried from elsewhere; else the mirror is asked.
    """
    known = _carried(lists) if lists else _of_mirror(target)
    versions: dict[str, set[str]] = {}
    for name, version in known:
        versions.setdefault(name, set()).add(version)
    lines = []
    for package in read_lock(target):
        newest = package.version
        for version in versions.get(package.name, ()):
            if subprocess.run(["dpkg", "--compare-versions", version, "gt", newest]).returncode == 0:
                newest = version
        if "base" in package.sets and newest != package.version:
            suite = "security" if known[package.name, newest]["Filename"].startswith(SECURITY_PATHS) else "a release"
            lines.append(f"{package.name} {package.version}: {newest} is in {suite}")
    return lines


def _of_mirror(target: Target) -> Available:
    with tempfile.TemporaryDirectory() as scratch:
        return _available(Apt(Path(scratch), suites(), target))


def _carried(lists: list[Path]) -> Available:
    opened = {".gz": gzip.open, ".xz": lzma.open}
    found: Available = {}
    for path in lists:
        try:
            with opened.get(path.suffix, open)(path, "rt") as file:  # type: ignore[operator]
                found |= _stanzas(file.read())
        except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
            raise BuildError(f"{path}: cannot read it as a list of packages ({error})", exit_code=65) from None
    if not found:
        raise BuildError(f"{lists[0]}: no package in it; expected a file Packages of a Debian suite", exit_code=65)
    return found


def fetch(target: Target) -> Path:
    """Fetch every locked package of a processor into the store; returns the folder."""
    folder = store() / "debian"
    wanted = read_lock(target)
    missing = [package for package in wanted if not (folder / package.file).exists()]
    with ThreadPoolExecutor() as pool:  # what is there may have been carried in
        there = [package for package in wanted if package not in missing]
        list(pool.map(lambda package: require(folder / package.file, package.sha256), there))
    if missing:
        archives = {False: mirror().rstrip("/"), True: security_mirror().rstrip("/")}

        def bring(package: Package) -> None:
            address = archives[package.path.startswith(SECURITY_PATHS)]
            what = f"Debian package {package.name} {package.version}"
            try:
                download(f"{address}/{package.path}", folder / package.file, package.sha256, what)
            except BuildError as error:
                if error.exit_code != 78:
                    raise
                _from_snapshot(package, folder / package.file, locked_on(target), error)

        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            list(pool.map(bring, missing))
    return folder


def _from_snapshot(package: Package, target: Path, day: datetime.date, error: BuildError) -> None:
    """Take a package that the mirror no longer has from an archive of snapshots; BuildError if there is none."""
    archive = os.environ.get("SLIPWAY_DEBIAN_SNAPSHOT")
    if not archive:
        raise BuildError(
            f"{error}; if the mirror has newer packages, set SLIPWAY_DEBIAN_SNAPSHOT to an archive of Debian's dated "
            f"snapshots (the lock is of {day}), or run `make lock`"
        ) from None
    # The last state of the day: a lock was made at some time of it.
    name = "debian-security" if package.path.startswith(SECURITY_PATHS) else "debian"
    address = f"{archive.rstrip('/')}/{name}/{day:%Y%m%d}T235959Z/{package.path}"
    download(address, target, package.sha256, f"Debian package {package.name} {package.version}, snapshot of {day}")


def root_file_system(name: str, target: Target) -> Path:
    """The tar of a root file system ("base" or "build"); made once for each state of the lock and kept in the store.

    SLIPWAY_ROOTFS names a folder with base.tar and build.tar that another machine made. They are taken if they have the
    hashes in images/rootfs.lock, so where they come from does not matter.
    """
    tar = store() / "rootfs" / f"{name}-{sha256_of(lock_of(target))[:16]}.tar"
    made = tar.with_suffix(".made")
    expected = hashes(target)[name]
    if tar.exists():
        # Of other bytes than the lock names it is used only where this machine made it, which is noted elsewhere.
        require(tar, made.read_text().strip() if made.exists() and _was_made_here(made) else expected)
    else:
        tar.parent.mkdir(parents=True, exist_ok=True)
        if ready := os.environ.get("SLIPWAY_ROOTFS"):
            _take(Path(ready) / f"{name}.tar", expected, tar)
        else:
            make_root_file_system(name, tar, target)
            if (digest := sha256_of(tar)) != expected:
                print(
                    f"root file system {name}: SHA-256 {digest}, images/rootfs.lock has {expected}: "
                    "this machine's dpkg or mmdebstrap makes other bytes, and so another digest of the image",
                    file=sys.stderr,
                )
                made.write_text(digest)
                holds(made, sha256_of(made))
    return tar


def _was_made_here(note: Path) -> bool:
    """This machine wrote the note: it was noted outside of the store, which is never carried."""
    return is_noted(note, sha256_of(note))


def hashes(target: Target) -> dict[str, str]:
    """Root file system → its SHA-256, from images/rootfs.lock."""
    rows = [line.split() for line in HASHES.read_text().splitlines()]
    return {name: digest for machine, name, digest in rows if machine == target.debian}


def _take(ready: Path, expected: str, tar: Path) -> None:
    """Copy a root file system that is ready; it appears only if it has the hash in the lock."""
    if not ready.is_file():
        raise BuildError(f"SLIPWAY_ROOTFS: {ready} not found; expected base.tar and build.tar there", exit_code=65)
    part = tar.with_suffix(f".{os.getpid()}")
    shutil.copyfile(ready, part)
    digest = sha256_of(part)
    if digest != expected:
        part.unlink()
        raise BuildError(
            f"{ready} has SHA-256 {digest}, expected {expected} from images/rootfs.lock; make it from the same lock of "
            "Debian packages, with `build.py fetch` on Debian",
            exit_code=65,
        )
    os.replace(part, tar)


def lock_hashes() -> None:
    """Make the root file systems of new locks and write images/rootfs.lock."""
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for target, name in itertools.product(TARGETS.values(), SETS):
            made = Path(scratch) / "made.tar"
            make_root_file_system(name, made, target)
            lines.append(f"{target.debian} {name} {sha256_of(made)}\n")
    HASHES.write_text("".join(lines))


def make_root_file_system(name: str, tar: Path, target: Target) -> None:
    """Make a root file system of its locked packages, always the same bytes; `tar` appears when it is complete."""
    require_emulator(target)
    debs = fetch(target)
    packages = [package for package in read_lock(target) if name in package.sets]
    # In /tmp: without root, mmdebstrap unpacks as another user ID, which may not look into a home.
    with tempfile.TemporaryDirectory(prefix="slipway-rootfs-") as scratch:
        Path(scratch).chmod(0o755)
        archive = Path(scratch) / "archive"
        archive.mkdir()
        # mmdebstrap takes packages from an archive: this one holds the locked packages only, so it cannot take others.
        for package in packages:
            shutil.copyfile(debs / package.file, archive / package.file)
        (archive / "Packages").write_text("\n".join(_stanza(package, archive) for package in packages))
        part = Path(scratch) / "root.tar"
        _mmdebstrap(archive, [package.name for package in packages], part, target)
        beside = tar.with_suffix(f".{os.getpid()}")
        shutil.move(part, beside)
        os.replace(beside, tar)


def require_emulator(target: Target) -> None:
    """BuildError unless this machine runs programs of a processor: its own, or one that is emulated here."""
    if target == here() or (BINFMT / f"qemu-{target.machine}").exists():
        return
    raise BuildError(
        f"this machine is {here().machine} and cannot run programs of {target.machine}; install an emulator (Debian, "
        "Ubuntu: qemu-user-static and arch-test), or build on a machine with that processor"
    )


def _stanza(package: Package, archive: Path) -> str:
    """The package's entry in the archive's index; apt checks the package against the locked hash that stands there."""
    file = archive / package.file
    control = subprocess.run(["dpkg-deb", "--field", file], capture_output=True, text=True, check=True).stdout
    return f"{control}Filename: ./{package.file}\nSize: {file.stat().st_size}\nSHA256: {package.sha256}\n"


def _mmdebstrap(archive: Path, names: list[str], tar: Path, target: Target) -> None:
    command = [
        "mmdebstrap",
        # Without root: in a user namespace, where the user has one (newuidmap, and a line in /etc/subuid).
        f"--mode={'root' if os.getuid() == 0 else 'unshare'}",
        "--variant=custom",
        f"--architectures={target.debian}",
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
        "--dpkgopt=path-exclude=/usr/lib/*-linux-gnu/libc.a",
        "--dpkgopt=path-exclude=/usr/lib/*-linux-gnu/libm-*.a",
        "--dpkgopt=path-exclude=/usr/lib/*-linux-gnu/libmvec.a",
        "--dpkgopt=path-exclude=/usr/lib/*-linux-gnu/libpython3.11*.a",
        '--customize-hook=rm -rf "$1"/var/log/* "$1"/var/cache/* "$1"/etc/apt/sources.list',
        # No program in an image needs to run as another user than its own.
        '--customize-hook=find "$1" -xdev -perm /6000 -type f -exec chmod ug-s {} +',
        "",
        str(tar),
        f"deb [trusted=yes] copy:{archive} ./",
    ]
    try:
        done = process.run(command, capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": "0"})
    except FileNotFoundError:
        raise BuildError(
            "mmdebstrap not found; install it (Debian, Ubuntu), or make base.tar and build.tar on a machine that has "
            "it and set SLIPWAY_ROOTFS to their folder"
        ) from None
    if done.returncode:
        cure = "" if os.getuid() == 0 else f"; without root it needs the package uidmap, {USERS}"
        raise BuildError(f"mmdebstrap failed{cure}:\n{done.stderr.strip()}", exit_code=1)
