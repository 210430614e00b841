"""Python reads this file at its start in the stages that compile: folders are listed in the order of their names.

Some build scripts take their sources in the order in which a file system lists them, and the linker puts them into the
library in that order. Each file system has another order, so each machine would make another library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

_listdir, _scandir = os.listdir, os.scandir


class _Entries:
    """What os.scandir returns: an iterator that closes, here over entries that were read and sorted before."""

    def __init__(self, entries: list[os.DirEntry]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry]:
        return self._entries

    def __next__(self) -> os.DirEntry:
        return next(self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._entries = iter([])


def listdir(path: Any = ".") -> list:
    """os.listdir, sorted."""
    return sorted(_listdir(path))


def scandir(path: Any = ".") -> _Entries:
    """os.scandir, sorted; os.walk and glob use it."""
    with _scandir(path) as entries:
        return _Entries(sorted(entries, key=lambda entry: entry.name))


os.listdir, os.scandir = listdir, scandir  # type: ignore[assignment]
