"""Licences as packages state them: wheels and source archives in their metadata, Debian in copyright files."""

from __future__ import annotations

import email
import functools
import json
import os
import re
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from images import debian
from images.store import local, sha256_of, store
from images.target import Target

NOT_STATED = "not stated by the package"
LONGEST = 80  # a longer `License` field is the text of a licence, not its name


def of_distribution(file: str) -> dict:
    """CycloneDX's licence entry for a wheel or source archive in the wheelhouse."""
    fields = email.message_from_string(_metadata(store() / "wheelhouse" / file))
    if expression := fields["License-Expression"]:
        return {"expression": expression}
    classified = [name for name in fields.get_all("Classifier", []) if name.startswith("License ::")]
    names = [name.rpartition(" :: ")[2] for name in classified]
    stated = (fields["License"] or "").strip()
    if stated and len(stated) <= LONGEST and "\n" not in stated:
        names = [stated]
    return named(" AND ".join(names) or _title(stated) or NOT_STATED)


def named(name: str) -> dict:
    """The entry for a licence that has a name but no SPDX expression."""
    return {"license": {"name": name}}


def _title(text: str) -> str:
    return next((line.strip()[:LONGEST] for line in text.splitlines() if line.strip()), "")


def _metadata(path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = (
                name for name in archive.namelist() if re.fullmatch(r"[^/]+(\.dist-info/METADATA|/PKG-INFO)", name)
            )
            return archive.read(next(found)).decode()
    with tarfile.open(path) as tar:
        member = next(m for m in tar if re.fullmatch(r"[^/]+/PKG-INFO", m.name))
        return content(tar, member).decode()


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a file in a tar; empty for what is not a file."""
    file = tar.extractfile(member)
    return file.read() if file else b""


@functools.cache
def of_debian(target: Target) -> dict[str, str]:
    """Package → its licences, for every locked package of the set `base`.

    The result is kept on this machine: every image needs it, and reading all packages takes seconds.
    """
    kept = local() / f"licences-{sha256_of(debian.lock_of(target))[:16]}.json"
    if not kept.exists():
        debian.fetch(target)
        locked = {package.name: package for package in debian.read_lock(target) if "base" in package.sets}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = dict(zip(locked, pool.map(_copyright_file, locked.values()), strict=True))
        found = {name: _licences(_follow(name, files)) for name in locked}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".part").write_text(json.dumps(found, indent=1))
        os.replace(kept.with_suffix(".part"), kept)
    return json.loads(kept.read_text())


def _copyright_file(package: debian.Package) -> tuple[str, str]:
    """(text, "") of a package's copyright file, or ("", the package whose documentation it links to)."""
    words = ["dpkg-deb", "--fsys-tarfile", str(store() / "debian" / package.file)]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            place = member.name.removeprefix("./usr/share/doc/")
            if member.issym() and place in (package.name, f"{package.name}/copyright"):
                return "", member.linkname.removesuffix("/copyright").rpartition("/")[2]
            if place == f"{package.name}/copyright":
                return content(tar, member).decode(errors="replace"), ""
    return "", ""


def _follow(name: str, files: dict[str, tuple[str, str]]) -> str:
    """The copyright text of a package, also through a chain of links, which ends even if it is a circle."""
    for _ in files:
        text, link = files.get(name, ("", ""))
        if text or not link:
            return text
        name = link
    return ""


def _licences(copyright_text: str) -> str:
    fields = re.findall(r"(?m)^License:[ \t]*(\S.*)$", copyright_text)
    if fields:
        return ", ".join(dict.fromkeys(field.strip() for field in fields))
    files = re.findall(r"/usr/share/common-licenses/([\w.-]*\w)", copyright_text)
    return ", ".join(dict.fromkeys(files)) or ("see its copyright file" if copyright_text else NOT_STATED)
