"""YAML of what JSON can hold, for people to read: blocks, and quotes only where a word could be something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# A word that no reader of YAML takes for a number, a truth, nothing, or the beginning of something else.
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*")
UNSEEN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # what YAML lets nobody write as it is
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


def dump(*documents: Any) -> str:
    """The documents as one text."""
    return "---\n".join("".join(f"{line}\n" for line in _lines(document)) for document in documents)


def _lines(value: Any) -> Iterator[str]:
    """The lines of a dict or a list that is not empty."""
    for key, one in value.items() if isinstance(value, dict) else [(None, one) for one in value]:
        head = "-" if key is None else f"{_scalar(key)}:"
        if not isinstance(one, (dict, list)) or not one:
            yield f"{head} {_scalar(one)}"
            continue
        inner = list(_lines(one))
        if key is None:
            yield f"- {inner[0]}"
            yield from (f"  {line}" for line in inner[1:])
        else:
            yield head
            yield from (f"  {line}" for line in inner)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
