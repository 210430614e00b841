"""What `preprocess` says before it works: what it has recognised, and the first samples with what is learned marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from slipway.tokens.encoder import Encoder
from slipway.tokens.folders import Inputs
from slipway.tokens.forms import shown
from slipway.tokens.inputs import Piece, pieces
from slipway.tokens.lines import Sample
from slipway.tokens.rows import rows_of
from slipway.tokens.sources import TEXT
from slipway.untrusted import tell

TEXT_BYTES = 2000  # of a text, to be shown
PART = 400  # characters of each part of a sample


def preview(data: Path, inputs: Inputs, encoder: Encoder, count: int) -> None:
    """Say on standard error what is read, of which form the rows are, and how the first samples look."""
    _say(inputs.describe(data))
    if "auto_map" in encoder.folder.config:
        _say("the tokenizer has code of its own (auto_map), which is never run: tokenizer.json alone is used")
    first = next(pieces(inputs.sources), None)
    if first is None:
        return
    if first.kind == TEXT:
        first = replace(first, content=first.read()[:TEXT_BYTES].decode(errors="ignore").encode(), ends_file=False)
    with encoder.guarded():  # a malformed row is named here, before any work
        samples = list(islice(_samples(first, encoder), max(count, 1)))
    if first.kind != TEXT:
        _say_form(first, encoder)
    for number, sample in enumerate(samples[:count], 1):
        length = len(sample.prompt) + len(sample.response)
        _say(f"sample {number} of {length} tokens, ⟦learned⟧:\n{_shown(sample, encoder)}")


def _samples(piece: Piece, encoder: Encoder) -> Iterator[Sample]:
    for document in encoder.documents(piece, Counter()):
        yield from (sample for sample in document.samples if sample.response)


def _say_form(piece: Piece, encoder: Encoder) -> None:
    """The form of the first row, and what of the row is not used."""
    row = next((row for _, row in rows_of(piece)), None)
    if row is None:
        return
    form, row = encoder.recognised(row, Counter())
    unused = form.unused(row)
    _say(f"rows of {form.name}" + (f"; not used: {', '.join(map(shown, unused))}" if unused else ""))


def _shown(sample: Sample, encoder: Encoder) -> str:
    """A sample as text, the learned parts in brackets, long parts shortened."""
    parts, at = [(sample.prompt, False)], 0
    for start, end in sample.context:
        parts += [(sample.response[at:start], True), (sample.response[start:end], False)]
        at = end
    parts.append((sample.response[at:], True))
    text = "".join(_part(encoder, ids, learned) for ids, learned in parts if ids)
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _part(encoder: Encoder, ids: list[int], learned: bool) -> str:
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > PART:
        text = f"{text[: PART // 2]} … {text[-PART // 2 :]}"
    # A stranger's text may hold what moves the cursor of a terminal.
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return f"⟦{text}⟧" if learned else text


def _say(line: str) -> None:
    tell(f"preprocess: {line}")
