"""A row → what it is an example of: a text, a prompt with a completion, a chat, or tokens.

The first form of FORMS whose keys a row has decides; docs/data.md gives the order. A null counts as a missing key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from slipway.tokens.lines import Sample, inputs_of
from slipway.tokens.messages import (
    ASSISTANT,
    USER,
    Chat,
    Malformed,
    Message,
    chat_of,
    joined,
    parsed,
    refuse_media,
    structured,
)

Fields = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, as text and as a chat.

    Args:
        chat: makes the chat.
        prefers_chat: it is a question and not the beginning of a text.
    """

    prompt: str
    completion: str
    chat: Callable[[], Chat]
    prefers_chat: bool = False


Example = str | Pair | Chat | Sample  # str: a whole text


@dataclass(frozen=True)
class Form:
    """A kind of row.

    Args:
        needs: keys that a row of it has.
        uses: keys that it may have.
    """

    name: str
    needs: tuple[str, ...]
    build: Callable[[Fields], Example]
    uses: tuple[str, ...] = ()

    def unused(self, row: Fields) -> list[str]:
        """Keys of a row that nothing is made of."""
        return [key for key in row if key not in (*self.needs, *self.uses)]


ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)
WITH_INPUT = ", paired with an input that provides further context"
OF_CHATS = ("system", "tools", "chat_template_kwargs", "mask", "type")
# A choice between answers says which is better; learning both, or the worse one, would be wrong.
PREFERENCE = re.compile(r"(chosen|rejected)(_\w+)?|kto_tag")


def form_of(row: Any, nulls: Iterable[str] = ()) -> Form:
    """The form of a row; Malformed where there is none, or one that is not learned.

    Args:
        nulls: the keys that the row had and whose value is null.
    """
    if not isinstance(row, dict):
        raise Malformed(f"a row is an object with names, not {type(row).__name__}")
    refuse_preferences(row)
    refuse_media(row)
    form = _fitting(row)
    refuse_columns(row)
    if form is None:
        refuse_wrapped(row)
        raise Malformed(
            f"no form that is known: its keys are {_names(row)}{_null(nulls)}; needed are {', or '.join(_needs())}; "
            "say what they are with --map THEIRS=OURS, such as --map reply=completion"
        )
    return form


def _fitting(row: Fields) -> Form | None:
    """The first form whose keys a row has."""
    return next((form for form in FORMS if all(key in row for key in form.needs)), None)


def refuse_wrapped(row: Any) -> None:
    """Malformed for an object that is no row, but has rows inside: {"data": [...]}, or {"1": {...}, "2": {...}}."""
    if not isinstance(row, dict):
        return
    inside = next((key for key, value in row.items() if isinstance(value, list) and value and _is_row(value[0])), None)
    if inside is None and not (row and all(map(_is_row, row.values()))):
        return
    where, path = (f"inside of {shown(inside)}", f'.["{shown(inside)}"][]') if inside else ("inside of it", ".[]")
    raise Malformed(
        f"no form that is known: its keys are {_names(row)}; but the objects {where} have one: write these alone, as "
        f"JSON lines or an array, such as by: jq -c '{path}' FILE > rows.jsonl"
    )


def _is_row(value: Any) -> bool:
    """An object of a form; a message is none, whatever else it has."""
    return isinstance(value, dict) and not {"role", "from"} & value.keys() and _fitting(value) is not None


def refuse_columns(row: Fields) -> None:
    """Malformed for a table in one object, as pandas writes it by default: each name with the values of all rows."""
    if len(row) > 1 and (all(map(_is_column, row.values())) or all(map(_is_numbered, row.values()))):
        raise Malformed(
            f"it is a table column by column ({_names(row)}); write it row by row, with pandas by "
            'to_json(FILE, orient="records", lines=True)'
        )


def _is_column(value: Any) -> bool:
    """A list of values; one of objects may be a chat."""
    return isinstance(value, list) and bool(value) and not any(isinstance(each, dict) for each in value)


