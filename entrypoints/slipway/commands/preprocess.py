"""`slipway preprocess`: text, prompts or chats → the tokens that `train` reads."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.options import option, parameters_of, take, with_options
from slipway.report import Summary
from slipway.tokens.wanted import Wanted
from slipway.training.recipe import MODES, Recipe


@dataclass(frozen=True)
class Purpose:
    """What the tokens are for, which decides how long a sequence is."""

    recipe: str | None = option(None, "recipe that the training will use: its sequence length is taken")
    mode: str | None = option(
        None, "mode of the training, for --recipe", choices=MODES, otherwise="the one with the shortest sequences"
    )

    def sequence_length(self) -> int:
        """The shortest sequence that such a training has: then nothing of the data is too long for it."""
        from slipway.training.recipes import names

        recipes = [self.recipe] if self.recipe else names()
        return min(_length(recipe, mode) for recipe in recipes for mode in self._modes(recipe))

    def _modes(self, recipe: str) -> list[str]:
        """The mode that is asked for, else those that the recipe has."""
        from slipway.training.recipes import FOLDER

        if self.mode:
            return [self.mode]
        file = Path(recipe) if recipe.endswith(".toml") else FOLDER / f"{recipe}.toml"
        # What cannot be read is named when the recipe is loaded.
        tables = re.findall(r"(?m)^\[(\w+)\]", file.read_text(errors="replace")) if file.is_file() else []
        return [mode for mode in MODES if mode in tables] or [*MODES]


@with_options(Wanted, Purpose)
def preprocess(data: str, out: str, **options: Any) -> Summary:
    """Turn text, prompts with completions, or chats into token data for `train`.

    DATA is JSON lines, a JSON array, parquet, arrow, csv or text, also packed as .gz or .zst. A row has one of these
    forms, and the first that fits is taken:

      {"inputs": {"p_ids": [...], "r_ids": [...]}}    tokens, which are copied; r_ids are learned
      {"messages": [...]}, {"conversations": [...]}   a chat, in the chat template; the assistant's turns are learned
      {"prompt": ..., "completion": ...}              the completion is learned; also "response"; also lists of messages
      {"instruction": ..., "input": ..., "output": ...}, {"question": ..., "answer": ...}, {"input": ..., "output": ...}
      {"text": ...}                                   a text

    OUT.jsonl gets samples. A text is cut into windows of SEQ_LENGTH - 1 tokens, and all of them are learned. A sample
    of SEQ_LENGTH tokens or more is too long (--long). OUT.bin gets whole texts and nothing else, in Megatron's format,
    with OUT.idx beside it. The page docs/data.md says more.

    If the command is stopped, run it again: it continues where it stopped.

    Args:
        data: a file, a folder, or hf://datasets/ORG/NAME[@REVISION][:SPLIT].
        out: the .jsonl or .bin file to write.
    """
    from slipway.tokens.tokenise import tokenise

    started = time.monotonic()
    wanted, purpose = take(Wanted, options), take(Purpose, options)
    # A recipe is read also where --seq-length takes the place of its length, as in `train`: its name may be wrong.
    usual = purpose.sequence_length() if purpose.recipe or not wanted.seq_length else 0
    size, counts = tokenise(data, Path(out), wanted, wanted.seq_length or usual)
    return Summary("preprocess", out, size, time.monotonic() - started, counts)


def _length(recipe: str, mode: str) -> int:
    """The sequence length of a recipe in one mode; that of `train` without a recipe where it does not say."""
    from slipway.training.recipes import GPUS, load

    default = parameters_of(Recipe)["seq_length"].default
    return load(recipe, mode, max(GPUS)).values.get("seq_length", default)
