"""The work of `preprocess`: files of text, prompts or chats in, one file of tokens out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from slipway.checkpoint import finished
from slipway.checkpoint.working import alone
from slipway.errors import DataError, UsageError, WriteError
from slipway.report import Progress
from slipway.tokens.encoder import MAPPED, UNUSED, Encoder, Settings
from slipway.tokens.folders import Inputs, inputs_of
from slipway.tokens.hub import DATASETS, located
from slipway.tokens.indexed import index_of
from slipway.tokens.inputs import PIECE_BYTES, pieces
from slipway.tokens.outputs import Output
from slipway.tokens.parallel import encoded
from slipway.tokens.preview import preview
from slipway.tokens.sources import Source
from slipway.tokens.vocabulary import files_of, tokenizer_folder
from slipway.tokens.wanted import Wanted

MOST_LOST = 0.05  # of all tokens, before `--long refuse` stops
EARLY = 20  # pieces after which the loss is looked at for the first time: not only after hours of work
ALREADY = "it is there already, made from the same data with the same flags: nothing was written"
ALWAYS_SAID = ("samples", "tokens", "learned", "dropped_too_long", "dropped_empty")


def tokenise(data: str, target: Path, wanted: Wanted, seq_length: int) -> tuple[int, dict[str, Any]]:
    """Write the tokens of `data` to `target`; (its bytes, what was counted, by name; a note if it was there already).

    Args:
        data: a file, a folder, or hf://datasets/org/name[:split].
        target: the .jsonl or .bin file to write. If it is there, made from the same data with the same flags, there is
            nothing to do.
        seq_length: of the training.

    Errors: UsageError for arguments, DataError for input that cannot be used, WriteError for a target that cannot be
    written, PreflightError where a process was killed, or another command works on the target. After the last two the
    same call continues.
    """
    wanted.check()
    held_out = target.with_name(f"{target.stem}.eval{target.suffix}") if wanted.eval_split else None
    written = _written(target, held_out)
    before = None if wanted.overwrite else finished.noted(target)
    if data.startswith(DATASETS):  # before anything is downloaded
        _check_targets(target, written, may_exist=wanted.overwrite or before is not None)
    folder, split = located(data)
    inputs = inputs_of(folder, wanted.split or split, (target, *filter(None, [held_out])))
    _check_sources(written, inputs.all_files(folder))
    _check_targets(target, written, may_exist=wanted.overwrite or before is not None)
    settings = _settings(wanted, seq_length, target, inputs)
    identity = _identity(inputs.sources, settings)
    if before is not None:
        finished.check_same(before, identity, target)
        about = before["about"]
        return target.stat().st_size, {**about, "notes": [*about.get("notes", ()), ALREADY]}
    with _alone(target, held_out):
        _check_targets(target, written, may_exist=wanted.overwrite)  # another command may have ended since
        encoder = Encoder(settings)
        preview(folder, inputs, encoder, wanted.show)
        workers = _processes(wanted.workers, inputs.sources)
        try:
            with Output(target, held_out, identity) as output:
                _fill(output, inputs.sources, encoder, workers)
                _check_counts(data, output.counts, settings)
                counts = _said(output.counts)
                return output.finish(encoder.dtype, counts), counts
        except OSError as error:
            raise WriteError(
                f"cannot write {target}: {error.strerror}; free some space or choose another OUT"
            ) from None


@contextmanager
def _alone(target: Path, held_out: Path | None) -> Iterator[None]:
    """No other command works on one of these files: what is held out here may be OUT there."""
    with ExitStack() as locks:
        for path in filter(None, (target, held_out)):
            locks.enter_context(alone(path))
        yield


def _settings(wanted: Wanted, seq_length: int, target: Path, inputs: Inputs) -> Settings:
    newest = max(source.path.stat().st_mtime for source in inputs.sources)
    return Settings(
        tokenizer=tokenizer_folder(wanted.tokenizer),
        seq_length=seq_length,
        append_eos=wanted.append_eos,
        indexed=target.suffix == ".bin",
        learn=wanted.learn,
        long=wanted.long,
        pairs=wanted.pairs,
        renamed=tuple(sorted(wanted.renamed().items())),
        arguments=wanted.arguments(),
        held_out=wanted.held_out(),
        day=wanted.date or datetime.fromtimestamp(newest, UTC).date().isoformat(),
    )


def _fill(output: Output, sources: list[Source], encoder: Encoder, workers: int) -> None:
    """Add every piece of the input that an earlier call has not added yet."""
    todo = pieces(sources)
    with Progress("preprocess", _size(sources)) as progress:
        for piece in islice(todo, output.pieces):
            progress.advance(piece.size)
        for piece, tokens in encoded(todo, encoder, workers):
            output.add(tokens)
            progress.advance(piece.size)
            if output.pieces == EARLY:
                _check_lost(output.counts, encoder.settings)


def _written(target: Path, held_out: Path | None) -> list[Path]:
    """Every file that is made; UsageError for a target of another kind."""
    if target.suffix not in (".jsonl", ".bin"):
        raise UsageError(f"OUT is {target}; its name must end in .jsonl (samples) or .bin (whole texts, for Megatron)")
    files = [path for path in (target, held_out) if path]
    return files + [index_of(path) for path in files if path.suffix == ".bin"]


def _check_sources(written: list[Path], files: set[Path]) -> None:
    """UsageError where a file that is made would take the place of one of DATA."""
    for path in written:
        if path.resolve() in files:
            raise UsageError(f"{path} is a file of DATA, and this command would replace it; choose another OUT")


def _check_targets(target: Path, written: list[Path], may_exist: bool) -> None:
    # With a partial folder beside them, the files besides OUT are from a run of ours that ended between its last steps.
    began = Output.partial(target).exists()
    for path in written:
        if path.exists() and (path == target or not began) and not may_exist:
            raise UsageError(f"{path} exists; remove it, choose another OUT, or --overwrite")


def _check_counts(data: str, counts: Mapping[str, int], settings: Settings) -> None:
    """DataError where there is too little to write, or too much was lost."""
    for name, rows in counts.items():
        if name.startswith(MAPPED) and not rows:
            raise DataError(f"{data}: no row has the key {name.removeprefix(MAPPED)!r} of --map; correct it")
    _check_lost(counts, settings)
    if settings.held_out and counts.get("samples") and not counts.get("eval_samples"):
        raise DataError(
            f"{data}: of {counts['samples']} samples none was held out; hold out a larger share by --eval-split"
        )
    if not counts.get("samples"):
        raise DataError(_nothing(data, counts))


def _nothing(data: str, counts: Mapping[str, int]) -> str:
    """Why there is no sample, and what to do."""
    names = {
        "dropped_too_long": ("were too long", "use a larger --seq-length"),
        "dropped_empty": ("had nothing to learn", "give other data"),
        "eval_samples": ("were held out", "hold out a smaller share by --eval-split"),
    }
    said = [(f"{counts[name]} {what}", cure) for name, (what, cure) in names.items() if counts.get(name)]
    if not said:
        return f"{data} is empty: there is no row and no text in it; give other data"
    return f"{data} gives no sample: {', '.join(what for what, _ in said)}; {' or '.join(cure for _, cure in said)}"


def _check_lost(counts: Mapping[str, int], settings: Settings) -> None:
    """DataError where so much is too long that the data would not be what it was."""
    lost = counts.get("lost", 0)
    share = lost / max(1, lost + counts.get("tokens", 0) + counts.get("eval_tokens", 0))
    if settings.long == "refuse" and share > MOST_LOST:
        raise DataError(
            f"{counts['dropped_too_long']} samples have {settings.seq_length} tokens or more: {share:.0%} of all "
            f"tokens would be lost, more than {MOST_LOST:.0%}; use a larger --seq-length and train with it, or "
            "--long cut to keep their beginnings, or --long drop"
        )


def _said(counts: Mapping[str, int]) -> dict[str, Any]:
    """What the summary says: what is always said, all other counts that are not zero, and keys that are not used."""
    always = {name: counts.get(name, 0) for name in ALWAYS_SAID}
    others = {name: count for name, count in counts.items() if count and not name.startswith((MAPPED, UNUSED))}
    unused = [f"{name.removeprefix(UNUSED)} in {count}" for name, count in counts.items() if name.startswith(UNUSED)]
    return (
        always | others | ({"notes": [f"keys not used, and in how many rows: {', '.join(unused)}"]} if unused else {})
    )


def _processes(workers: int | None, sources: list[Source]) -> int:
    """As many as asked for, else one per core; never more than there are pieces for."""
    cores = len(os.sched_getaffinity(0))  # cpu_count() would count those that a container may not use
    return min(workers or cores, max(1, _size(sources) // PIECE_BYTES))


def _size(sources: list[Source]) -> int:
    return sum(source.path.stat().st_size for source in sources)


def _identity(sources: list[Source], settings: Settings) -> dict[str, Any]:
    """What must be equal in two calls for the second to continue the work of the first."""
    states = [(str(each.path.absolute()), each.path.stat().st_size, each.path.stat().st_mtime_ns) for each in sources]
    return {
        "files": states,
        "settings": {**vars(settings), "tokenizer": str(settings.tokenizer.absolute())},
        "tokenizer": [[file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(settings.tokenizer)],
    }