def _is_numbered(value: Any) -> bool:
    """Number of a row → value."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdecimal() for key in value)


def refuse_preferences(row: Fields) -> None:
    """Malformed for rows that compare answers."""
    if found := [key for key in row if PREFERENCE.fullmatch(key)]:
        raise Malformed(
            f"preference data ({', '.join(found)}), which is not learned; keep the good answers as messages"
        )
    if "label" in row and _is_verdict(row["label"]) and "text" not in row:
        raise Malformed("preference data (label), which is not learned; keep the good answers, without label")
    if {"completions", "labels"} <= row.keys():
        raise Malformed("preference data (completions with labels), which is not learned; keep the good answers")


def _is_verdict(label: Any) -> bool:
    return isinstance(label, bool | int) or str(label).lower() in ("true", "false", "0", "1")


def present(row: Any, renamed: dict[str, str]) -> Any:
    """A row without nulls, and with its keys under our names.

    Args:
        renamed: their key → ours.
    """
    if not isinstance(row, dict):
        return row
    if renamed:
        row = {key: row[key] for key in row if key not in renamed and key not in renamed.values()} | {
            ours: row[theirs] for theirs, ours in renamed.items() if theirs in row
        }
    return {key: value for key, value in row.items() if value is not None}


# ---------------------------------------------------------------------------- each form


def _tokens(row: Fields) -> Example:
    try:
        return inputs_of(row)
    except (ValueError, LookupError, TypeError):
        raise Malformed(
            '"inputs" is not an object with "p_ids" and "r_ids", lists of token ids (whole numbers from 0 to 2^31 - 1)'
        ) from None


def _prompted(key: str) -> Callable[[Fields], Example]:
    """A prompt and what follows under `key`: texts, or messages as TRL has them."""

    def build(row: Fields) -> Example:
        prompt, reply = _sides(row["prompt"], row[key])
        if isinstance(prompt, str) and isinstance(reply, str):
            return _asked(prompt, reply, _turns((prompt, reply)), row)
        for name, value in (("prompt", prompt), (key, reply)):
            if not isinstance(value, str | list):
                raise Malformed(f'"{name}" is {type(value).__name__}, not text and not a list of messages')
        first = [{"role": USER, "content": prompt}] if isinstance(prompt, str) else prompt
        second = [{"role": ASSISTANT, "content": reply}] if isinstance(reply, str) else reply
        return joined(chat_of(first, row, learned=False), chat_of(second, {}))

    return build


def _asked(text: str, completion: str, turns: list[Message], row: Fields, prefers_chat: bool = False) -> Example:
    """A pair; a chat where the row has what only a chat has a place for."""
    if any(key in row and row[key] for key in OF_CHATS):
        return chat_of(turns, row)
    return Pair(text, completion, lambda: chat_of(turns, row), prefers_chat)


def _turns(*pairs: tuple[str, str]) -> list[Message]:
    """Questions of the user's, each with its answer."""
    roles = (USER, ASSISTANT)
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _sides(prompt: Any, reply: Any) -> tuple[Any, Any]:
    """A prompt and its reply; as messages where both are, of which csv gives the text. Else a text stays a text."""
    lists = _messages_in(prompt), _messages_in(reply)
    return lists if all(each is not None for each in lists) else (prompt, reply)


def _messages_in(value: Any) -> Any:
    """A list; also the text of one, where all of it are messages: an answer may be JSON of any kind."""
    if isinstance(value, list):
        return value
    found = parsed(value)
    if not isinstance(found, list) or not found:
        return None
    speaks = (isinstance(each, dict) and isinstance(each.get("role", each.get("from")), str) for each in found)
    return found if all(speaks) else None


def _alpaca(row: Fields) -> Example:
    instruction, given, output = _text(row, "instruction"), _text(row, "input"), _text(row, "output")
    question = f"{instruction}\n{given}" if given else instruction
    if history := _history(row):
        return chat_of(_turns(*history, (question, output)), row)  # Alpaca's own layout has no place for it
    block = f"### Input:\n{given}\n\n" if given else ""
    text = ALPACA.format(WITH_INPUT if given else "", instruction, block)
    return _asked(text, output, _turns((question, output)), row, prefers_chat=True)


def _history(row: Fields) -> list[tuple[str, str]]:
    """Earlier questions and answers."""
    history = structured(row.get("history") or [])
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise Malformed('"history" is not a list of pairs of texts')
    return [(question, answer) for question, answer in history]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _question(row: Fields) -> Example:
    question, answer = _text(row, "question"), _text(row, "answer")
    text, completion = f"Question: {question}\nAnswer:", f" {answer}" if answer else ""
    return _asked(text, completion, _turns((question, answer)), row, prefers_chat=True)


def _input_output(row: Fields) -> Example:
    given, output = _text(row, "input"), _text(row, "output")
    return _asked(given, output, _turns((given, output)), row)


def _whole_text(row: Fields) -> Example:
    return _text(row, "text")


def _text(row: Fields, key: str) -> str:
    """The text under a key; empty without it."""
    value = row.get(key, "")
    if not isinstance(value, str):
        raise Malformed(f'"{key}" is {type(value).__name__}, not text')
    return value


FORMS = (
    Form("tokens", ("inputs",), _tokens),
    Form("messages", ("messages",), lambda row: chat_of(row["messages"], row), OF_CHATS),
    Form("conversations", ("conversations",), lambda row: chat_of(row["conversations"], row), OF_CHATS),
    Form("prompt and completion", ("prompt", "completion"), _prompted("completion"), OF_CHATS),
    Form("prompt and response", ("prompt", "response"), _prompted("response"), OF_CHATS),
    Form("instruction and output", ("instruction", "output"), _alpaca, ("input", "history", *OF_CHATS)),
    Form("question and answer", ("question", "answer"), _question, OF_CHATS),
    Form("input and output", ("input", "output"), _input_output, OF_CHATS),
    Form("text", ("text",), _whole_text),
)
KEYS = sorted({key for form in FORMS for key in (*form.needs, *form.uses)})


def _needs() -> list[str]:
    return [" with ".join(form.needs) for form in FORMS]


def _null(keys: Iterable[str]) -> str:
    return f" (and null are {_names(keys)})" if keys else ""


def shown(key: Any) -> str:
    """A key as a message shows it; pandas gives the column of its index no name."""
    return str(key)[:40] or "''"


def _names(keys: Iterable[str]) -> str:
    names = [*map(shown, keys)]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
