"""Rows and texts → token ids, with the model's own tokenizer: a piece of the input in, a piece of the output out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from slipway.errors import DataError, UsageError
from slipway.tokens import limits
from slipway.tokens.chat import Segments, Template
from slipway.tokens.forms import Example, Form, Pair, form_of, present, refuse_wrapped, shown
from slipway.tokens.inputs import Piece
from slipway.tokens.lines import Sample, Span, as_line
from slipway.tokens.messages import Chat, Malformed
from slipway.tokens.rows import rows_of
from slipway.tokens.sources import TEXT, decoded
from slipway.tokens.vocabulary import folder_of, loaded, panics_named, quiet_panics

CONTENT, LENGTHS, ENDS = "content", "lengths", "ends"  # the parts of a piece of the output
# Characters that are encoded at once; a text of more is encoded in parts. The library takes some 180 bytes for each.
LONGEST_ENCODED = 1 << 20
HELD_OUT = "eval-"  # before the name of a part: of what is held out
MAPPED = "map "  # before the name of a count: rows that had a key of --map
UNUSED = "unused "  # the same: rows that had a key of which nothing is made


@dataclass(frozen=True)
class Settings:
    """Together with the input, this decides every byte of the output.

    Args:
        tokenizer: folder with tokenizer.json.
        append_eos: after each text and each completion.
        indexed: .bin and .idx of texts, not JSON lines of samples.
        learn: all or last: which of the assistant's turns.
        long: what becomes of samples that are too long: see wanted.py.
        pairs: text, chat or auto: how a prompt and its completion are written.
        renamed: (their key, ours) of rows.
        arguments: of the chat template, as JSON.
        held_out: share of the rows.
        day: of templates that write the day's date.
    """

    tokenizer: Path
    seq_length: int
    append_eos: bool = True
    indexed: bool = False
    learn: str = "all"
    long: str = "refuse"
    pairs: str = "auto"
    renamed: tuple[tuple[str, str], ...] = ()
    arguments: str = "{}"
    held_out: float = 0.0
    day: str = "2026-01-01"


@dataclass
class Encoded:
    """A piece of the output: its parts by name, and its counts."""

    parts: dict[str, bytes] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Document:
    """The tokens of a row, or of a part of a text.

    Args:
        ends: a text ends with it.
        name: what decides whether it is held out; empty: its tokens do.
    """

    samples: list[Sample]
    ends: bool = True
    name: str = ""


class Encoder:
    """Encodes with `tokenizers`, and chats with the model's chat template."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, folder_of(settings.tokenizer)
        self.tokenizer = loaded(self.folder.path)
        self.longest = int(LONGEST_ENCODED / limits.check(self.tokenizer, self.folder.path / "tokenizer.json"))
        with panics_named(self.folder.path / "tokenizer.json"):
            self._learn_of(settings)

    def _learn_of(self, settings: Settings) -> None:
        """What has to be known of the tokenizer; UsageError for arguments that its template does not know."""
        if unknown := [name for name in json.loads(settings.arguments) if not self.folder.knows(name)]:
            raise UsageError(
                f"--template-args: no chat template of {self.folder.path} knows {', '.join(map(shown, unknown))}, so "
                "nothing would change; correct the name, or leave it out"
            )
        self.begin = self.folder.begin(self.tokenizer)
        self.end = [self.folder.end(self.tokenizer)] if settings.append_eos else []
        # Megatron chooses the dtype in the same way, so that both write the same bytes.
        self.dtype = np.uint16 if self.tokenizer.get_vocab_size() < 65500 else np.int32
        self.renamed = dict(settings.renamed)
        # Tokenizers of Llama 2's kind begin every text with a space, also where it goes on.
        self._adds_space = self.tokenizer.encode("aa", add_special_tokens=False).tokens[:1] not in (["aa"], ["a"])
        self._templates: dict[bool, Template] = {}

    def __call__(self, piece: Piece) -> Encoded:
        """The output for a piece; DataError names the file and the line that are malformed."""
        result, lines = Encoded(), _Parts(self.settings.indexed, self.dtype)
        with self.guarded():
            for document in self.documents(piece, result.counts):
                held = self._is_held_out(document)
                for sample in self._fitting(document.samples, result.counts):
                    lines.add(HELD_OUT if held else "", sample, document.ends)
                    self._count(sample, document.ends, held, result.counts)
        result.parts = lines.joined()
        return result

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around the work on one piece: a tokenizer that panics says one line, and one that never ends is ended."""
        file = self.folder.path / "tokenizer.json"
        slow = f"{file} takes more than {limits.SECONDS:.0f} s for a piece of the data; give another --tokenizer"
        with limits.limited(slow, limits.SECONDS), quiet_panics():
            yield

    def documents(self, piece: Piece, counts: Counter[str]) -> Iterator[Document]:
        """The rows of a piece as tokens, or the part of a text that it is."""
        if piece.kind == TEXT:
            yield from self._text(piece)
            return
        for where, row in rows_of(piece):
            try:
                form, row = self.recognised(row, counts)
                counts[f"{form.name} rows".replace(" ", "_")] += 1
                yield Document(self._samples(form.build(row), counts))
            except Malformed as error:
                raise DataError(f"{where}: {error}") from None

    def recognised(self, row: Any, counts: Counter[str]) -> tuple[Form, Any]:
        """The form of a row, and the row without nulls under our names."""
        for theirs in self.renamed:
            counts[f"{MAPPED}{theirs}"] += isinstance(row, dict) and theirs in row
        nulls = [key for key, value in row.items() if value is None] if isinstance(row, dict) else []
        row = present(row, self.renamed)
        if self.settings.indexed and not (isinstance(row, dict) and isinstance(row.get("text"), str)):
            refuse_wrapped(row)
            raise Malformed('not an object with "text", which OUT.bin needs; write to OUT.jsonl instead')
        # A text beside an instruction is the text: whole texts are all that OUT.bin takes.
        form = form_of({"text": row["text"]} if self.settings.indexed else row, nulls)
        counts.update(UNUSED + shown(key) for key in form.unused(row))
        return form, row

    # ------------------------------------------------------------------------ one example

    def _samples(self, example: Example, counts: Counter[str]) -> list[Sample]:
        if isinstance(example, str):
            ids = self.encode(example)
            return self._windows(self._begun(ids) + self.end if ids else [])
        if isinstance(example, Pair):
            if not example.completion:
                return [Sample([], [])]
            as_text = self.settings.pairs == "text" or not (
                self.settings.pairs == "chat" or (example.prefers_chat and self.folder.has_template)
            )
            if as_text:
                found = self._marked([(example.prompt, False), (example.completion, True)])
                return [Sample(self._begun(found.prompt), found.response + self.end if found.response else [])]
            example = example.chat()
        return self._chat(example, counts) if isinstance(example, Chat) else [example]

    def _chat(self, chat: Chat, counts: Counter[str]) -> list[Sample]:
        template = self._template(bool(chat.tools))
        counts.update(f"{UNUSED}{shown(key)} of messages" for key in chat.unused)
        rendered = template.render(chat, self.settings.learn == "last")
        counts.update(rendered.counts)
        return [self._marked(segments) for segments in rendered.samples] or [Sample([], [])]

    def _template(self, with_tools: bool) -> Template:
        if with_tools not in self._templates:
            tokens = self.tokenizer.get_added_tokens_decoder().values()
            self._templates[with_tools] = Template(
                self.folder.template(with_tools),
                self.folder.special,
                [token.content for token in tokens if token.special],
                json.loads(self.settings.arguments),
                date.fromisoformat(self.settings.day),
            )
        return self._templates[with_tools]

    def _marked(self, segments: Segments) -> Sample:
        """The tokens of texts of which some are learned.

        Each part is encoded alone: so the tokens before an answer are those that the model will see when it is asked.
        """
        joined = self._adds_space and sum(len(text) for text, _ in segments) <= self.longest
        parts = self._with_offsets(segments) if joined else [(self.encode(t), on) for t, on in segments]
        parts = [(ids, learned) for ids, learned in parts if ids]
        while parts and not parts[-1][1]:
            parts.pop()  # nothing learned follows
        first = next((number for number, (_, learned) in enumerate(parts) if learned), len(parts))
        prompt = [token for ids, _ in parts[:first] for token in ids]
        response, context = list[int](), list[Span]()
        for ids, learned in parts[first:]:
            if not learned:
                context.append((len(response), len(response) + len(ids)))
            response += ids
        return Sample(prompt, response, tuple(context))

    def _with_offsets(self, segments: Segments) -> list[tuple[list[int], bool]]:
        """The tokens of the joined text; one that reaches over a border belongs to the part in which it ends."""
        with self._texts_checked():
            encoding = self.tokenizer.encode("".join(text for text, _ in segments), add_special_tokens=False)
        ends = np.cumsum([len(text) for text, _ in segments])
        owners = np.searchsorted(ends, [max(end, 1) for _, end in encoding.offsets])
        ids = np.array(encoding.ids)
        return [(ids[owners == number].tolist(), learned) for number, (_, learned) in enumerate(segments)]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        if len(text) > self.longest:
            return [token for part in _parts_of(text, self.longest) for token in self.encode(part)]
        # Of a batch of one: a quarter faster, since it does not note where in the text each token stands.
        with self._texts_checked():
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @contextmanager
    def _texts_checked(self) -> Iterator[None]:
        """Around every encoding: what no text can hold is Malformed, and a panic is named."""
        try:
            with panics_named(self.folder.path / "tokenizer.json"):
                try:
                    yield
                except TypeError:  # JSON may spell what no text can hold
                    raise _NoText from None
        except _NoText:
            raise Malformed("half of a surrogate pair, which is no character; fix the text") from None

    def _begun(self, ids: list[int]) -> list[int]:
        """The tokens of a text with what comes before a text; once, also where the text has it already."""
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def _text(self, piece: Piece) -> Iterator[Document]:
        ids = self.encode(decoded(piece.read(), str(piece.file), piece.line))
        ids = (self._begun(ids) if piece.begins_file else ids) + (self.end if piece.ends_file else [])
        if self.settings.indexed:
            # A text may be in several pieces, which must not be torn apart: its name decides.
            yield Document([Sample([], ids)], piece.ends_file, piece.file.name)
            return
        for sample in self._windows(ids):
            yield Document([sample])

    # ------------------------------------------------------------------------ what becomes of it

    def _windows(self, ids: list[int]) -> list[Sample]:
        """Consecutive windows of seq_length - 1 tokens, all of them learned; OUT.bin takes texts whole."""
        if not ids or ids == self.end:  # an end alone teaches nothing
            return [Sample([], [])]
        size = len(ids) if self.settings.indexed else self.settings.seq_length - 1
        return [Sample([], ids[start : start + size]) for start in range(0, len(ids), size)]

    def _fitting(self, samples: Iterable[Sample], counts: Counter[str]) -> Iterator[Sample]:
        """The samples that teach something and are short enough; the rest is counted."""
        for sample in samples:
            length = len(sample.prompt) + len(sample.response)
            if not sample.response or (length < 2 and not self.settings.indexed):
                counts["dropped_empty"] += 1
            elif length < self.settings.seq_length or self.settings.indexed:
                yield sample
            elif (kept := self._cut(sample)) is not None:
                counts["cut"] += 1
                counts["lost"] += length - len(kept.prompt) - len(kept.response)
                yield kept
            else:
                counts["dropped_too_long"] += 1
                counts["lost"] += length

    def _cut(self, sample: Sample) -> Sample | None:
        """The beginning of a sample; None if samples are not cut, or if nothing that is learned would be left."""
        size = self.settings.seq_length - 1 - len(sample.prompt)
        if self.settings.long != "cut" or size < 1:
            return None
        context = tuple((start, min(end, size)) for start, end in sample.context if start < size)
        if context and context[-1][1] == size:
            size, context = context[-1][0], context[:-1]
        return Sample(sample.prompt, sample.response[:size], context)

    def _is_held_out(self, document: Document) -> bool:
        """A row's own tokens decide, so that equal rows are never on both sides, in whatever order they come."""
        if not self.settings.held_out:
            return False
        tokens = b"".join(np.array([*s.prompt, *s.response], np.int64).tobytes() for s in document.samples)
        number = int.from_bytes(blake2b(document.name.encode() or tokens, digest_size=8).digest(), "big")
        return number < self.settings.held_out * 2**64

    def _count(self, sample: Sample, ends: bool, held: bool, counts: Counter[str]) -> None:
        unlearned = sum(end - start for start, end in sample.context)
        before = "eval_" if held else ""
        counts[f"{before}samples"] += ends
        counts[f"{before}tokens"] += len(sample.prompt) + len(sample.response)
        counts[f"{before}learned"] += len(sample.response) - unlearned


