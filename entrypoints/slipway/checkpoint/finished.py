"""An output that is there already: was it made from the same source with the same flags?

Beside every output is a hidden note, `.NAME.slipway.json`, with a digest of everything that the bytes depend on. So a
chain of commands that is started again passes over the steps that are done. The note is not inside: the same model has
the same bytes, whatever it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint.stream import sync
from slipway.errors import DataError, UsageError
from slipway.untrusted import LONGEST_BESIDE, read_object, replace_file

NOTE = ".slipway.json"


def note_of(out: Path) -> Path:
    """Where the note of an output is."""
    return out.with_name(f".{out.name}{NOTE}")


def digest(identity: Any) -> str:
    """Of everything that an output depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_note(out: Path, identity: Any, files: Mapping[str, Path], about: Any = None) -> None:
    """Write the note of an output, which may get its name only afterwards: the note counts once the files are there.

    Args:
        identity: everything that the bytes depend on.
        files: name in the output's folder, or beside an output that is a file → where the file is now.
        about: what the command says of the output once more.
    """
    states = {name: _state(path) for name, path in files.items()}
    text = json.dumps({"made_from": digest(identity), "files": states, "about": about}, indent=1) + "\n"
    replace_file(note_of(out), text.encode())
    sync(out.absolute().parent)


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a folder, by its name there."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def noted(out: Path) -> dict[str, Any] | None:
    """The note of an output whose files are as they were; None where there is none, or a file has changed."""
    try:
        found = read_object(note_of(out))
        folder = out if out.is_dir() else out.parent
        whole = all(_state(folder / name) == state for name, state in found["files"].items())
        named = not out.is_dir() or files_of(out).keys() == found["files"].keys()
    except (DataError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if whole and named and isinstance(found.get("made_from"), str) else None


def _state(path: Path) -> list[int]:
    """Bytes and time of the last change."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def check_same(found: Mapping[str, Any], identity: Any, out: Path) -> None:
    """UsageError unless an output with this note was made from the same."""
    if found["made_from"] != digest(identity):
        raise UsageError(
            f"{out} exists, and was made from another source or with other flags; choose another name, or --overwrite"
        )


def check_replaceable(out: Path) -> None:
    """UsageError for what --overwrite must not replace: anything but a model or an output of Slipway."""
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is no folder, and --overwrite replaces only models; remove it or choose another name")
    marks = ("config.json", "weights", "adapter_config.json")
    if not any((out / name).exists() for name in marks) and any(out.iterdir()):
        raise UsageError(f"{out} holds no model, so --overwrite leaves it alone; remove it or choose another name")


def new_beside(out: Path) -> Path:
    """Where the output is made that will take the place of one that is there."""
    return out.with_name(f".{out.name}.new")


def put_in_place(new: Path, out: Path) -> None:
    """Give the finished folder `new` the name of the old one, and remove the old one."""
    # In a new folder: what lies at any name that can be foreseen may be somebody's own.
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name[:LONGEST_BESIDE]}.old-"))
    os.rename(out, aside / "old")
    os.rename(new, out)
    shutil.rmtree(aside)
