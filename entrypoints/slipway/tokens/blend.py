"""Several files of tokens in one run, each with a weight: `web.bin:7,code.bin:3`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slipway.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Part:
    """One file, and its part of the sequences of a run, more than 0 and at most 1."""

    path: Path
    share: float


def parts_of(data: str, where: str = "--data") -> list[Part]:
    """The files that a person named: one path, or PATH:WEIGHT with commas between. Weights are relative to their sum.

    Args:
        where: the flag, for messages.

    Errors: UsageError for a part without a weight, a weight that is not a positive number, or the same file twice.
    """
    if Path(data).is_file() or not re.search(r":[^/]*(,|$)", data):  # a file may have any name
        return [Part(Path(data), 1.0)]
    weights: dict[Path, float] = {}
    for word in data.split(","):
        name, _, number = word.rpartition(":")
        weight = _positive(number)
        if not name or weight is None:
            raise UsageError(
                f"{where} {data}: {word!r} is not PATH:WEIGHT with a weight above 0; write it as a.bin:0.7"
            )
        if Path(name) in weights:
            raise UsageError(f"{where} {data} names {name} twice; name it once with the sum of the weights")
        weights[Path(name)] = weight
    total = sum(weights.values())
    return [Part(path, weight / total) for path, weight in weights.items()]


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None


def as_text(parts: list[Part]) -> str:
    """The same parts as `parts_of` reads them, with absolute paths."""
    if len(parts) == 1:
        return str(parts[0].path.absolute())
    return ",".join(f"{part.path.absolute()}:{part.share:.6g}" for part in parts)


def order(shares: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part each sequence of a run is from, int16 [count], and its number among those of that part, int64 [count].

    Sequence k of a part with share s has its place at (k + ½) / s, so that every stretch of a run is a blend too. The
    beginning does not depend on `count`: a run that goes on for longer continues the same order.
    """
    import numpy as np  # not above: every --help reads this file

    places, parts, numbers = [], [], []
    for part, share in enumerate(shares):
        own = np.arange(math.ceil(count * share) + 1)
        places.append((own + 0.5) / share)
        parts.append(np.full(len(own), part, np.int16))
        numbers.append(own)
    first = np.argsort(np.concatenate(places), kind="stable")[:count]
    return np.concatenate(parts)[first], np.concatenate(numbers)[first]