class _NoText(DataError):
    """A text that no file can hold."""


def _parts_of(text: str, longest: int) -> Iterator[str]:
    """A text in parts that can be encoded, each of which begins with white space where there is some."""
    at = 0
    while at < len(text):
        end = at + longest
        if end < len(text):
            end = max(text.rfind(mark, at + longest // 2, end) for mark in " \n")
            end = end if end > at else at + longest
        yield text[at:end]
        at = end


class _Parts:
    """The bytes of the output while a piece is encoded."""

    def __init__(self, indexed: bool, dtype: type[np.integer]) -> None:
        self.indexed, self.dtype = indexed, dtype
        self.found: dict[str, list[bytes]] = {}

    def add(self, before: str, sample: Sample, ends: bool) -> None:
        """Add a sample; `before` stands before the names of its parts."""
        if not self.indexed:
            self.found.setdefault(before + CONTENT, []).append(as_line(*sample))
            return
        ids = np.asarray(sample.response, dtype=self.dtype)
        for name, content in (
            (CONTENT, ids.tobytes()),
            (LENGTHS, np.array([len(ids)], np.int32).tobytes()),
            (ENDS, np.array([ends], bool).tobytes()),
        ):
            self.found.setdefault(before + name, []).append(content)

    def joined(self) -> dict[str, bytes]:
        """Name → bytes."""
        return {name: b"".join(contents) for name, contents in self.found.items()}
