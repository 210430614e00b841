"""One command at a time works on an output: a lock beside the folder of the work, which ends with its process.

The kernel holds the lock, so a command that was killed leaves none. NFS and the file systems of clusters hold it for
all nodes that share them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slipway.errors import PreflightError, UsageError, WriteError
from slipway.untrusted import tell

HELD = (errno.EAGAIN, errno.EACCES)  # NFS says the second
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """No other command works on an output as long as the context lasts. The lock is `.NAME.lock` beside it.

    Errors: PreflightError where another command is at work; UsageError where something else has the lock's name;
    WriteError where nothing can be written there.
    """
    file = out.with_name(f".{out.name}.lock")
    try:
        descriptor = _locked(file, out)
    except OSError as error:
        raise WriteError(f"cannot write {out}: {error.strerror}; choose another place") from None
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # before it is given up: afterwards it could be another command's
        os.close(descriptor)


def _locked(file: Path, out: Path) -> int:
    """The descriptor of the lock, which is held until it is closed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = _opened(file)
        try:
            _lock(descriptor, out)
            if _is_at(file, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has removed it since it was opened: another command would lock a new one


def _opened(file: Path) -> int:
    # For writing: over NFS only such a file can be locked against everybody.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    foreign = UsageError(f"{file} is not a lock of Slipway's, which would stand there; move it away")
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in NOT_A_FILE:
            raise foreign from None
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_size:
        os.close(descriptor)
        raise foreign
    return descriptor


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise PreflightError(f"another command is at work on {out}; wait for it, or choose another name") from None
        if error.errno not in NO_LOCKS:
            raise
        tell(f"{out.parent}: its file system has no locks; start no other command with the same output")


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
