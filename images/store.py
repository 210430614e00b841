"""The store: every file that an installation or an image is made of, kept by name and verified by hash.

It lies in SLIPWAY_STORE (default ~/.cache/slipway) and can be carried to a site without a network: whatever
is in it already is never asked for again. Nothing here knows the address of a package index: it is the one
that pip is configured with on this machine (UV_DEFAULT_INDEX and PIP_INDEX_URL go first).
"""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DOWNLOADS_AT_ONCE = 8
CHUNK_BYTES = 1 << 20
TRIES = 3


class BuildError(Exception):
    """Something the user can cure; printed as one line. `exit_code` is one of DESIGN.md's."""

    def __init__(self, message: str, exit_code: int = 78) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class LockedFile:
    """One file of the package index: the project it belongs to, its file name and its SHA-256 in hex."""

    project: str
    name: str
    sha256: str


def store() -> Path:
    """The folder where everything fetched is kept."""
    return Path(os.environ.get("SLIPWAY_STORE") or Path.home() / ".cache" / "slipway")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, target: Path, sha256: str, what: str) -> None:
    """Bring `url` to `target`; the file appears there only whole and with the hash `sha256`.

    Errors: BuildError that names `what` when the address cannot be read or the hash differs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
        try:
            with open_url(url, what) as response:
                while chunk := response.read(CHUNK_BYTES):
                    digest.update(chunk)
                    part.write(chunk)
            if digest.hexdigest() != sha256:
                raise BuildError(
                    f"{what}: the file offered has SHA-256 {digest.hexdigest()}, locked is {sha256}; "
                    "the index or a proxy serves another file: compare with its owner before locking anew",
                    exit_code=65,
                )
            part.flush()
            os.chmod(part.name, 0o644)
            os.replace(part.name, target)
        except OSError as error:
            raise BuildError(f"{what}: {error}; free some space or set SLIPWAY_STORE", exit_code=73) from None
        finally:
            Path(part.name).unlink(missing_ok=True)


def open_url(url: str, what: str, accept: str = "*/*"):
    """A response to read from; user:password@ in the address becomes an Authorization header."""
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": accept, "User-Agent": "slipway-build"}
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    for last in [False] * (TRIES - 1) + [True]:
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
        except urllib.error.HTTPError as error:
            if last or error.code < 500:
                raise BuildError(f"{what}: the server answered {error.code} {error.reason}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            if last:
                reason = getattr(error, "reason", error)
                raise BuildError(
                    f"{what}: cannot be reached ({reason}); check the network, or carry the store of a machine "
                    "that has one and set SLIPWAY_STORE"
                ) from None


# ---------------------------------------------------------------------------- the package index


def index_address() -> str:
    """The simple index that this machine's package clients use."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if os.environ.get(variable):
            return os.environ[variable]
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    if configured.returncode == 0 and configured.stdout.strip():
        return configured.stdout.strip()
    default = subprocess.run(
        [sys.executable, "-c", "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"],
        capture_output=True,
        text=True,
    )
    if default.returncode == 0:
        return default.stdout.strip()
    raise BuildError("no package index is known on this machine: set UV_DEFAULT_INDEX, or install python3-pip")


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (link := dict(attrs).get("href")):
            self.links.append(link)


def project_files(index: str, project: str) -> dict[str, str]:
    """File name → address of everything the index offers for one project (PEP 503 and PEP 691)."""
    name = re.sub(r"[-_.]+", "-", project).lower()
    page = f"{index.rstrip('/')}/{name}/"
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
    with open_url(page, f"package {project}", accept) as response:
        body, kind, base = response.read(), response.headers.get_content_type(), response.geturl()
    if kind.endswith("json"):
        links = [entry["url"] for entry in json.loads(body)["files"]]
    else:
        anchors = _Anchors()
        anchors.feed(body.decode())
        links = anchors.links
    addresses = (_with_login(urllib.parse.urljoin(base, link).partition("#")[0], index) for link in links)
    return {urllib.parse.unquote(address.rpartition("/")[2]): address for address in addresses}


def _with_login(address: str, index: str) -> str:
    """The index's user and password go with the addresses that it gives on its own host, and nowhere else."""
    login, _, host = urllib.parse.urlsplit(index).netloc.rpartition("@")
    parts = urllib.parse.urlsplit(address)
    return (
        urllib.parse.urlunsplit(parts._replace(netloc=f"{login}@{host}")) if login and parts.netloc == host else address
    )


def fetch(files: Iterable[LockedFile], folder: Path) -> int:
    """Make `folder` hold every one of `files`, verified; returns how many had to be fetched.

    A file that lies there already was verified when it came and is not read again.
    """
    missing = [file for file in files if not (folder / file.name).exists()]
    if not missing:
        return 0
    index = index_address()

    def bring(file: LockedFile) -> None:
        addresses = project_files(index, file.project)
        if file.name not in addresses:
            raise BuildError(f"package {file.project}: the index has no file {file.name}; run `make lock`")
        download(addresses[file.name], folder / file.name, file.sha256, file.name)

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        for done, _ in enumerate(pool.map(bring, missing), 1):
            if done % 25 == 0 or done == len(missing):
                print(f"fetch: {done} of {len(missing)} files", file=sys.stderr, flush=True)
    return len(missing)
