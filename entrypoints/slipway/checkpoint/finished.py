"""An output that is there already: was it made from the same source with the same flags?

Every output has a hidden note, `.slipway.json` in a folder, `.NAME.slipway.json` beside a file, with a digest of
everything that its bytes depend on. So a chain of commands that is started again passes over the steps that are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.errors import DataError, UsageError
from slipway.untrusted import read_object

NOTE = ".slipway.json"


def note_of(out: Path) -> Path:
    """Where the note of an output is."""
    return out / NOTE if out.is_dir() else out.with_name(f".{out.name}{NOTE}")


def digest(identity: Any) -> str:
    """Of everything that an output depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def note(identity: Any, sizes: Mapping[str, int], about: Any = None) -> bytes:
    """The content of a note.

    Args:
        identity: everything that the bytes depend on.
        sizes: file → bytes, relative to the output's folder.
        about: what the command says of the output once more.
    """
    return json.dumps({"made_from": digest(identity), "sizes": dict(sizes), "about": about}, indent=1).encode() + b"\n"


def noted(out: Path) -> dict[str, Any] | None:
    """The note of an output whose files all have their sizes; None where there is none, or a file is not as it was."""
    try:
        found = read_object(note_of(out))
        folder = note_of(out).parent
        whole = all((folder / name).stat().st_size == size for name, size in found["sizes"].items())
    except (DataError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if whole else None


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
    marks = (NOTE, "config.json", "weights", "adapter_config.json")
    if not any((out / name).exists() for name in marks) and any(out.iterdir()):
        raise UsageError(f"{out} holds no model, so --overwrite leaves it alone; remove it or choose another name")


def new_beside(out: Path) -> Path:
    """Where the output is made that will take the place of one that is there."""
    return out.with_name(f".{out.name}.new")


def put_in_place(new: Path, out: Path) -> None:
    """Give the finished folder `new` the name of the old one, and remove the old one."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old)
