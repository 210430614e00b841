"""Pieces of the input tokenised by several processes, and handed on in order."""

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
    """Each piece with what it became, in order, by as many processes; a few pieces ahead of the reader."""
    if workers == 1:
        for piece in todo:
            yield piece, encoder(piece)
        return
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
            f"{piece.file}: a process that tokenised it was ended from outside, by lack of memory most likely; "
            "use fewer --workers; the same command goes on where it was"
        ) from None


_encoder: Encoder  # of a worker process


def _begin_worker(settings: Settings) -> None:
    global _encoder
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(settings)


def _encode(piece: Piece) -> Encoded:
    return _encoder(piece)
