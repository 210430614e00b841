"""Where tokens go while `preprocess` works: a hidden folder beside OUT with a journal, from which it can go on.

The journal says how far each file is known to be on disk and which pieces of the input that covers. A file is cut back
to that length when the same command goes on, so what comes out is the same to the byte as in one go.
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

from slipway.errors import DataError
from slipway.tokens.encoder import Encoded
from slipway.tokens.indexed import index_of, write_index

COMMIT_SECONDS = 2.0
CONTENT, LENGTHS, ENDS = "content", "lengths", "ends"


class Output:
    """Takes the pieces of the output in order; a context manager.

    Args:
        target: the file that is to be: .jsonl, or .bin with .idx beside it.
        identity: all that decides the output; what another identity left half done is thrown away.

    An error of the input takes everything away. After any other end the next call goes on.
    """

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self.target, self.identity = target, identity
        self.folder = target.with_name(f".{target.name}.partial")
        self.pieces = 0
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Output:
        begun = self._read_journal()
        if begun["identity"] != self.identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            begun = {"sizes": dict.fromkeys((CONTENT, LENGTHS, ENDS), 0), "pieces": 0, "counts": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: (self.folder / name).open("ab") for name in begun["sizes"]}
        for name, size in begun["sizes"].items():
            self._files[name].truncate(size)
        self.pieces, self.counts = begun["pieces"], begun["counts"]
        self._commit()
        return self

    def _read_journal(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "journal.json").read_text())
        except (OSError, ValueError):
            return {"identity": None}

    def add(self, piece: Encoded) -> None:
        """Write the next piece."""
        self._files[CONTENT].write(piece.content)
        self._files[LENGTHS].write(piece.lengths.tobytes())
        self._files[ENDS].write(piece.ends.tobytes())
        for name, count in piece.counts().items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.pieces += 1
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        journal = {"identity": self.identity, "sizes": sizes, "pieces": self.pieces, "counts": self.counts}
        new = self.folder / "journal.json.new"
        new.write_text(json.dumps(journal))
        os.replace(new, self.folder / "journal.json")
        self._committed = time.monotonic()

    def finish(self, dtype: type[np.integer]) -> int:
        """Make the target visible; its bytes. `dtype`: of the tokens in a .bin."""
        self._commit()
        size = (self.folder / CONTENT).stat().st_size
        if self.target.suffix == ".bin":
            index = self.folder / "index"
            with index.open("wb") as file:
                lengths = np.fromfile(self.folder / LENGTHS, np.int32)
                write_index(file, dtype, lengths, np.fromfile(self.folder / ENDS, bool))
                os.fsync(file.fileno())
            size += index.stat().st_size
            os.replace(self.folder / CONTENT, self.target)
            os.replace(index, index_of(self.target))
        else:
            os.replace(self.folder / CONTENT, self.target)
        return size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        if error is None or isinstance(error, DataError):
            shutil.rmtree(self.folder, ignore_errors=True)
