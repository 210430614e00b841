"""Text → token ids, with the model's own tokenizer: one piece of the input in, one piece of the output out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import locate
from slipway.errors import DataError, UsageError
from slipway.tokens.inputs import Piece
from slipway.tokens.lines import as_line, inputs_of

Sample = tuple[list[int], list[int]]  # (p_ids, r_ids)


@dataclass(frozen=True)
class Settings:
    """Together with the input, this decides every byte of the output."""

    tokenizer: Path  # folder with tokenizer.json
    seq_length: int
    append_eos: bool  # after each document and each completion
    indexed: bool  # .bin and .idx of documents, not JSON lines of samples


@dataclass
class Encoded:
    """A piece of the output, and its counts."""

    content: bytes = b""
    # Only for .bin; empty for JSON lines.
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # tokens of each sequence
    ends: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # which of these sequences end a document
    samples: int = 0
    tokens: int = 0
    dropped_too_long: int = 0
    dropped_empty: int = 0

    def counts(self) -> dict[str, int]:
        """The counts, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


def tokenizer_folder(model: str) -> Path:
    """The folder with a model's tokenizer.json; UsageError if there is none.

    Args:
        model: a folder, hf://org/name[@revision] or nemo://name.
    """
    base = locate.locate(model, files=locate.TOKENIZER)
    for folder in (base, base / "context" / "nemo_tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UsageError(f"--tokenizer {model} has no tokenizer.json; give the folder of a model that has one")


class Encoder:
    """Encodes plain text with `tokenizers`, and chats with the chat template that transformers reads.

    transformers takes seconds to import, so it is imported only when there is a chat.
    """

    def __init__(self, settings: Settings) -> None:
        from tokenizers import Tokenizer

        self.settings, self.folder = settings, settings.tokenizer
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.end = [self._end_of_text()] if settings.append_eos else []
        # Megatron chooses the dtype in the same way, so that both write the same bytes.
        self.dtype = np.uint16 if self.tokenizer.get_vocab_size() < 65500 else np.int32
        self._chat: Any = None

    def _end_of_text(self) -> int:
        path = self.folder / "tokenizer_config.json"
        token = json.loads(path.read_text()).get("eos_token") if path.is_file() else None
        token = token["content"] if isinstance(token, dict) else token
        number = self.tokenizer.token_to_id(token) if token else None
        if number is None:
            raise UsageError(f"{path} has no eos_token; add one, or use --no-append-eos")
        return number

    def __call__(self, piece: Piece) -> Encoded:
        """The output for a piece; DataError names the file and the line that are malformed."""
        return self._documents(piece) if self.settings.indexed else self._samples(piece)

    def _samples(self, piece: Piece) -> Encoded:
        result, lines = Encoded(), []
        for prompt, response in self._samples_of(piece):
            length = len(prompt) + len(response)
            if not response or length < 2:
                result.dropped_empty += 1
            elif length >= self.settings.seq_length:
                result.dropped_too_long += 1
            else:
                lines.append(as_line(prompt, response))
                result.samples, result.tokens = result.samples + 1, result.tokens + length
        result.content = b"".join(lines)
        return result

    def _samples_of(self, piece: Piece) -> Iterator[Sample]:
        if piece.file.suffix != ".jsonl":
            yield from self._windows(self._text(piece))
            return
        forms: dict[str, Callable[[dict], Iterator[Sample]]] = {
            "text": lambda entry: self._windows(self.encode(entry["text"]) + self.end),
            "prompt": lambda entry: iter([self._completed(entry)]),
            "messages": lambda entry: iter([self.encode_chat(entry["messages"])]),
            "inputs": lambda entry: iter([inputs_of(entry)]),
        }
        for where, entry in _entries(piece):
            try:
                form = next(key for key in forms if key in entry)
                samples = list(forms[form](entry))
            except (ValueError, LookupError, TypeError, StopIteration):  # what any other JSON leads to above
                raise DataError(
                    f'{where}: not an object with "text", "prompt" and "completion", "messages", or "inputs" with '
                    '"p_ids" and "r_ids"; fix or delete the line'
                ) from None
            yield from samples

    def _documents(self, piece: Piece) -> Encoded:
        result, ids, ends = Encoded(), [], []
        for document, ends_here in self._documents_of(piece):
            if not document:
                result.dropped_empty += 1
                continue
            ids.append(document)
            ends.append(ends_here)
        result.content = b"".join(np.asarray(each, dtype=self.dtype).tobytes() for each in ids)
        result.lengths, result.ends = np.array([len(each) for each in ids], np.int32), np.array(ends, bool)
        result.samples, result.tokens = int(result.ends.sum()), int(result.lengths.sum())
        return result

    def _documents_of(self, piece: Piece) -> Iterator[tuple[list[int], bool]]:
        if piece.file.suffix != ".jsonl":
            yield self._text(piece), piece.ends_file
            return
        for where, entry in _entries(piece):
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise DataError(f'{where}: not an object with "text", which OUT.bin needs; write to OUT.jsonl instead')
            ids = self.encode(entry["text"])
            yield (ids + self.end if ids else []), True

    def _text(self, piece: Piece) -> list[int]:
        try:
            text = piece.read().decode()
        except UnicodeDecodeError as error:
            at = piece.start + error.start
            raise DataError(f"{piece.file}: byte {at} is not UTF-8 text; convert it to UTF-8 or remove it") from None
        return self.encode(text) + (self.end if piece.ends_file else [])

    def _windows(self, ids: list[int]) -> Iterator[Sample]:
        """Consecutive windows of seq_length - 1 tokens; all of the tokens are learned."""
        size = self.settings.seq_length - 1
        for start in range(0, len(ids), size) if ids != self.end else ():  # an end alone teaches nothing
            yield [], ids[start : start + size]

    def _completed(self, entry: dict[str, str]) -> Sample:
        completion = self.encode(entry["completion"])
        return self.encode(entry["prompt"]), completion + self.end if completion else []

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> Sample:
        """(tokens up to the last message, tokens of the last message) under the chat template."""
        if not messages or not all(isinstance(message["content"], str) and message["role"] for message in messages):
            raise ValueError
        if self._chat is None:
            from transformers import AutoTokenizer

            self._chat = AutoTokenizer.from_pretrained(self.folder)
            if not self._chat.chat_template:
                raise DataError(
                    f"{self.folder}: the tokenizer has no chat template; use prompt and completion instead of messages"
                )
        prompt = self._chat.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        # As text, not as tokens: only text shows whether the template left the earlier messages unchanged.
        whole = self._chat.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{self.folder}: the chat template changes earlier messages when a message is added; "
                "use prompt and completion instead of messages"
            )
        return self.encode(prompt), self.encode(whole[len(prompt) :])


def _entries(piece: Piece) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", the JSON value) of each line; DataError for a line that is not JSON."""
    for number, line in enumerate(piece.read().removesuffix(b"\n").split(b"\n"), piece.line):
        where = f"{piece.file}:{number}"
        try:
            yield where, json.loads(line)
        except ValueError:
            raise DataError(f"{where}: not JSON; fix or delete the line") from None
