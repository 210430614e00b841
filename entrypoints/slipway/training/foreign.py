"""Train from a checkpoint that NeMo itself has saved.

Its context names NeMo's and other classes, which are not called (checkpoint/handover.py). What it says of the model is
read as data, and a context of Slipway's own is written for it in the run's folder, beside a link to the weights. So
what training saves can be exported, and the kernels are those that this machine has.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from slipway.checkpoint import torch_dist
from slipway.checkpoint.nemo_context import SOURCE_CONFIG
from slipway.checkpoint.opened import Given, context_folder, is_megatron, open_nemo
from slipway.checkpoint.outputs import context_of
from slipway.errors import DataError, WriteError

FOLDER = "model"  # in the run's folder
WEIGHTS = "weights"
CURE = "run `slipway import {} OUT` first and give OUT"


def with_own_context(model: Path, out: Path, config: Path | None, dry_run: bool) -> tuple[Path, list[str]]:
    """(the checkpoint to train from, what to say of it).

    Args:
        model: what the user gave; itself where Slipway has made it.
        out: the run's folder.
        config: the user's config.json.
        dry_run: write nothing that stays.

    Errors: DataError for a checkpoint that is not in NeMo's form, with the command that makes it so.
    """
    if config is None and (model / "context" / SOURCE_CONFIG).is_file():
        return model, []
    if not (model / WEIGHTS / ".metadata").is_file():
        if model.is_dir() and is_megatron(model):
            raise DataError(f"{model} is not in NeMo's form; {CURE.format(model)}")
        return model, []
    stored = torch_dist.Reader(model)
    if not stored.prefixed:
        raise DataError(f"{model} is not in NeMo's form; {CURE.format(model)}")
    before = set(stored.tensors)
    opened = open_nemo(model, Given(config=config))
    if missing := sorted(opened.model.megatron.keys() - before):
        raise DataError(f"{model} does not have {missing[0]}, which NeMo would load; {CURE.format(model)}")
    folder = _scratch() if dry_run else out / FOLDER
    files = context_of(opened, "")
    weights = context_folder(opened.reader.folder).parent / WEIGHTS
    if not (folder / "context" / SOURCE_CONFIG).is_file():
        _write(folder, weights, *files)
    elif (folder / WEIGHTS).resolve() != weights.resolve():
        _link_again(folder / WEIGHTS, weights)
    said = "NeMo's own context is not run: what it says of the model is written anew"
    return folder, [*opened.notes, f"{said} to {folder}" if not dry_run else said]


def _link_again(link: Path, weights: Path) -> None:
    """The weights are at another place than at the run's first start; that they are the same is compared later."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=link.parent) as made:
            (Path(made) / WEIGHTS).symlink_to(weights.absolute(), target_is_directory=True)
            os.replace(Path(made) / WEIGHTS, link)
    except OSError as error:
        raise WriteError(f"{link} cannot be written: {error.strerror}; choose another --out") from None


def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="slipway-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / FOLDER


def _write(folder: Path, weights: Path, small: dict[str, bytes], copies: dict[str, Path]) -> None:
    """The context and a link to the weights, all at once: several nodes may do it at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        os.chmod(made, 0o755)
        for name, content in small.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
        for name, source in copies.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, made / name)
        (made / WEIGHTS).symlink_to(weights.absolute(), target_is_directory=True)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "context" / SOURCE_CONFIG).is_file():
                raise
            shutil.rmtree(made)  # another node was first
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}; choose another --out") from None
