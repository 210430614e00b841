"""Which parts of a chat a template writes: each of them gets a sign of its own, which its text has or has not.

To look for the words themselves would not do: the answer "A" stands in the word "Assistant", too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slipway.tokens.messages import REASONING, Chat, Message

WORDS, CALL, THOUGHT = "words", "call", "thought"


class Sign(NamedTuple):
    """What stands for a part of a message.

    Args:
        number: of the message.
        part: WORDS, CALL or THOUGHT; a call has a sign in its name and in each of its arguments.
    """

    number: int
    part: str
    text: str


@dataclass
class Signs:
    """The same chat with signs in it, and the signs."""

    chat: Chat
    every: list[Sign] = field(default_factory=list)

    @classmethod
    def of(cls, chat: Chat) -> Signs:
        """A chat whose texts have signs in the middle: templates look at how a text begins and ends."""
        found = cls(chat)
        messages = [found._message(number, message) for number, message in enumerate(chat.messages)]
        found.chat = Chat(messages, chat.learned, chat.tools, chat.arguments)
        return found

    def _message(self, number: int, message: Message) -> Message:
        before, mark, words = (message["content"] or "").rpartition("</think>")
        opening, tag, thought = before.rpartition("<think>")
        content = f"{opening}{tag}{self._text(number, THOUGHT, thought)}{mark}{self._text(number, WORDS, words)}"
        changed: Message = {"content": content} if content else {}
        if thoughts := message.get("reasoning_content"):
            changed |= dict.fromkeys(
                (key for key in REASONING if key in message), self._text(number, THOUGHT, thoughts)
            )
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [self._call(number, call) for call in calls]
        return message | changed

    def _call(self, number: int, call: dict[str, Any]) -> dict[str, Any]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        signed = {"name": name + self._new(number, CALL), "arguments": self._value(number, arguments)}
        return {**call, "function": {**call["function"], **signed}}

    def _value(self, number: int, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._value(number, each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._value(number, each) for each in value]
        if isinstance(value, str):
            return self._text(number, CALL, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return int(self._new(number, CALL, str((1 << 32) + int.from_bytes(os.urandom(4), "big"))))

    def _text(self, number: int, part: str, text: str) -> str:
        """A text with a sign; one that is empty stays so, since templates ask for that."""
        words = text.strip()
        if not words:
            return text
        middle = text.index(words) + len(words) // 2
        return text[:middle] + self._new(number, part) + text[middle:]

    def _new(self, number: int, part: str, text: str = "") -> str:
        self.every.append(Sign(number, part, text or f"x{os.urandom(8).hex()}x"))
        return self.every[-1].text
