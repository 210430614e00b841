"""The store: every file that an installation or an image is made of, kept by name and verified by hash.

Its folder is SLIPWAY_STORE (default ~/.cache/slipway). It can be copied to a site without a network: a file that is in
the store is not fetched again. So nothing in it is believed: each file is compared with a lock before it is used. What
cannot be compared, since this machine unpacked or built it, lies in another folder, which is never copied: local().

No address of a package index is written here. The address is the one that pip is
configured with on this machine, unless UV_DEFAULT_INDEX, UV_INDEX_URL or PIP_INDEX_URL is set.
"""

from __future__ import annotations

import base64
import contextlib
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
from typing import Any

DOWNLOADS_AT_ONCE = 8
CHUNK_BYTES = 1 << 20
TRIES = 3
FREE_SPACE = "free disk space, or set SLIPWAY_STORE to a folder on another disk"


class BuildError(Exception):
    """Something that the user can correct; printed as one line. `exit_code` is what build.py ends with."""

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
    """The folder that keeps everything fetched."""
    return Path(os.environ.get("SLIPWAY_STORE") or Path.home() / ".cache" / "slipway")


def local() -> Path:
    """The folder for what this machine has unpacked or built from the store: it is run as it lies there."""
    return Path(os.environ.get("SLIPWAY_LOCAL") or Path.home() / ".cache" / "slipway-local")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds(path: Path, sha256: str) -> bool:
    """The file has this content. What was found once is not read again: it is noted outside of the store, which others
    may have made, with the times that only the kernel sets."""
    if is_noted(path, sha256):
        return True
    if sha256_of(path) != sha256:
        return False
    with contextlib.suppress(OSError):
        note = _note_of(path, sha256)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    return True


def is_noted(path: Path, sha256: str) -> bool:
    """This machine has found once that the file has this content, and it is as it was then."""
    return _note_of(path, sha256).exists()


def _note_of(path: Path, sha256: str) -> Path:
    about = path.stat()
    state = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    return verified() / hashlib.sha256(f"{path.absolute()} {sha256} {state}".encode()).hexdigest()


def require(path: Path, sha256: str) -> None:
    """BuildError (65) unless a file of the store has the content that a lock names."""
    if not holds(path, sha256):
        raise BuildError(
            f"{path} is not what the lock names: its SHA-256 is not {sha256}; remove it to have it fetched or made "
            "again, and ask whoever filled this store",
            exit_code=65,
        )


def verified() -> Path:
    """The folder with a note for every file whose content was compared with the lock on this machine."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "slipway" / "verified"


def download(url: str, target: Path, sha256: str, what: str) -> None:
    """Fetch `url` to `target`; the file appears there only when it is complete and has the hash `sha256`.

    Errors: BuildError that names `what` if the address cannot be read (78), the hash differs (65) or the disk is
    full (73).
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
                    f"{what}: the downloaded file has SHA-256 {digest.hexdigest()}, expected {sha256} from the lock; "
                    "the index or a proxy serves a different file: ask its owner why before you run `make lock`",
                    exit_code=65,
                )
            part.flush()
            os.chmod(part.name, 0o644)
            os.replace(part.name, target)
        except OSError as error:
            raise BuildError(f"{what}: cannot write ({error}); {FREE_SPACE}", exit_code=73) from None
        finally:
            Path(part.name).unlink(missing_ok=True)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address of http or https. The login goes along to the same host alone."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new, old = urllib.parse.urlsplit(newurl), urllib.parse.urlsplit(req.full_url)
        if new.scheme not in SCHEMES:
            raise urllib.error.URLError(f"the server leads to {new.scheme}:, and only http and https are read")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        login = req.unredirected_hdrs.get("Authorization")
        if request and login and (new.scheme, new.netloc) == (old.scheme, old.netloc):
            request.add_unredirected_header("Authorization", login)
        return request


SCHEMES = ("http", "https")
OPENER = urllib.request.build_opener(_SameHost)


def open_url(url: str, what: str, accept: str = "*/*"):
    """A response to read from; user:password@ in the address becomes an Authorization header.

    A server's fault (5xx) or a lost connection is tried TRIES times.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise BuildError(f"{what}: its address begins with {parts.scheme}:, but only http and https are read")
    netloc = parts.netloc.rpartition("@")[2]
    bare = urllib.parse.urlunsplit(parts._replace(netloc=netloc))
    request = urllib.request.Request(bare, headers={"Accept": accept, "User-Agent": "slipway-build"})
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        # Unredirected: where the server leads elsewhere, nobody else may see it.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    for last in [False] * (TRIES - 1) + [True]:
        try:
            return OPENER.open(request, timeout=60)
        except urllib.error.HTTPError as error:
            if last or error.code < 500:
                raise BuildError(
                    f"{what}: the server answered {error.code} {error.reason}; check the address and the login of the "
                    "package index or mirror"
                ) from None
        except (urllib.error.URLError, TimeoutError) as error:
            if last:
                reason = getattr(error, "reason", error)
                raise BuildError(
                    f"{what}: cannot connect ({reason}); check the network, or copy the store of a machine with a "
                    "network and set SLIPWAY_STORE to the copy"
                ) from None


# ---------------------------------------------------------------------------- the package index


def index_address() -> str:
    """The address of the simple index that this machine's package clients use."""
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
    raise BuildError(
        "no package index is configured on this machine; set UV_DEFAULT_INDEX to its address, or install python3-pip"
    )


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (link := dict(attrs).get("href")):
            self.links.append(link)


def project_files(index: str, project: str) -> dict[str, str]:
    """File name → address, for every file of one project in the index (PEP 503 and PEP 691)."""
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
    """The address with the index's user and password, but only on the index's own host: no other may see them."""
    login, _, host = urllib.parse.urlsplit(index).netloc.rpartition("@")
    parts = urllib.parse.urlsplit(address)
    same = parts.netloc == host and parts.scheme == urllib.parse.urlsplit(index).scheme
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{login}@{host}")) if login and same else address


def fetch(files: Iterable[LockedFile], folder: Path) -> int:
    """Make `folder` hold every one of `files`, verified; returns how many had to be fetched.

    What is there already may have been carried in, so it is compared with the lock too.

    Errors: BuildError (65) for a file with another content than the lock names.
    """
    wanted = list(files)
    missing = [file for file in wanted if not (folder / file.name).exists()]
    there = [file for file in wanted if (folder / file.name).exists()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda file: require(folder / file.name, file.sha256), there))
    if not missing:
        return 0
    index = index_address()

    def bring(file: LockedFile) -> None:
        addresses = project_files(index, file.project)
        if file.name not in addresses:
            raise BuildError(
                f"package {file.project}: the index has no file {file.name}, which the lock names; use an index that "
                "has it, or run `make lock` to choose other files"
            )
        download(addresses[file.name], folder / file.name, file.sha256, file.name)

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        for done, _ in enumerate(pool.map(bring, missing), 1):
            if done % 25 == 0 or done == len(missing):
                print(f"fetch: {done} of {len(missing)} files", file=sys.stderr, flush=True)
    return len(missing)
