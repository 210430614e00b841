"""What the tests of data share: a model with a chat template, and its output as text with what is learned marked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slipway.commands.preprocess import preprocess
from slipway.tokens.lines import Sample, read_line
from tokenizers import Tokenizer

# As a plain template is: a cue to answer, and a token that ends each turn with a new line after it.
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_with(model: Path, folder: Path, template: str | list | None) -> Path:
    """The tokenizer of a model in a new folder, with another chat template."""
    folder.mkdir()
    shutil.copyfile(model / "tokenizer.json", folder / "tokenizer.json")
    words = json.loads((model / "tokenizer_config.json").read_text())
    words |= {"chat_template": template} if template else {}
    if not template:
        words.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def samples(path: Path) -> list[Sample]:
    """The samples of an output."""
    return [read_line(line, str(path)) for line in path.read_bytes().splitlines()]


def marked(sample: Sample, model: Path) -> str:
    """A sample as text, with what is learned in ⟦ ⟧."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    flags = [True] * len(sample.response)
    for start, end in sample.context:
        flags[start:end] = [False] * (end - start)
    text, before = "", False
    parts: list[tuple[bool, list[int]]] = [(False, list(sample.prompt))]
    for token, learned in zip(sample.response, flags, strict=True):
        if learned != parts[-1][0]:
            parts.append((learned, []))
        parts[-1][1].append(token)
    for before, ids in parts:
        decoded = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
        text += f"⟦{decoded}⟧" if before else decoded
    return text


def processed(model: Path, data: Path | str, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """(the samples of DATA, marked, and what was counted)."""
    out = model.parent / f"out-{len(list(model.parent.iterdir()))}.jsonl"
    summary = preprocess(str(data), str(out), tokenizer=str(model), **options)
    return [marked(sample, model) for sample in samples(out)], summary.details
