"""`slipway preprocess`: text, prompts or chats → the tokens that `train` reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from slipway.options import take, with_options
from slipway.report import Summary
from slipway.tokens.wanted import Wanted


@with_options(Wanted)
def preprocess(data: str, out: str, **options: Any) -> Summary:
    """Turn text, prompts with completions, or chats into token data for `train`.

    A .jsonl file holds one JSON object per line. Every other file is one text. The objects have one of these forms:

      {"text": ...}                                   a text
      {"prompt": ..., "completion": ...}              the completion is learned
      {"messages": [...]}                             a chat, in the tokenizer's chat template; its last message is learned
      {"inputs": {"p_ids": [...], "r_ids": [...]}}    tokens, which are copied; r_ids are learned

    OUT.jsonl gets samples. A text is cut into windows of SEQ_LENGTH - 1 tokens, and all of them are learned. A sample
    is dropped and counted if it has SEQ_LENGTH tokens or more, or if it has nothing to learn.

    OUT.bin gets whole texts and nothing else, in Megatron's format, with OUT.idx beside it.

    If the command is stopped, run it again: it continues where it stopped.

    Args:
        data: a text or .jsonl file, or a folder of such files.
        out: the .jsonl or .bin file to write.
    """
    from slipway.tokens.tokenise import tokenise

    started = time.monotonic()
    size, counts = tokenise(Path(data), Path(out), take(Wanted, options))
    return Summary("preprocess", out, size, time.monotonic() - started, counts)
