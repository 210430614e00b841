"""The secret by which the nodes of a run know each other: a file that only the run's user can read.

Node 0 makes it in the folder that the nodes share, for one start; once all nodes are there it is removed. Where nothing
is shared, a person gives every node a file with the same content.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from slipway.errors import PreflightError, UsageError

NAME = ".slipway-run-token"
SHORTEST, LONGEST = 16, 4096  # bytes of a file that a person gives


@dataclass(frozen=True)
class Token:
    """Where the secret is.

    Args:
        folder: the folder that the nodes share; None where there is none.
        given: a file that a person made.
    """

    folder: Path | None = None
    given: Path | None = None

    @classmethod
    def of(cls, folder: Path | None, given: str | None) -> Token:
        """UsageError for a file that others can read too, or that is too short for a secret."""
        token = cls(folder, Path(given) if given else None)
        if token.given:
            token.read()
        return token

    @property
    def place(self) -> str:
        """Where it is looked for, in words."""
        return str(self.given or (self.folder / NAME if self.folder else "nowhere"))

    def make(self) -> bytes:
        """On node 0: a new secret, or the one that is given."""
        if self.given or self.folder is None:
            return self.read() or b""
        secret = secrets.token_hex(32).encode()
        # A name of its own, then renamed: nobody reads a part of it, and a link of that name is replaced, not followed.
        part = self.folder / f"{NAME}.{secrets.token_hex(8)}"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret)
                file.flush()
                os.fsync(descriptor)
            os.replace(part, self.folder / NAME)
        except OSError as error:
            raise PreflightError(
                f"{self.folder} cannot be written ({error.strerror}), and the nodes find each other by a file in it; "
                "choose another --out, or give --run-token-file"
            ) from None
        return secret

    def read(self) -> bytes | None:
        """The secret; None where it is not there yet, or is not this user's.

        Errors: UsageError for a file that a person gave.
        """
        if self.given:
            return self._read_given(self.given)
        if self.folder is None:
            return b""
        with contextlib.suppress(OSError):
            os.listdir(self.folder)  # NFS remembers for a while that a file does not exist; this makes it ask again
            descriptor = os.open(self.folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                about = os.fstat(descriptor)
                # The folder's owner too: a network file system may show root's files as those of nobody.
                owners = {os.geteuid(), self.folder.stat().st_uid}
                if stat.S_ISREG(about.st_mode) and about.st_uid in owners:
                    return file.read(LONGEST) or None
        return None

    def remove(self) -> None:
        """On node 0, once it has served."""
        if self.folder and not self.given:
            with contextlib.suppress(OSError):
                os.unlink(self.folder / NAME)

    def _read_given(self, path: Path) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"--run-token-file {path} cannot be read: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise UsageError(f"--run-token-file {path} is not a file")
            if about.st_mode & 0o077:
                raise UsageError(f"--run-token-file {path} can be read by others; run: chmod 600 {path}")
            content = file.read(LONGEST).strip()
        if len(content) < SHORTEST:
            raise UsageError(
                f"--run-token-file {path} has {len(content)} bytes, and a secret takes {SHORTEST}; make one with: "
                "head -c 32 /dev/urandom | base64"
            )
        return content
