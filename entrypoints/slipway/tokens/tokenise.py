"""The work of `preprocess`: files of text, prompts or chats in, one file of tokens out."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from slipway.errors import DataError, UsageError, WriteError
from slipway.report import Progress
from slipway.tokens.encoder import Encoder, Settings, tokenizer_folder
from slipway.tokens.inputs import PIECE_BYTES, input_files, pieces
from slipway.tokens.outputs import Output
from slipway.tokens.parallel import encoded
from slipway.tokens.wanted import Wanted


def tokenise(data: Path, target: Path, wanted: Wanted) -> tuple[int, dict[str, int]]:
    """Write the tokens of `data` to `target`; (bytes written, what was counted, by name).

    Args:
        data: a text or .jsonl file, or a folder of them.
        target: the .jsonl or .bin file to write; it must not exist yet.

    Errors: UsageError for arguments, DataError for input that cannot be used, WriteError for a target that cannot be
    written, PreflightError where a process was killed. After the last two the same call continues.
    """
    wanted.check()
    _check_target(target)
    files = input_files(data)
    folder = tokenizer_folder(wanted.tokenizer)
    settings = Settings(folder, wanted.seq_length, wanted.append_eos, target.suffix == ".bin")
    encoder = Encoder(settings)
    workers = _processes(wanted.workers, files)
    try:
        with Output(target, _identity(files, settings)) as output:
            _fill(output, files, encoder, workers)
            _check_counts(data, output.counts)
            return output.finish(encoder.dtype), output.counts
    except OSError as error:
        raise WriteError(f"cannot write {target}: {error.strerror}; free some space or choose another OUT") from None


def _fill(output: Output, files: list[Path], encoder: Encoder, workers: int) -> None:
    """Add every piece of the input that an earlier call has not added yet."""
    todo = pieces(files)
    with Progress("preprocess", _size(files)) as progress:
        for piece in islice(todo, output.pieces):
            progress.advance(piece.end - piece.start)
        for piece, tokens in encoded(todo, encoder, workers):
            output.add(tokens)
            progress.advance(piece.end - piece.start)


def _check_target(target: Path) -> None:
    if target.suffix not in (".jsonl", ".bin"):
        raise UsageError(f"OUT is {target}; its name must end in .jsonl (samples) or .bin (whole texts, for Megatron)")
    index, partial = target.with_suffix(".idx"), Output.partial(target)
    if target.exists():
        raise UsageError(f"{target} exists; remove it or choose another OUT")
    # With a partial folder beside it, the index is from a run of ours that ended between its last two steps.
    if target.suffix == ".bin" and index.exists() and not partial.exists():
        raise UsageError(f"{index} exists; remove it or choose another OUT")


def _check_counts(data: Path, counts: dict[str, int]) -> None:
    if not counts.get("samples"):
        raise DataError(
            f"{data} gives no sample: {counts.get('dropped_too_long', 0)} were too long, "
            f"{counts.get('dropped_empty', 0)} were empty; use a larger --seq-length or other data"
        )


def _processes(workers: int | None, files: list[Path]) -> int:
    """As many as asked for, else one per core; never more than there are pieces for."""
    cores = len(os.sched_getaffinity(0))  # cpu_count() would count those that a container may not use
    return min(workers or cores, max(1, _size(files) // PIECE_BYTES))


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _identity(files: list[Path], settings: Settings) -> dict[str, Any]:
    """What must be equal in two calls for the second to continue the work of the first."""
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    tokenizer = (settings.tokenizer / "tokenizer.json").stat()
    return {
        "files": [list(state) for state in states],
        "settings": {**vars(settings), "tokenizer": str(settings.tokenizer.absolute())},
        "tokenizer": [tokenizer.st_size, tokenizer.st_mtime_ns],
    }
