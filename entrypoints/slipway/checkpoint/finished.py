"""An output that is there already: was it made from the same source with the same flags?

Beside every output is a hidden note, `.NAME.slipway.json`, with a digest of everything that the bytes depend on. So a
chain of commands that is started again passes over the steps that are done. The note is not inside: the same model has
the same bytes, whatever it was made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint.stream import partial_of, sync
from slipway.errors import DataError, UsageError
from slipway.untrusted import LONGEST_BESIDE, read_object, replace_file, tell

NOTE = ".slipway.json"
ASIDE, NEW, OLD = ".old-", "new", "old"  # the folder in which two outputs change their names, and what is in it
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
# Files that show what a folder is: torch_dist, classic, peft's, heads.
MARKS = (".metadata", "model_optim_rng.pt", "adapter_config.json", "heads.safetensors")
# The folders of Megatron's, NeMo's and the hub's; what is in them is theirs.
FOLDERS = re.compile(r"weights|context|release|iter_\d+|slipway|base|\.cache")
# Other files that programs write or people publish beside weights.
OF_A_MODEL = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|distcp|tiktoken|jinja|model)|.*\.index\.json"
    r"|(config|(adapter|generation|preprocessor|processor|quantize|quant|hf_quant)_config|params|metadata)\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template).*\.(json|txt)"
    r"|adapter_metadata\.json|trainer_state\.json|(modeling|configuration|tokenization|processing)_\w+\.py"
    r"|(LICEN[CS]E|NOTICE|README|USE_POLICY)\b.*|\.(gitattributes|metadata)|latest_checkpointed_iteration\.txt",
)


def note_of(out: Path) -> Path:
    """Where the note of an output is."""
    return out.with_name(f".{out.name}{NOTE}")


def digest(identity: Any) -> str:
    """Of everything that an output depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_note(
    out: Path, identity: Any, files: Mapping[str, Path], about: Any = None, aside: str | None = None
) -> None:
    """Write the note of an output, which may get its name only afterwards: the note counts once the files are there.

    Args:
        identity: everything that the bytes depend on.
        files: name in the output's folder, or beside an output that is a file → where the file is now.
        about: what the command says of the output once more.
        aside: the folder beside the output in which the old one and the new one change their names.
    """
    states = {name: state_of(path) for name, path in files.items()}
    text = json.dumps({"made_from": digest(identity), "files": states, "about": about, "aside": aside}, indent=1) + "\n"
    replace_file(note_of(out), text.encode())
    sync(out.absolute().parent)


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a folder, by its name there."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def noted(out: Path) -> dict[str, Any] | None:
    """The note of an output whose files are as they were; None where there is none, or a file has changed."""
    note = _note(out)
    return note if _is_as_noted(out, note) else None


def _note(out: Path) -> dict[str, Any]:
    """What the note of an output says; nothing where there is none that can be read."""
    try:
        return read_object(note_of(out))
    except DataError:
        return {}


def _is_as_noted(out: Path, note: Mapping[str, Any]) -> bool:
    """Whether the files of an output, or of a folder that will be one, are those of a note."""
    try:
        folder = out if out.is_dir() else out.parent
        whole = all(state_of(folder / name) == state for name, state in note["files"].items())
        named = not out.is_dir() or files_of(out).keys() == note["files"].keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return whole and named and isinstance(note.get("made_from"), str)


def state_of(path: Path) -> list[int]:
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
    """UsageError for what --overwrite must not replace: anything but a model, or what cannot be moved away."""
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out} is no folder, and --overwrite replaces only models; remove it or choose another name")
    if os.path.ismount(out):
        raise UsageError(f"a file system is mounted at {out}, which cannot be moved; choose a name within it")
    files, noted_files = files_of(out), _note(out).get("files")
    written = {*noted_files} if isinstance(noted_files, dict) else set()
    if files and not written and not any(map(_marks, files.items())):
        raise UsageError(f"{out} holds no model, so --overwrite leaves it alone; remove it or choose another name")
    if strange := [name for name in files if name not in written and not _is_of_a_model(name)]:
        raise UsageError(
            f"{out} holds {strange[0]}, which is no file of a model, so --overwrite leaves it alone; move it away or "
            "choose another name"
        )
    within = [path for path in out.rglob("*") if path.is_dir() and not path.is_symlink()]
    folders = [out.absolute().parent, out, *within]
    if fixed := [folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]:
        raise UsageError(f"nothing can be removed from {fixed[0]}: Permission denied; choose another name")


