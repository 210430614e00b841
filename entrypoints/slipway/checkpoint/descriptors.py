"""Files that a reader opens when it first needs them, and keeps open as long as it lives."""

from __future__ import annotations

import errno
import os
import resource
import weakref
from pathlib import Path

from slipway.untrusted import open_file, unreadable


class Descriptors:
    """Descriptors for reading, of many threads; they are closed when this object is forgotten."""

    def __init__(self) -> None:
        self._kept: dict[Path, int] = {}
        weakref.finalize(self, _close, self._kept)

    def of(self, path: Path) -> int:
        """The descriptor of a file; OSError or DataError where it cannot be opened (open_file)."""
        if (kept := self._kept.get(path)) is not None:
            return kept
        opened = _opened(path)
        kept = self._kept.setdefault(path, opened)
        if kept != opened:  # another thread was quicker
            os.close(opened)
        return kept


def _opened(path: Path) -> int:
    """A descriptor. A checkpoint of a thousand ranks has more files than a process may have open before it asks."""
    try:
        return _descriptor(path)
    except PermissionError as error:
        raise unreadable(path, error) from None
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return _descriptor(path)


def _descriptor(path: Path) -> int:
    with open_file(path) as file:
        return os.dup(file.fileno())


def _close(kept: dict[Path, int]) -> None:
    for descriptor in kept.values():
        os.close(descriptor)
