"""`slipway preprocess`: text, prompts or chats → the tokens that `train` reads."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.errors import DataError, UsageError, WriteError
from slipway.report import Progress, Summary
from slipway.tokens.inputs import PIECE_BYTES, input_files, pieces

if TYPE_CHECKING:
    from slipway.tokens.encoder import Settings


def preprocess(
    data: str,
    out: str,
    *,
    tokenizer: str,
    seq_length: int = 6144,
    append_eos: bool = True,
    workers: int | None = None,
) -> Summary:
    """Turn text, prompts with completions, or chats into token data for `train`.

    A .jsonl file holds one object a line: {"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]}, whose
    last message is learned under the chat template of the tokenizer, or {"inputs": {"p_ids": [...], "r_ids": [...]}},
    which is tokens already. Any other file is one text.

    OUT.jsonl gets samples: texts are cut into windows of SEQ_LENGTH - 1 tokens, all of them learned; samples of
    SEQ_LENGTH tokens or more, and those that leave nothing to learn, are dropped and counted. OUT.bin gets texts alone,
    whole, with OUT.idx beside it, as Megatron keeps them. Stopped, the same command goes on where it was.

    Args:
        data: a text or .jsonl file, or a folder of them.
        out: the .jsonl or .bin file to write.
        tokenizer: model whose tokenizer is used: a folder, hf://org/name[@revision] or nemo://name.
        seq_length: the limit that training will have.
        append_eos: end each text and each completion with the tokenizer's eos_token.
        workers: processes that tokenise; without it, one per core.
    """
    started = time.monotonic()
    target = Path(out)
    _check(target, seq_length, workers)
    files = input_files(Path(data))

    from slipway.tokens.encoder import Encoder, Settings, tokenizer_folder
    from slipway.tokens.outputs import Output
    from slipway.tokens.parallel import encoded

    settings = Settings(tokenizer_folder(tokenizer), seq_length, append_eos, target.suffix == ".bin")
    encoder = Encoder(settings)
    total = sum(file.stat().st_size for file in files)
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, total // PIECE_BYTES))
    try:
        with Output(target, _identity(files, settings)) as output, Progress("preprocess", total) as progress:
            todo = pieces(files)
            for piece in islice(todo, output.pieces):
                progress.advance(piece.end - piece.start)
            for piece, tokenised in encoded(todo, encoder, workers):
                output.add(tokenised)
                progress.advance(piece.end - piece.start)
            if not output.counts.get("samples"):
                raise DataError(
                    f"{data}: no sample is left, {output.counts.get('dropped_too_long', 0)} were too long and "
                    f"{output.counts.get('dropped_empty', 0)} empty; raise --seq-length"
                )
            size = output.finish(encoder.dtype)
    except OSError as error:
        raise WriteError(
            f"{target} cannot be written: {error.strerror}; free some space or choose another OUT"
        ) from None
    return Summary("preprocess", str(target), size, time.monotonic() - started, output.counts)


def _check(target: Path, seq_length: int, workers: int | None) -> None:
    if target.suffix not in (".jsonl", ".bin"):
        raise UsageError(
            f"OUT is {target}; end it in .jsonl for samples, or in .bin for whole texts as Megatron keeps them"
        )
    for file in {target, target.with_suffix(".idx") if target.suffix == ".bin" else target}:
        if file.exists():
            raise UsageError(f"{file} exists; remove it or choose another OUT")
    if seq_length < 3:
        raise UsageError(f"--seq-length is {seq_length}; a sample that teaches anything needs at least 3")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")


def _identity(files: list[Path], settings: Settings) -> dict[str, Any]:
    """What two calls must have alike for the second to go on where the first was."""
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    tokenizer = (settings.tokenizer / "tokenizer.json").stat()
    return {
        "files": [list(state) for state in states],
        "settings": {**vars(settings), "tokenizer": str(settings.tokenizer.absolute())},
        "tokenizer": [tokenizer.st_size, tokenizer.st_mtime_ns],
    }
