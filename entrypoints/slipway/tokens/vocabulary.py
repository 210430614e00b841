"""What a model's folder says of its tokens: where a text begins and ends, and the template of its chats.

Read from the files themselves, as transformers reads them: to import transformers takes seconds in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import locate
from slipway.errors import DataError, UsageError
from slipway.untrusted import read_object


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
            where = self.path / "tokenizer_config.json"
            raise UsageError(f"{where} has no eos_token; add one, or use --no-append-eos")
        return number

    def begin(self, tokenizer: Any) -> list[int]:
        """The token that the model expects before a text, or none: as its tokenizer puts it there for inference."""
        kind = str(self.config.get("tokenizer_class"))
        if kind.startswith(("Llama", "CodeLlama", "Gemma")):  # these set it themselves, whatever tokenizer.json says
            token = self.special.get("bos_token")
            number = tokenizer.token_to_id(token) if token and self.config.get("add_bos_token", True) else None
            return [] if number is None else [number]
        with_them, plain = (tokenizer.encode("a", add_special_tokens=each).ids for each in (True, False))
        return with_them[: next(n for n in range(len(with_them)) if with_them[n : n + len(plain)] == plain)]

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

    def _templates(self) -> dict[str, str]:
        """Name → template: of the file of its own, else of the config."""
        found = self.config.get("chat_template") or {}
        if isinstance(found, str):
            found = {"default": found}
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}
        own = self.path / "chat_template.jinja"
        others = sorted((self.path / "additional_chat_templates").glob("*.jinja"))
        found |= {file.stem: file.read_text() for file in others}
        return found | ({"default": own.read_text()} if own.is_file() else {})


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
