"""Whether a checkpoint of a run is whole, told before any worker is started.

What is saved is brought to disk, and then marked as complete with the size of each file. So a file that is cut off,
empty or missing later is found without reading it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from slipway.checkpoint import handover
from slipway.checkpoint.locate import COMPLETE
from slipway.checkpoint.lora import BASE_NOTE, noted_base
from slipway.errors import DataError, UsageError
from slipway.training.run_folder import RunFolder
from slipway.untrusted import read_object, replace_file

MARK = Path("context") / COMPLETE
MOST_MARK_BYTES = 64 << 20
CURES = (f"; {handover.CURE}", f"; {handover.COPY}")  # of a checkpoint that a person has brought


def seal(checkpoint: Path) -> int:
    """Bring a checkpoint to disk, and mark it as complete; its bytes. Every rank has synced its own weights before."""
    mark = checkpoint / MARK
    mark.unlink(missing_ok=True)  # of an earlier seal
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        # An open file has the size that other nodes have given it, also on NFS.
        found = _synced(path)
        if stat.S_ISREG(found.st_mode) and path.name != BASE_NOTE:  # which may be written again, see name_base
            sizes[str(path.relative_to(checkpoint))] = found.st_size
    replace_file(mark, (json.dumps(sizes, indent=1) + "\n").encode())
    for folder in (mark.parent, checkpoint, checkpoint.parent):
        _synced(folder)
    return sum(sizes.values())


def name_base(checkpoint: Path, base: Path) -> None:
    """Let a checkpoint of adapters or heads name the place where its base is now: NeMo loads it from there."""
    note = checkpoint / "weights" / BASE_NOTE
    if note.is_file() and noted_base(note) != base:
        replace_file(note, json.dumps({"model_ckpt_path": str(base)}).encode())


def _synced(path: Path) -> os.stat_result:
    """What a file or folder is, once it is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint that was complete, or why NeMo must not be given it; "" where it is whole."""
    try:
        if said := _other_size(checkpoint):
            return said
        handover.check(checkpoint)
        return ""
    except (DataError, UsageError) as error:
        said = str(error)
        for cure in CURES:
            said = said.removesuffix(cure)
        return said


def _other_size(checkpoint: Path) -> str:
    """The first file that has not the size that it had when the checkpoint was complete; "" where there is none."""
    mark = checkpoint / MARK
    if not mark.stat().st_size:  # Slipway 0.1 has noted no sizes
        return ""
    for name, size in read_object(mark, MOST_MARK_BYTES).items():
        try:
            found = (checkpoint / name).stat().st_size
        except OSError as error:
            return f"{checkpoint / name} cannot be read ({error.strerror})"
        if found != size:
            return f"{checkpoint / name} has {found} bytes, and had {size}"
    return ""


def newest_whole(folder: RunFolder) -> tuple[int, dict[Path, str]]:
    """(step of the newest checkpoint of a run that is whole, newer ones that are not → what is wrong with each).

    The step is 0 where there is no checkpoint yet.

    Errors: DataError where there are some, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for step, checkpoint in folder.complete_checkpoints():
        if not (why := damage(checkpoint)):
            return step, damaged
        damaged[checkpoint] = why
    if damaged:
        said = "; ".join(damaged.values())
        raise DataError(f"{said}; no other checkpoint is there to go on from: restore it, or choose another --out")
    return 0, {}