def _marks(file: tuple[str, Path]) -> bool:
    """Whether this file shows that a folder holds a model."""
    name, path = file
    if name == "config.json":
        try:
            return isinstance(read_object(path).get("model_type"), str)
        except DataError:
            return False
    return path.name in MARKS


def _is_of_a_model(name: str) -> bool:
    """Whether programs that save or publish models write a file of this name."""
    first, *within = Path(name).parts
    return bool(within and FOLDERS.fullmatch(first)) or OF_A_MODEL.fullmatch(Path(name).name) is not None


def name(new: Path, out: Path, identity: Any) -> None:
    """Give a finished folder its name and a note. After any end the next command finishes it, see `recover`."""
    write_note(out, identity, files_of(new))
    os.rename(new, out)


def replace(new: Path, out: Path, identity: Any) -> None:
    """The same where another output has this name, which is removed."""
    # At a name that cannot be foreseen, since what lies at others may be somebody's own. The note names it.
    aside = out.absolute().with_name(f"{_begin_of_aside(out)}{secrets.token_hex(8)}")
    write_note(out, identity, files_of(new), aside=aside.name)
    aside.mkdir()
    os.rename(new, aside / NEW)
    _swap(aside, out)
    shutil.rmtree(aside)


def _swap(aside: Path, out: Path) -> None:
    """Give the new output its name, and keep the old one under `aside`."""
    if not _exchange(aside / NEW, out):  # a file system that cannot: for a moment there is no output
        os.rename(out, aside / OLD)
        os.rename(aside / NEW, out)
    sync(out.absolute().parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def recover(out: Path) -> None:
    """Finish what an earlier command was doing when it was ended while it gave this output its name."""
    note = _note(out)
    aside = _aside_of(out, note)
    places = [partial_of(out), *([aside / NEW] if aside else [])]
    whole = next((place for place in places if place.is_dir() and _is_as_noted(place, note)), None)
    if whole is not None and noted(out) is None and (aside or not os.path.lexists(out)):
        tell(f"slipway: {out}: an earlier command had made all of it before it was ended; it gets its name now")
        if aside is None or not os.path.lexists(out):
            os.rename(whole, out)
        else:
            aside.mkdir(exist_ok=True)
            os.rename(whole, aside / NEW)
            _swap(aside, out)
    elif aside is not None and not os.path.lexists(out) and (aside / OLD).is_dir():
        os.rename(aside / OLD, out)
    if aside is not None and aside.is_dir():
        tell(f"slipway: {out}: what an earlier command left of the one before, in {aside.name}, is removed")
        shutil.rmtree(aside)


def is_settled(out: Path) -> bool:
    """The output is whole, and nothing of an earlier one is left."""
    aside = _aside_of(out, _note(out))
    return noted(out) is not None and not (aside and aside.is_dir())


def _begin_of_aside(out: Path) -> str:
    return f".{out.name[:LONGEST_BESIDE]}{ASIDE}"


def _aside_of(out: Path, note: Mapping[str, Any]) -> Path | None:
    """The folder of `replace` that a note names, there or not; None where it could be somebody's own."""
    name = note.get("aside")
    if not isinstance(name, str) or not re.fullmatch(re.escape(_begin_of_aside(out)) + "[0-9a-f]{16}", name):
        return None
    aside = out.absolute().with_name(name)
    return None if aside.is_symlink() or (aside.exists() and not aside.is_dir()) else aside
