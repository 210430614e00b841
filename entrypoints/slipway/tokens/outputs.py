"""Where tokens go while `preprocess` works: a hidden folder beside OUT, with a journal from which it can continue.

The journal says how many bytes of each file are safely on disk, and which pieces of the input they hold. When the same
command runs again, each file is cut back to that length. So the output is the same to the byte as that of one run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from slipway.checkpoint import finished
from slipway.checkpoint.stream import check_name, is_plain_folder, not_ours, partial_of, sync
from slipway.errors import DataError
from slipway.tokens.encoder import CONTENT, ENDS, HELD_OUT, LENGTHS, UNUSED, Encoded
from slipway.tokens.indexed import index_of, write_index
from slipway.tokens.inputs import CUT
from slipway.untrusted import read_object

JOURNAL = "journal.json"
COMMIT_SECONDS = 2.0  # the most work that a killed run loses
MOST_UNUSED = 50  # keys that are counted one by one; every row may have others


class Output:
    """Takes the pieces of the output in order; a context manager.

    Args:
        target: the file that will be written: .jsonl, or .bin with .idx beside it.
        held_out: the file for what is held out, of the same kind; None: nothing is.
        identity: everything that decides the output; unfinished work with another identity is thrown away.

    A DataError removes everything, because the input must change before the next run. After any other end the next run
    continues.
    """

    def __init__(self, target: Path, held_out: Path | None, identity: dict[str, Any]) -> None:
        # Read back from the journal, lists stand for tuples.
        self.target, self.identity = target, json.loads(json.dumps(identity))
        # What stands before the names of a file's parts → the file. The target is the last to get its name.
        self.targets = ({HELD_OUT: held_out} if held_out else {}) | {"": target}
        self.folder = self.partial(target)
        self.pieces = 0
        self.counts: dict[str, int] = {}

    @staticmethod
    def partial(target: Path) -> Path:
        """The folder for the work on a target; UsageError for a name that no file can have."""
        check_name(target)
        return partial_of(target)

    def __enter__(self) -> Output:
        if is_plain_folder(self.folder) and not self._is_ours():
            raise not_ours(self.folder)
        begun = self._read_journal()
        if begun["identity"] != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            names = [before + name for before in self.targets for name in (CONTENT, LENGTHS, ENDS)]
            begun = {"sizes": dict.fromkeys(names, 0), "pieces": 0, "counts": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (self.folder / name).open("ab") for name in begun["sizes"]}
        for name, size in begun["sizes"].items():
            self._files[name].truncate(size)  # what was written after the last commit may be incomplete
            self._files[name].seek(size)  # truncate() leaves the position, from which the journal takes the size
        self.pieces, self.counts = begun["pieces"], begun["counts"]
        self._commit()
        sync(self.folder.absolute().parent)
        return self

    def _names(self) -> list[str]:
        return [before + name for before in (HELD_OUT, "") for name in (CONTENT, LENGTHS, ENDS)]

    def _is_ours(self) -> bool:
        """Nothing is in the folder but what this class writes there."""
        names = {*self._names(), JOURNAL, f"{JOURNAL}.new", "index", "note"}
        return all(file.name in names and file.is_file() for file in self.folder.iterdir())

    def _read_journal(self) -> dict[str, Any]:
        """What an earlier run has written down; of no identity where there is nothing to continue."""
        try:
            begun = read_object(self.folder / JOURNAL)
            sizes, counts, pieces = begun["sizes"], begun["counts"], begun["pieces"]
            sound = sizes.keys() <= {*self._names()} and all(type(n) is int for n in [pieces, *counts.values()])
            # A run that ended just after it had moved its files away left a journal of files that are gone.
            whole = sound and all((self.folder / name).stat().st_size >= size >= 0 for name, size in sizes.items())
            known = {before + CONTENT for before in self.targets} <= sizes.keys() and begun["cut"] == CUT
        except (DataError, OSError, LookupError, TypeError, AttributeError):
            return {"identity": None}
        return begun if whole and known and pieces >= 0 else {"identity": None}

    def add(self, piece: Encoded) -> None:
        """Write the next piece."""
        for name, content in piece.parts.items():
            self._files[name].write(content)
        for name, count in piece.counts.items():
            name = self._counted_as(name)
            self.counts[name] = self.counts.get(name, 0) + count
        self.pieces += 1
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def _counted_as(self, name: str) -> str:
        """The name of a count; of many keys of which nothing is made, the last ones are counted together."""
        is_new = name.startswith(UNUSED) and name not in self.counts
        is_many = is_new and sum(known.startswith(UNUSED) for known in self.counts) >= MOST_UNUSED
        return f"{UNUSED}other keys" if is_many else name

    def _commit(self) -> None:
        """Put on disk first the data, then the journal that vouches for it."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        journal = {"identity": self.identity, "sizes": sizes, "pieces": self.pieces, "counts": self.counts}
        journal["cut"] = CUT
        # A new file that replaces the old one: after a power cut there is one of the two, never a mixture.
        new = self.folder / f"{JOURNAL}.new"
        new.write_text(json.dumps(journal))
        sync(new)
        os.replace(new, self.folder / JOURNAL)
        sync(self.folder)
        self._committed = time.monotonic()

    def finish(self, dtype: type[np.integer], about: dict[str, Any]) -> int:
        """Give the output its name; returns its bytes.

        Args:
            dtype: of the tokens in a .bin.
            about: what the command says of the output, for its note (finished.py).
        """
        self._commit()
        # The note comes first: it counts only once all files that it names are there.
        files = {target.name: self.folder / (before + CONTENT) for before, target in self.targets.items()}
        finished.write_note(self.target, self.identity, files, about)
        return sum(self._name(before, target, dtype) for before, target in self.targets.items())

    def _name(self, before: str, target: Path, dtype: type[np.integer]) -> int:
        content = self.folder / (before + CONTENT)
        size = content.stat().st_size
        if target.suffix == ".bin":
            # The index comes first: a .bin that is there is complete, and without a .bin the next run finishes this.
            size += self._name_index(before, index_of(target), dtype)
        os.replace(content, target)
        sync(target.absolute().parent)
        return size

    def _name_index(self, before: str, index: Path, dtype: type[np.integer]) -> int:
        lengths = np.fromfile(self.folder / (before + LENGTHS), np.int32)
        ends = np.fromfile(self.folder / (before + ENDS), bool)
        new = self.folder / "index"
        with new.open("wb") as file:
            write_index(file, dtype, lengths, ends)
        sync(new)
        os.replace(new, index)
        sync(index.absolute().parent)
        return index.stat().st_size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if error is None or isinstance(error, DataError):
            shutil.rmtree(self.folder, ignore_errors=True)
