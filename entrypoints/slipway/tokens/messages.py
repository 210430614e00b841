"""Chats as people write them → the messages that chat templates take.

Read are: role and content, or from and value; the roles' many names; calls of tools as `tool_calls`, `function_call`,
turns or parts; content in parts; reasoning beside the content or in a part; and what says that a turn is not learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from slipway.untrusted import NotJson, parse_json

Message = dict[str, Any]


class Malformed(ValueError):
    """What is wrong with a row, without where it stands."""


@dataclass(frozen=True)
class Chat:
    """A chat, and which of its messages may be learned.

    Args:
        messages: as chat templates take them; the arguments of calls are objects.
        learned: of each message; only those of the assistant.
        tools: JSON schemas.
        arguments: of the template, for this chat alone.
        unused: keys of messages that nothing is made of.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
ROLES = {
    "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT,
    "function_call": ASSISTANT, "tool_call": ASSISTANT,
    "system": SYSTEM, "developer": "developer",
    "tool": TOOL, "observation": TOOL, "function": TOOL, "function_response": TOOL, "tool_response": TOOL,
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles and parts whose value is a call of a tool, as JSON
REASONING = ("reasoning_content", "reasoning", "thinking")  # templates know it by one of these names
UNLEARNED = ("weight", "train", "loss")  # OpenAI's, axolotl's and ms-swift's names
PYTHON = re.compile(r"\s*[\[{][\s\[{]*'")  # a list or an object as Python prints them, which Dataset.to_csv writes
KEPT = ("name", "tool_call_id", "id")  # what templates may use besides
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# The keys of a message that something is made of.
READ = {"role", "from", "content", "value", "label", "tool_calls", "function_call", *REASONING, *UNLEARNED, *KEPT}


def chat_of(entries: Any, row: dict[str, Any], learned: bool = True) -> Chat:
    """The chat of a list of messages and of what stands beside it in the row: system, tools, mask; Malformed if none.

    Args:
        learned: the assistant's turns are learned, except for those that say they are not.
    """
    entries = structured(entries)
    if not isinstance(entries, list) or not entries:
        raise Malformed("the chat is not a list of messages, or an empty one")
    messages, flags = [], []
    masked = _masked(row)
    for number, entry in enumerate(entries, 1):
        try:
            message = _message(entry)
            is_learned = message["role"] == ASSISTANT and _is_learned(entry) and _speaker(entry).lower() not in masked
        except Malformed as error:
            raise Malformed(f"message {number}: {error}") from None
        messages.append(message)
        flags.append(learned and is_learned)
    if system := row.get("system"):
        if not isinstance(system, str):
            raise Malformed(f'"system" is {type(system).__name__}, not text')
        own = [message["content"] for message in messages if message["role"] == SYSTEM]
        if own and own != [system]:
            raise Malformed('"system" stands beside a system message that says something else; keep one of them')
        if not own:
            messages, flags = [{"role": SYSTEM, "content": system}, *messages], [False, *flags]
    unused = frozenset(key for entry in entries for key in entry if key not in READ and entry[key])
    return Chat(messages, flags, tools_of(row.get("tools")), arguments_of(row.get("chat_template_kwargs")), unused)


def joined(first: Chat, second: Chat) -> Chat:
    """One chat after the other."""
    messages, learned = first.messages + second.messages, first.learned + second.learned
    arguments, unused = first.arguments | second.arguments, first.unused | second.unused
    return Chat(messages, learned, first.tools or second.tools, arguments, unused)


def refuse_media(entry: dict[str, Any]) -> None:
    """Malformed for a row or a message that holds more than text."""
    if found := next((key for key in MEDIA if entry.get(key)), None):
        raise Malformed(f"{found} beside the text, which is not learned; only text is")


def parsed(value: Any) -> Any:
    """A value that may be given as JSON in a text: csv has nothing else, and tables often have it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except NotJson:
            return value
    return value


def structured(value: Any) -> Any:
    """The same where a text would be no use; Malformed for a list as Python prints it."""
    if isinstance(value, str) and PYTHON.match(value):
        raise Malformed(
            f"{value[:20]}… is a list or an object as Python prints it, not JSON; write it by json.dumps, "
            "or the table as parquet or JSON lines"
        )
    return parsed(value)


def plain(value: Any) -> Any:
    """A value of a table as JSON has it, days and times as ISO writes them; Malformed where JSON has none for it."""
    if isinstance(value, dict):
        return {_name(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        number: int | float = int(value) if value == value.to_integral_value() else float(value)
        if Decimal(str(number)) == value:
            return number
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise Malformed(
        f"it holds {type(value).__name__} ({str(value)[:40]}), for which JSON has no place; write it as text"
    )


def _name(key: Any) -> str:
    """The key of a map, which may be a number, as the name that JSON gives it."""
    if isinstance(key, bytes):
        raise Malformed("it holds bytes as a key, for which JSON has no place; write it as text")
    return str(plain(key))


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools' schemas; a function without its wrapping gets it, as templates want it."""
    tools = plain(structured(value)) or []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise Malformed("tools is not a list of JSON schemas")
    tools = [structured(tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Malformed("tools holds something that is not a JSON schema")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]


def arguments_of(value: Any) -> dict[str, Any]:
    """Arguments of the template."""
    arguments = plain(structured(value)) or {}
    if not isinstance(arguments, dict):
        raise Malformed("chat_template_kwargs is not an object")
    return arguments


def _masked(row: dict[str, Any]) -> set[str]:
    """NeMo's chats name in `mask` who is not learned; that is the user, and may be others too."""
    mask = row.get("mask") or ""
    if not isinstance(mask, str):
        raise Malformed(f'"mask" is {type(mask).__name__}, not text')
    masked = {each.strip().lower() for each in mask.split(",")} if mask else set()
    if masked and not any(ROLES.get(each) == USER for each in masked):
        raise Malformed(f"mask is {mask!r}: then the user's words would be learned; only the assistant's are")
    return masked


def _speaker(entry: dict[str, Any]) -> str:
    speakers = [entry[name] for name in ("role", "from") if entry.get(name)]
    if not speakers or not all(isinstance(speaker, str) for speaker in speakers):
        raise Malformed('it has no "role" or "from"')
    if len({ROLES[speaker.lower()] for speaker in speakers if speaker.lower() in ROLES}) > 1:
        raise Malformed('its "role" and its "from" say two things; keep one of them')
    first: str = speakers[0]  # the other one can be a name
    return first


def _said(entry: dict[str, Any], names: Sequence[str], meaning: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value under whichever of some names; Malformed where two have values of another meaning.

    A table has all the names that any of its rows has, most of them without a value.
    """
    given = [name for name in names if entry.get(name)]
    if other := next((name for name in given[1:] if meaning(entry[name]) != meaning(entry[given[0]])), None):
        raise Malformed(f'its "{given[0]}" and its "{other}" say two things; keep one of them')
    return next((entry[name] for name in (*given, *names) if entry.get(name) is not None), None)


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise Malformed("it is not an object with role and content, or from and value")
    refuse_media(entry)
    if entry.get("label") is not None:
        raise Malformed("it has a label (of SteerLM, or of a preference), which is not learned")
    speaker = _speaker(entry)
    role = ROLES.get(speaker.lower())
    if role is None:
        raise Malformed(f"its role {speaker!r} is not known; there are {', '.join(ROLES)}")
    content = _said(entry, ("content", "value"))
    message: Message = {"role": role, "content": None}
    if speaker.lower() in CALLS:
        message["tool_calls"] = _calls(content)
    else:
        _fill(message, content)
    if given := _said(entry, REASONING):
        message["reasoning_content"] = given
    if called := _said(entry, ("tool_calls", "function_call"), _functions):
        message["tool_calls"] = _calls(called)
    _check_reasoning(message)
    return message | {key: entry[key] for key in KEPT if entry.get(key) is not None}


def _fill(message: Message, content: Any) -> None:
    """Put the content into a message: text, parts, or what a tool has answered."""
    if content is None or isinstance(content, str):
        message["content"] = content
    elif isinstance(content, list) and all(map(_is_part, content)):
        _fill_parts(message, content)
    elif message["role"] == TOOL:
        message["content"] = json.dumps(plain(content), ensure_ascii=False)
    elif isinstance(content, list):
        raise Malformed("its content is a list that holds more than texts and parts with a type; write it as text")
    else:
        raise Malformed(f"its content is {type(content).__name__}, not text")


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "type" in value)


def _fill_parts(message: Message, parts: list[Any]) -> None:
    texts, reasoning, calls = list[Any](), list[Any](), list[dict[str, Any]]()
    for part in parts:
        kind = "text" if isinstance(part, str) else str(part["type"])
        value = part if isinstance(part, str) else next((part[k] for k in ("text", "value", kind) if k in part), None)
        if kind in ("text", "input_text", "output_text"):
            texts.append(value)
        elif kind in REASONING:
            reasoning.append(value)
        elif kind in CALLS:
            calls += _calls(value)
        else:
            raise Malformed(f"a part of its content is of type {kind}; only text, reasoning and tool_call are read")
    if not all(isinstance(each, str) for each in texts + reasoning):
        raise Malformed("a part of its content has no text")
    message["content"] = "".join(texts) if texts else None
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls


def _check_reasoning(message: Message) -> None:
    """Give the reasoning every name that a template may know it by."""
    if "reasoning_content" in message:
        if not isinstance(message["reasoning_content"], str):
            raise Malformed("its reasoning is not text")
        message["thinking"] = message["reasoning_content"]
    if message["content"] is None and message["role"] != ASSISTANT:
        raise Malformed("its content is null")
    if message["content"] is None and not {"tool_calls", "thinking"} & message.keys():
        raise Malformed("its content is null, and it calls no tool")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools, each {"type": "function", "function": {"name", "arguments"}}, with arguments as an object."""
    calls = structured(value)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = structured(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed('a call of a tool is not an object with "name" and "arguments"')
        whole = {"name": function["name"], "arguments": plain(parsed(function.get("arguments", {})))}
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", **kept, "function": whole})
    return found


def _functions(value: Any) -> list[Any]:
    """What is called, without the ids, which only `tool_calls` has."""
    return [call["function"] for call in _calls(value)]


def _is_learned(entry: dict[str, Any]) -> bool:
    given = [key for key in UNLEARNED if entry.get(key) is not None]
    for key in given:
        if entry[key] not in (0, 1):
            raise Malformed(f"{key} is {entry[key]!r}; it must be 0 or 1")
        if bool(entry[key]) != bool(entry[given[0]]):
            raise Malformed(f'its "{given[0]}" and its "{key}" say two things; keep one of them')
    return bool(entry[given[0]]) if given else True
