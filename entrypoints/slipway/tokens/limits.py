"""What a tokenizer of a stranger may take: how much longer it makes a text, and how long it may work on it.

A tokenizer.json is a program of its own kind: its normalizer replaces letters by texts, forty times in a row if it says
so, and its patterns may try for ever. The library does all of it in one call that cannot be interrupted.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.untrusted import harmless

# Characters for one, at most, of what no file can change: Unicode's forms have a letter that becomes 18.
STANDARD = {"NFKC": 18, "NFKD": 18, "BertNormalizer": 4, "NFD": 4, "NFC": 3, "Lowercase": 3, "ByteLevel": 4, "Nmt": 1}
MOST = 64  # times as long; published ones replace a space by a mark, and take a form of Unicode's
LONGEST_ADDED = 1000  # characters or tokens that come before or after every text
SECONDS = 120.0  # of the processor for a piece of 1 MB, which takes about one


def growth(parts: list[dict[str, Any]]) -> float:
    """How many times as long a text can get that goes through all of these normalizers or decoders."""
    found = 1.0
    for part in parts:
        found = min(found * _growth(part), float(1 << 60))  # a number that is larger says no more
    return found


def _growth(part: dict[str, Any]) -> float:
    kind = part.get("type")
    if kind == "Sequence":
        return growth(part.get("normalizers") or part.get("decoders") or [])
    if kind == "Replace":
        pattern, content = part.get("pattern", {}), len(part.get("content", ""))
        # A regular expression may match between two letters, which both stay.
        return max(1.0, content / max(len(pattern["String"]), 1)) if pattern.get("String") else 1.0 + content
    if kind == "Precompiled":
        return max(STANDARD["NFKC"], _longest_of(part.get("precompiled_charsmap") or ""))
    if kind == "Prepend":
        return 1.0 if len(part.get("prepend", "")) <= LONGEST_ADDED else float(MOST + 1)
    return float(STANDARD.get(str(kind), 1))


def _longest_of(charsmap: str) -> int:
    """Characters of the longest text that SentencePiece's table puts in the place of others.

    The table is the size of an index in four bytes, the index, then the texts, each ended by a zero byte.
    """
    table = base64.b64decode(charsmap)
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=0)


def check(tokenizer: Any, file: Path) -> float:
    """How much longer it makes a text; DataError for one that makes it much longer."""
    found = {name: _state(getattr(tokenizer, name)) for name in ("normalizer", "decoder", "post_processor")}
    grown = growth(found["normalizer"])
    for name, times in (("normalizer", grown), ("decoder", growth(found["decoder"]))):
        if times > MOST:
            raise DataError(
                f"{file}: its {name} makes a text {times:,.0f} times as long, more than {MOST}; copy it again"
            )
    if (added := sum(map(_added, found["post_processor"]))) > LONGEST_ADDED:
        raise DataError(f"{file}: it adds {added:,} tokens to each text, more than {LONGEST_ADDED}; copy it again")
    return grown


def _state(part: Any) -> list[dict[str, Any]]:
    return [] if part is None else [json.loads(part.__getstate__())]


def _added(part: dict[str, Any]) -> int:
    """Tokens that a post-processor adds to a text."""
    if part.get("type") == "Sequence":
        return sum(map(_added, part.get("processors") or []))
    added = part.get("special_tokens") or {}
    names = [piece["SpecialToken"]["id"] for piece in part.get("single") or [] if "SpecialToken" in piece]
    return sum(len(added[name]["ids"]) for name in names) if isinstance(added, dict) else 0


@contextmanager
def limited(why: str, seconds: float) -> Iterator[None]:
    """Ends the process with one line if what is in the block takes the processor for longer.

    Another thread does it: the library lets others run, but no signal reaches Python before its call returns.
    """
    done, begun, screen = threading.Event(), time.process_time(), os.dup(2)  # which is silent while the library works

    def watch() -> None:
        while not done.wait(min(1.0, seconds)):
            if time.process_time() - begun > seconds:
                with suppress(OSError):  # nobody reads it any more; the process has to end all the same
                    os.write(screen, f"slipway: {harmless(why)}\n".encode())
                os._exit(DataError.exit_code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.close(screen)
