"""`slipway preprocess`: text, prompts or chats → the JSON lines of tokens that `train` reads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entrypoints.checkpoint import locate
from entrypoints.errors import DataError, UsageError, WriteError
from entrypoints.report import Progress, Summary

Sample = tuple[list[int], list[int]]  # (p_ids, r_ids)
TEXT_SUFFIXES = (".txt", ".md", ".py")


def preprocess(data: str, out: str, *, tokenizer: str, seq_length: int = 6144) -> Summary:
    """Turn text, prompts with completions, or chats into token data for `train`.

    A text file is cut into windows of SEQ_LENGTH - 1 tokens, all of them learned. A .jsonl file holds one object a
    line: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}, whose last message is learned
    under the chat template of the tokenizer. Samples of SEQ_LENGTH tokens or more, and those that leave nothing to
    learn, are dropped and counted.

    Args:
        data: a text or .jsonl file, or a folder of them.
        out: the .jsonl file to write.
        tokenizer: model whose tokenizer is used: a folder, hf://org/name[@revision] or nemo://name.
        seq_length: the limit that training will have.
    """
    started = time.monotonic()
    files, folder, target = _files(Path(data)), _tokenizer_folder(tokenizer), Path(out)
    if target.exists():
        raise UsageError(f"{target} exists; remove it or choose another OUT")
    if seq_length < 3:
        raise UsageError(f"--seq-length is {seq_length}; a sample that teaches anything needs at least 3")
    encoder = Encoder(folder)
    part = target.with_name(f".{target.name}.partial")
    kept = too_long = empty = tokens = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            part.open("w") as output,
            Progress("preprocess", sum(f.stat().st_size for f in files)) as progress,
        ):
            for file in files:
                for prompt, response in samples_of(file, encoder, seq_length):
                    length = len(prompt) + len(response)
                    if not response or length < 2:
                        empty += 1
                    elif length >= seq_length:
                        too_long += 1
                    else:
                        output.write(json.dumps({"inputs": {"p_ids": prompt, "r_ids": response}}) + "\n")
                        kept, tokens = kept + 1, tokens + length
                progress.advance(file.stat().st_size)
            output.flush()
            os.fsync(output.fileno())
        if not kept:
            raise DataError(
                f"{data}: no sample is left, {too_long} were too long and {empty} empty; raise --seq-length"
            )
        os.replace(part, target)
    except OSError as error:
        raise WriteError(
            f"{target} cannot be written: {error.strerror}; free some space or choose another OUT"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    details = {"samples": kept, "tokens": tokens, "dropped_too_long": too_long, "dropped_empty": empty}
    return Summary("preprocess", str(target), target.stat().st_size, time.monotonic() - started, details)


def _files(data: Path) -> list[Path]:
    if not data.exists():
        raise UsageError(f"DATA {data} does not exist")
    if data.is_file():
        return [data]
    files = sorted(file for file in data.rglob("*") if file.suffix in (*TEXT_SUFFIXES, ".jsonl") and file.is_file())
    if not files:
        raise DataError(f"{data} holds no {', '.join(TEXT_SUFFIXES)} or .jsonl file")
    return files


def _tokenizer_folder(model: str) -> Path:
    base = locate.locate(model, files=locate.TOKENIZER)
    for folder in (base, base / "context" / "nemo_tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UsageError(f"--tokenizer {model} has no tokenizer.json; give the folder of the model")


class Encoder:
    """The model's tokenizer: plain text by `tokenizers`, chats by the template that transformers knows."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self.text = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._chat: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, special tokens left out."""
        return self.text.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> Sample:
        """(tokens up to the last message, tokens of the last message) under the chat template."""
        if not messages or not all(isinstance(message["content"], str) and message["role"] for message in messages):
            raise ValueError
        if self._chat is None:
            from transformers import AutoTokenizer

            self._chat = AutoTokenizer.from_pretrained(self.folder)
            if not self._chat.chat_template:
                raise DataError(
                    f"{self.folder}: the tokenizer has no chat template; give prompt and completion instead"
                )
        prompt = self._chat.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self._chat.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(f"{self.folder}: its chat template rewrites earlier messages; give prompt and completion")
        return self.encode(prompt), self.encode(whole[len(prompt) :])


def samples_of(file: Path, encoder: Encoder, seq_length: int) -> Iterator[Sample]:
    """The samples of one file, in order; DataError names file and line of what is malformed."""
    if file.suffix != ".jsonl":
        yield from windows(encoder.encode(_read_text(file)), seq_length)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            yield from sample_of_line(line, encoder, seq_length, f"{file}:{number}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def windows(ids: list[int], seq_length: int) -> Iterator[Sample]:
    """Consecutive windows of seq_length - 1 tokens."""
    size = seq_length - 1
    for start in range(0, len(ids), size):
        yield [], ids[start : start + size]


def sample_of_line(line: bytes, encoder: Encoder, seq_length: int, where: str) -> Iterator[Sample]:
    """The samples of one JSON line in any of the forms that `preprocess` names."""
    forms: dict[str, Callable[[dict], Iterator[Sample]]] = {
        "text": lambda entry: windows(encoder.encode(entry["text"]), seq_length),
        "prompt": lambda entry: iter([(encoder.encode(entry["prompt"]), encoder.encode(entry["completion"]))]),
        "messages": lambda entry: iter([encoder.encode_chat(entry["messages"])]),
    }
    try:
        entry = json.loads(line)
        form = next(key for key in forms if key in entry)
        yield from forms[form](entry)
    except (ValueError, LookupError, TypeError, StopIteration):
        raise DataError(
            f'{where}: not an object with "text", "prompt" and "completion", or "messages"; mend or remove the line'
        ) from None
