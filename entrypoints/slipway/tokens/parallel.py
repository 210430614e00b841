"""Several processes tokenise pieces of the input; the results come in the order of the input."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from slipway.errors import PreflightError
from slipway.signals import die_with_parent
from slipway.tokens.encoder import Encoded, Encoder, Settings
from slipway.tokens.inputs import Piece


def encoded(todo: Iterable[Piece], encoder: Encoder, workers: int) -> Iterator[tuple[Piece, Encoded]]:
    """(piece, its output) of each piece, in order.

    Args:
        workers: processes that tokenise; 1 = this one. They work at most two pieces each ahead of the reader, which
            bounds the memory.
    """
    if workers == 1:
        for piece in todo:
            yield piece, encoder(piece)
        return
    # Not by fork: the tokenizer's threads would not exist in the child, and their locks might be held for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (encoder.settings,))
    ahead: deque[tuple[Piece, Future[Encoded]]] = deque()
    try:
        for piece in todo:
            ahead.append((piece, pool.submit(_encode, piece)))
            if len(ahead) > 2 * workers:
                yield _first_of(ahead)
        while ahead:
            yield _first_of(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _first_of(ahead: deque[tuple[Piece, Future[Encoded]]]) -> tuple[Piece, Encoded]:
    piece, future = ahead.popleft()
    try:
        return piece, future.result()
    except BrokenProcessPool:
        raise PreflightError(
            f"{piece.file}: a process that tokenised it was killed, probably because memory ran out; "
            "run the same command with fewer --workers, it continues where it stopped"
        ) from None


_encoder: Encoder  # of a worker process


def _begin_worker(settings: Settings) -> None:
    global _encoder
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes use all cores already
    _encoder = Encoder(settings)


def _encode(piece: Piece) -> Encoded:
    return _encoder(piece)
