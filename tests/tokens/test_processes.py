"""Several processes that tokenise: the order of what they give back, how far they may be ahead, and their end.

The pool is one of this test, which does the work when it is asked for: so all of it is seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from slipway.errors import PreflightError
from slipway.tokens import parallel
from slipway.tokens.encoder import Encoder, Settings
from slipway.tokens.inputs import Piece, pieces
from slipway.tokens.sources import recognise


class Pool:
    """What is used of a ProcessPoolExecutor; nothing is done before somebody waits for it."""

    made: list[Pool]

    def __init__(self, workers: int, context: Any, begin: Callable, arguments: tuple) -> None:
        self.workers, self.method, self.begin, self.arguments = workers, context.get_start_method(), begin, arguments
        self.open = 0  # pieces that were given to it and not asked for yet
        self.most = 0
        self.ended: dict[str, Any] | None = None
        Pool.made.append(self)

    def submit(self, work: Callable, piece: Piece) -> Future:
        pool, self.open = self, self.open + 1
        self.most = max(self.most, self.open)

        class Late(Future):
            def result(self, timeout: float | None = None) -> Any:
                pool.open -= 1
                if piece.line == 13:
                    raise BrokenProcessPool
                return work(piece)

        return Late()

    def shutdown(self, **options: Any) -> None:
        self.ended = options


@pytest.fixture
def pool(monkeypatch) -> type[Pool]:
    Pool.made = []
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(parallel, "_encoder", lambda piece: f"tokens of {piece.line}", raising=False)
    return Pool


def some(numbers: range) -> list[Piece]:
    return [Piece(Path("x"), "text", 1, line=number) for number in numbers]


class Alone:
    """The encoder of this process."""

    settings = "the settings"

    def __call__(self, piece: Piece) -> str:
        return f"here {piece.line}"


@pytest.mark.parametrize("workers", [2, 3])
def test_all_pieces_come_in_order_and_no_worker_is_far_ahead(pool, workers):
    read: list[int] = []

    def todo():
        for piece in some(range(12)):
            read.append(piece.line)
            yield piece

    found = []
    for piece, tokens in parallel.encoded(todo(), Alone(), workers):
        found.append((piece.line, tokens))
        assert len(read) - len(found) <= 2 * workers, "no more is read than two pieces for each worker"
    assert found == [(number, f"tokens of {number}") for number in range(12)]
    (made,) = pool.made
    assert (made.workers, made.method, made.arguments) == (workers, "spawn", ("the settings",))
    assert made.begin is parallel._begin_worker and made.most == 2 * workers + 1, "and no fewer are ahead"
    assert made.ended == {"cancel_futures": True}


def test_one_worker_is_this_process(pool):
    assert [tokens for _, tokens in parallel.encoded(some(range(2)), Alone(), 1)] == ["here 0", "here 1"]
    assert not pool.made


def test_a_process_that_was_killed_is_said_with_its_file(pool):
    with pytest.raises(PreflightError, match=r"^x: a process .* was killed.*fewer --workers"):
        list(parallel.encoded(some(range(10, 15)), Alone(), 2))
    assert pool.made[0].ended == {"cancel_futures": True}


def test_whoever_stops_listening_ends_the_pool(pool):
    todo = parallel.encoded(some(range(12)), Alone(), 2)
    next(todo)
    todo.close()
    assert pool.made[0].ended == {"cancel_futures": True}


def test_a_worker_encodes_as_this_process_does(mxfp4_model, tmp_path, monkeypatch):
    died: list[str] = []
    monkeypatch.setattr(parallel, "die_with_parent", lambda: died.append("asked for"))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    (tmp_path / "a.txt").write_text("some words of a text\n" * 9)
    (piece,) = pieces([recognise(tmp_path / "a.txt")])
    settings = Settings(mxfp4_model, 16)
    parallel._begin_worker(settings)
    assert died == ["asked for"] and os.environ.pop("TOKENIZERS_PARALLELISM") == "false"
    found, wanted = parallel._encode(piece), Encoder(settings)(piece)
    assert (found.parts, found.counts) == (wanted.parts, wanted.counts) and found.counts["samples"] > 2
