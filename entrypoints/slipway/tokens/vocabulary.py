"""What a model's folder says of its tokens: where a text begins and ends, and the template of its chats.

Read from the files themselves, as transformers reads them: to import transformers takes seconds in every process.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import locate
from slipway.errors import DataError, SlipwayError, UsageError
from slipway.tokens import limits
from slipway.untrusted import harmless, read_bytes, read_object, read_text

COPY = "copy it again"
LARGEST_TEMPLATE = 1 << 20  # the largest of published models has 30,000 characters


def loaded(path: Path) -> Any:
    """The tokenizer of a folder; DataError for a tokenizer.json that is none. No code of a model is run for it."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    content = read_bytes(file, cure=COPY)
    with panics_named(file), quiet_panics():
        tokenizer = Tokenizer.from_buffer(content)
        # What a file says of these is for batches of inference: a text must be neither cut off nor filled up.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        limits.check(tokenizer, file)
        tokenizer.encode("a", add_special_tokens=True)
        tokenizer.get_vocab_size()
    return tokenizer


@contextmanager
def panics_named(file: Path) -> Iterator[None]:
    """What the library raises for a tokenizer that is none as a DataError: its panics are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, SlipwayError):
        raise
    except BaseException as error:
        said = harmless(" ".join(str(error).split()), 120)
        raise DataError(f"{file} cannot be used as a tokenizer ({said}); {COPY}") from None


@contextmanager
def quiet_panics() -> Iterator[None]:
    """The library writes a panic to standard error itself, before anybody can catch it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class Folder:
    """A folder with tokenizer.json, and with the rest that may stand beside it."""

    path: Path
    config: dict[str, Any]  # tokenizer_config.json

    @property
    def special(self) -> dict[str, str]:
        """Name → special token, as templates know them: bos_token, eos_token."""
        names = {name: value for name, value in self.config.items() if name.endswith("_token")}
        tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in names.items()}
        return {name: token for name, token in tokens.items() if isinstance(token, str)}

    def end(self, tokenizer: Any) -> int:
        """The token that ends a text; UsageError without one."""
        token = self.special.get("eos_token")
        number = tokenizer.token_to_id(token) if token else None
        if number is None:
            where, wrong = self.path / "tokenizer_config.json", f"its eos_token {token!r} is not in tokenizer.json"
            said = f"{where}: {wrong}; correct it" if token else f"{where} has no eos_token; add one"
            raise UsageError(f"{said}, or use --no-append-eos")
        return number

    def begin(self, tokenizer: Any) -> list[int]:
        """The token that the model expects before a text, or none: as its tokenizer puts it there for inference."""
        kind = str(self.config.get("tokenizer_class"))
        if kind.startswith(("Llama", "CodeLlama", "Gemma")):  # these set it themselves, whatever tokenizer.json says
            token = self.special.get("bos_token")
            number = tokenizer.token_to_id(token) if token and self.config.get("add_bos_token", True) else None
            return [] if number is None else [number]
        with_them, plain = (tokenizer.encode("a", add_special_tokens=each).ids for each in (True, False))
        places = (n for n in range(len(with_them)) if with_them[n : n + len(plain)] == plain)
        return with_them[: next(places, 0)]

    def template(self, with_tools: bool) -> str:
        """The chat template; DataError without one."""
        templates = self._templates()
        template = templates.get("tool_use" if with_tools and "tool_use" in templates else "default")
        if template is None:
            raise DataError(
                f"{self.path}: the tokenizer has no chat template; give the model that was trained for chats by "
                "--tokenizer, or rows with prompt and completion"
            )
        return template

    @property
    def has_template(self) -> bool:
        return "default" in self._templates()

    def knows(self, argument: str) -> bool:
        """Whether any template has a word of this name; one that has none cannot be told anything by it."""
        return any(re.search(rf"\b{re.escape(argument)}\b", each) for each in self._templates().values())

    def _templates(self) -> dict[str, str]:
        """Name → template: of the file of its own, else of the config."""
        found = self.config.get("chat_template") or {}
        if isinstance(found, str):
            found = {"default": found}
        where = self.path / "tokenizer_config.json"
        if isinstance(found, list):
            try:
                found = {each["name"]: each["template"] for each in found}
            except (LookupError, TypeError):
                raise DataError(f"{where}: chat_template is not a list of names and templates; copy it again") from None
        if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
            raise DataError(f"{where}: chat_template is not a text; copy it again")
        own = self.path / "chat_template.jinja"
        found |= {file.stem: read_text(file, LARGEST_TEMPLATE, COPY) for file in _other_templates(self.path)}
        found |= {"default": read_text(own, LARGEST_TEMPLATE, COPY)} if own.is_file() else {}
        if any(len(each) > LARGEST_TEMPLATE for each in found.values()):
            raise DataError(f"{self.path}: a chat template has more than {LARGEST_TEMPLATE:,} characters; {COPY}")
        return found


def files_of(path: Path) -> list[Path]:
    """Every file of a folder that decides which tokens are written."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [*filter(Path.is_file, map(path.joinpath, names)), *_other_templates(path)]


def _other_templates(path: Path) -> list[Path]:
    """The files of templates beside the default one, such as that for tools."""
    return [file for file in sorted((path / "additional_chat_templates").glob("*.jinja")) if file.is_file()]


def folder_of(path: Path) -> Folder:
    """The folder's words; DataError where its config is not JSON."""
    file = path / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    # Older models have their special tokens in a file of their own.
    old = path / "special_tokens_map.json"
    return Folder(path, {**read_object(old), **config} if old.is_file() else config)


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
