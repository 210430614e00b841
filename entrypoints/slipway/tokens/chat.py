"""A chat → its text under the model's own template, and which parts of the text are learned.

An assistant's turn is learned as the model would be asked for it: the template renders the messages before it, with the
cue to answer; what the turn adds to that is learned. Where the template marks the answers itself, with
{% generation %}, its marks are taken.

Some templates write an earlier turn differently once others follow: they drop its reasoning, or end it with another
token. Such a turn is learned in a sample of its own, which ends with it. So one chat may give several samples.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from slipway.tokens.messages import ASSISTANT, Chat, Malformed, Message
from slipway.tokens.signs import CALL, THOUGHT, WORDS, Signs

Segments = list[tuple[str, bool]]  # (text, it is learned)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS, MEMORY = 5.0, 512 << 20  # for one chat: a template takes some milliseconds and megabytes
LONGEST_TEXT, LARGEST_NUMBER = 1 << 24, 1 << 40
ABSENT = "\ufdd2"  # a character that no text has


APART = "turns_apart"  # turns that needed a sample of their own
EMPTY = "empty_answers"  # turns that say nothing: they are not learned, as the empty answer of a pair is not
# What a template leaves out of a chat, or cannot write as it writes what others have; the worst comes first. Of two
# ways to give it a chat the one is taken that loses less.
ANSWERS, CALLS, AS_TEXT = "answers", "calls", "calls_as_text"  # the first two are never lost: such a chat is refused
IN_PART, WORDS_LOST, MESSAGES_LOST = "calls_written_in_part", "words_beside_calls_left_out", "messages_left_out"
LOSSES = (ANSWERS, CALLS, AS_TEXT, IN_PART, WORDS_LOST, MESSAGES_LOST)
REASONING_LOST, TOOLS_LOST = "reasoning_left_out", "tools_left_out"


@dataclass
class Rendered:
    """The samples of a chat, and what the template did to it: turns, by one of the names above."""

    samples: list[Segments]
    counts: Counter[str] = field(default_factory=Counter)


class Way(NamedTuple):
    """How a chat is given to a template.

    Args:
        alone: calls without the words beside them.
        empty: the content of a call without words: "" or None; KEPT: as the data has it.
        as_texts: the arguments of calls as the text of an object.
        in_parts: content as a list of parts.
        as_json: calls as JSON in the content.
    """

    alone: bool
    empty: str | None
    as_texts: bool
    in_parts: bool
    as_json: bool


KEPT = "kept"


class Template:
    """A compiled chat template.

    Args:
        source: the template.
        special: the special tokens, by the names that templates know.
        ends: every special token; some of them end a turn.
        arguments: for all chats.
        day: for templates that write the day's date: the same input must give the same bytes tomorrow.
    """

    def __init__(
        self, source: str, special: dict[str, str], ends: Iterable[str], arguments: dict[str, Any], day: date
    ) -> None:
        # Random, so that no text can hold them.
        self._open, self._close = (f"\ufdd0{os.urandom(8).hex()}{end}\ufdd1" for end in "()")
        with bounded():
            self._compiled = compiled(source, self._open, self._close, day)
        self._marks = bool(GENERATION.search(source))
        self._knows_calls, self._knows_tools = "tool_calls" in source, bool(re.search(r"\btools\b", source))
        self._wants_null = bool(re.search(r"\bis (not )?none\b|[!=]= ?none\b", source, re.IGNORECASE))
        self._fixed = {**special, **arguments}
        tokens = sorted(map(re.escape, ends), key=len, reverse=True)
        self._end = re.compile(rf"((?:{'|'.join(tokens) or ABSENT})+)\s*\Z")

    def render(self, chat: Chat, last: bool) -> Rendered:
        """The samples of a chat; Malformed with the template's own words where it refuses the chat.

        Args:
            last: learn the last of its learned turns alone.
        """
        turns = [number for number, learned in enumerate(chat.learned) if learned]
        turns = turns[-1:] if last else turns
        empty = [number for number in turns if not _says(chat.messages[number])]
        if not (turns := [number for number in turns if number not in empty]):
            return Rendered([], Counter({EMPTY: len(empty)}))
        kept = Chat(chat.messages[: turns[-1] + 1], chat.learned, chat.tools, chat.arguments)
        with bounded():
            kept, whole, lost = self._accepted(kept, turns)
            marks = self._marks
            found = Rendered([self._marked(kept, whole, turns)]) if marks else self._by_prefixes(kept, whole, turns)
        found.counts.update(lost)
        found.counts[EMPTY] += len(empty)
        found.counts[TOOLS_LOST] += bool(chat.tools) and not self._knows_tools
        return found

    # ------------------------------------------------------------------------ rendering

    def _render(self, chat: Chat, count: int, cue: bool = False, extra: Message | None = None) -> str:
        """The text of the first `count` messages, with the template's marks."""
        messages = chat.messages[:count] + ([extra] if extra else [])
        told = {"messages": messages, "tools": chat.tools or None, "documents": None, "add_generation_prompt": cue}
        text = self._compiled.render({**self._fixed, **chat.arguments, **told})
        if len(text) > LONGEST_TEXT:
            raise Malformed(f"the chat template writes more than {LONGEST_TEXT:,} characters for one chat")
        return text

    def _accepted(self, chat: Chat, turns: list[int]) -> tuple[Chat, str, Counter[str]]:
        """The chat in a form that the template takes, its text, and what it loses.

        Most templates want the arguments of a call as an object, some as the text of one. Some write calls only where
        there are no words, and some of these only where the content is null. Those of models that see want content in
        parts. They leave out what is not as they want it, so the way is taken that loses least.
        """
        signs, tried, said = Signs.of(chat), list[list[Message]](), ""
        found: list[tuple[list[int], Chat, str, Counter[str]]] = []
        for ways in self._ways(chat):
            for way in ways:
                suited = _suited(chat, way)
                if suited.messages in tried:
                    continue
                tried.append(suited.messages)
                try:
                    text = self._render(suited, len(suited.messages))
                    lost = self._losses(_suited(signs.chat, way), signs, turns)
                except (Malformed, MemoryError):
                    raise
                except Exception as error:  # of any other kind: the template is a stranger's
                    said = said or " ".join(str(error).split()) or type(error).__name__
                    continue
                if self._writes_none(signs.chat, way):
                    said = said or "it writes the word None for content that is null"
                    continue
                lost[AS_TEXT] += sum("tool_calls" in message for message in chat.messages) if way.as_json else 0
                found.append(([lost[name] for name in LOSSES], suited, text, lost))
                if not any(found[-1][0]):
                    return suited, text, lost
            if any(not lost[ANSWERS] and not lost[CALLS] for _, _, _, lost in found):
                break
        if not found:
            raise Malformed(f"the chat template refuses this chat: {said}")
        _, suited, text, lost = min(found, key=lambda each: each[0])
        if lost[ANSWERS] or lost[CALLS]:
            raise Malformed("the chat template refuses this chat: it leaves out what the assistant says")
        return suited, text, lost

    def _ways(self, chat: Chat) -> Iterator[Iterator[Way]]:
        """The ways to give the chat to the template; the later groups are for chats whose calls are lost otherwise."""
        calls = any("tool_calls" in message for message in chat.messages)
        # Null only where the template asks for it: others would write the word None.
        empties = (KEPT, "", None) if self._wants_null else ("",)
        texts = (False, True) if calls else (False,)
        if self._knows_calls or not calls:
            yield (Way(False, *each, False) for each in product(empties, texts, (False, True)))
            if calls:
                yield (Way(True, *each, False) for each in product(empties, texts, (False, True)))
        if calls:
            yield (Way(False, "", False, in_parts, True) for in_parts in (False, True))

    def _writes_none(self, signed: Chat, way: Way) -> bool:
        """A template that asks for null may do so for something else, and write it as Python's word for it.

        Args:
            signed: the chat with signs, in which no word of its own is None.
        """
        count = len(signed.messages)
        with_null = _suited(signed, way)
        if all(message["content"] is not None for message in with_null.messages):
            return False
        texts = (self._tried(chat, count) or "" for chat in (with_null, _suited(signed, way._replace(empty=""))))
        first, second = (text.count("None") for text in texts)
        return first > second

    def _losses(self, chat: Chat, signs: Signs, turns: list[int]) -> Counter[str]:
        """What the template leaves out of a chat with signs.

        Of an earlier message it is enough that the template has written it when it was the last.
        """
        whole, texts = self._render(chat, len(chat.messages)), dict[int, str]()
        parts: dict[tuple[int, str], list[bool]] = {}  # of a message → of each of its signs, whether it is written
        for number, part, sign in signs.every:
            written = sign in whole
            if not written and not self._marks:
                if number not in texts:
                    cue = chat.messages[number]["role"] != ASSISTANT
                    texts[number] = self._tried(chat, number + 1, cue) or ""
                written = sign in texts[number]
            parts.setdefault((number, part), []).append(written)
        lost = ((number, _loss(chat.messages[number], part, found)) for (number, part), found in parts.items())
        return Counter(_said(name, number in turns) for number, name in lost if name)

    # ------------------------------------------------------------------------ what is learned

    def _marked(self, chat: Chat, whole: str, turns: list[int]) -> Segments:
        """What the template marks as the assistant's, of the turns that are learned."""
        first, *parts = whole.split(self._open)
        every = [number for number, message in enumerate(chat.messages) if message["role"] == ASSISTANT]
        if len(parts) != len(every):  # some templates mark only answers that say something
            every = [number for number in every if _says(chat.messages[number])]
        if len(parts) != len(every) and turns != every:
            raise Malformed(
                f"the chat template marks {len(parts)} answers of {len(every)} turns, so it cannot be told which of "
                "them are not learned; use --learn all and no weights"
            )
        segments = [(first, False)]
        for number, part in enumerate(parts):
            answer, _, rest = part.partition(self._close)
            segments += [(answer, len(parts) != len(every) or every[number] in turns), (rest, False)]
        return segments

    def _by_prefixes(self, chat: Chat, whole: str, turns: list[int]) -> Rendered:
        samples, counts = list[Segments](), Counter[str]()
        text, spans = "", list[tuple[int, int]]()
        for turn in turns:
            after = whole if turn == turns[-1] else self._render(chat, turn + 1)
            context, answer = self._turn(chat, turn, after)
            if spans and not context.startswith(text):
                end = self._shared(text, spans[-1], context)
                if end is None:
                    samples.append(_segments(text, spans))
                    counts[APART], spans = counts[APART] + 1, []
                else:
                    spans[-1] = (spans[-1][0], end)
            text = context + answer
            # White space after the token that ends the turn is the template's: the model has stopped by then.
            ending = self._end.search(answer)
            spans.append((len(context), len(context) + (ending.end(1) if ending else len(answer))))
        return Rendered([*samples, _segments(text, spans)], counts)

    def _shared(self, text: str, span: tuple[int, int], context: str) -> int | None:
        """Where the learned part of a turn ends if a context ends it with another token; None: the turn is changed."""
        ending = self._end.search(text, span[0])
        if ending is None or ending.start() == span[0] or not context.startswith(text[: ending.start()]):
            return None
        return ending.start()

    def _turn(self, chat: Chat, turn: int, after: str) -> tuple[str, str]:
        """(what the model sees when it is asked for this turn, what it should answer)."""
        before = self._tried(chat, turn, cue=True)
        if before is not None and after.startswith(before):
            return before, after[len(before) :]
        # The turn's own text begins where another answer in its place would make a difference.
        base = self._tried(chat, turn) or ""
        other = self._tried(chat, turn, extra={"role": ASSISTANT, "content": ABSENT}) or ""
        begins = len(commonprefix([after, other]))
        cue = before[len(base) :] if before is not None and before.startswith(base) else ""
        place = after.rfind(cue, 0, begins) if cue else -1
        if before is not None and place >= 0:
            # The template has changed what stands before the turn; the model will see it as it was.
            return before, after[place + len(cue) :]
        if before is not None and after.startswith(base):
            begins = min(begins, max(len(base), len(commonprefix([before, after]))))
        return after[:begins], after[begins:]

    def _tried(self, chat: Chat, count: int, cue: bool = False, extra: Message | None = None) -> str | None:
        """The text of a part of the chat; None where the template refuses it, or there is nothing."""
        if not count and not extra:
            return None
        try:
            return self._render(chat, count, cue, extra)
        except Exception:  # of any kind: the chat as a whole was accepted
            return None


