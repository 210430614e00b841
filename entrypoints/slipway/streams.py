"""Printing that no work ends for: the reader of a stream may go, and the disk under it may be full."""

from __future__ import annotations

import os
from typing import TextIO


def put(text: str, stream: TextIO) -> None:
    """Print now; a stream that cannot be written is dropped."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        drop(stream)


def drop(stream: TextIO) -> None:
    """What is printed to a stream from here on, and at the end of the process, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