def compiled(source: str, opening: str, closing: str, day: date) -> Any:
    """The template in the environment that transformers gives to templates: a sandbox, which cannot reach anything.

    Args:
        opening, closing: what is written around each {% generation %} block.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Marking(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{opening}{caller()}{closing}"

    class Sandbox(ImmutableSandboxedEnvironment):
        # Of these one alone can take hours, in which no signal is heard.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = [each for each in (left, right) if isinstance(each, int)]
            if any(abs(number) > LARGEST_NUMBER for number in numbers) or (operator == "**" and abs(right) > 64):
                raise ValueError("it computes with a number that is too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Marking, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": day.strftime}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Malformed(f"the chat template is not one: {error.message} in line {error.lineno} of it") from None
    except Exception as error:  # of any kind: some of it is computed already
        raise Malformed(f"the chat template cannot be read ({type(error).__name__})") from None


class _TooLong(BaseException):
    """The time is over; no `except Exception` of a template's helpers catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Limits of time and memory for a stranger's template: Malformed beyond SECONDS of the processor or MEMORY."""

    def end(*_: object) -> None:
        raise _TooLong

    hears = threading.current_thread() is threading.main_thread()  # a signal reaches no other
    before, limits = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    least = min((each for each in (taken, *limits) if each >= 0), default=taken)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (least, limits[1]))
        if hears:
            signal.signal(signal.SIGVTALRM, end)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except _TooLong:
        raise Malformed(f"the chat template takes more than {SECONDS:.0f} s for one chat") from None
    except MemoryError:
        raise Malformed("the chat template takes too much memory for one chat") from None
    finally:
        if hears:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter would escape the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(said: str) -> None:
    raise ValueError(said)


def _says(message: Message) -> bool:
    """A turn has words, a call or reasoning."""
    return bool(message["content"] or message.get("tool_calls") or message.get("reasoning_content"))


def _segments(text: str, spans: list[tuple[int, int]]) -> Segments:
    """The text up to the end of what is learned, in parts."""
    segments, at = Segments(), 0
    for start, end in spans:
        segments += [(text[at:start], False), (text[start:end], True)]
        at = end
    return segments


def _suited(chat: Chat, way: Way) -> Chat:
    """A chat as a template takes it."""
    return Chat([_message(message, way) for message in chat.messages], chat.learned, chat.tools, chat.arguments)


def _message(message: Message, way: Way) -> Message:
    content, calls = message["content"], message.get("tool_calls")
    if calls and way.alone:
        content = None
    if calls and way.as_json:
        functions = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        content = "\n".join([*filter(None, [content]), *functions])
    if content is None or (content == "" and calls):
        content = content if way.empty == KEPT else way.empty
    if way.in_parts and content is not None:
        message = {**message, "content": [{"type": "text", "text": content}]}
    else:
        message = {**message, "content": content}
    return message | {"tool_calls": list(map(_with_text, calls))} if calls and way.as_texts else message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as the text of a JSON object."""
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _loss(message: Message, part: str, written: list[bool]) -> str:
    """The name of what is lost of a part of a message, "" if nothing is."""
    if all(written):
        return ""
    if part == CALL and any(written):
        return IN_PART
    if part == WORDS and message.get("tool_calls"):
        return WORDS_LOST
    return {CALL: CALLS, WORDS: ANSWERS, THOUGHT: REASONING_LOST}[part]


def _said(loss: str, learned: bool) -> str:
    """The name of a loss, in a message that is learned or in another one."""
    if learned or loss in (IN_PART, WORDS_LOST):
        return loss
    return MESSAGES_LOST if loss in (CALLS, ANSWERS) else ""
