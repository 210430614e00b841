"""Rows and chats, and what is built of them, without a tokenizer."""

from __future__ import annotations

import json
from datetime import date
from itertools import product
from typing import Any

import pytest
from slipway.tokens import chat
from slipway.tokens.chat import Template
from slipway.tokens.forms import FORMS, Pair, form_of
from slipway.tokens.messages import Chat, Malformed, chat_of

USER = {"role": "user", "content": "q"}
SAYS = {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": "é"}}


def built(row: dict[str, Any]) -> Any:
    return form_of(row).build(row)


# ---------------------------------------------------------------------------- forms


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_with_just_the_keys_of_a_form_is_of_it(form):
    keys = ("prompt", "completion") if form.name == "prompt and completion" else form.needs
    assert form_of(dict.fromkeys(keys, "x")).name == form.name
    assert " and ".join(form.needs) in form.name or form.needs == ("inputs",)


def test_what_is_not_used_is_told():
    row = {"messages": [USER, SAYS], "system": "s", "tools": None, "id": 3, "text": "t"}
    assert sorted(form_of(row).unused(row)) == ["id", "text"]


def test_messages_in_a_text_are_messages():
    as_text = {"prompt": json.dumps([USER]), "completion": f" {json.dumps([SAYS])}"}
    assert built(as_text) == built({"prompt": [USER], "completion": [SAYS]})
    for text in ('{"a": 1}', "[1]", "[{", "plain"):
        found = built({"prompt": text, "completion": "c"})
        assert isinstance(found, Pair) and (found.prompt, found.completion) == (text, "c"), "any other text is text"
    assert built({"prompt": [USER], "completion": "a"}) == built({"prompt": "q", "completion": [SAYS]})


@pytest.mark.parametrize("key, value", [("prompt", 3), ("completion", {"a": 1}), ("prompt", True)])
def test_what_is_neither_text_nor_messages_is_named(key, value):
    row = {"prompt": "q", "completion": "a", key: value}
    with pytest.raises(Malformed, match=f'^"{key}" is {type(value).__name__}, not text and not a list of messages$'):
        built(row)


def test_many_keys_are_shown_shortly():
    with pytest.raises(Malformed, match=r"its keys are (k\d+, ){11}k11 and 8 more \(and null are n\); needed are"):
        form_of({f"k{number}": 1 for number in range(20)}, ["n"])
    with pytest.raises(Malformed, match=r"its keys are (k\d+, ){11}k11 and 1 more;"):
        form_of({f"k{number}": 1 for number in range(13)})
    with pytest.raises(Malformed, match=r"its keys are (k\d+, ){11}k11;"):
        form_of({f"k{number}": 1 for number in range(12)})
    with pytest.raises(Malformed, match=f"its keys are {'k' * 40};"):
        form_of({"k" * 60: 1})


# ---------------------------------------------------------------------------- messages


def test_the_system_s_words_come_first_and_once():
    found = chat_of([USER, SAYS], {"system": "s"})
    assert found.messages[0] == {"role": "system", "content": "s"} and found.learned == [False, False, True]
    own = {"role": "system", "content": "own"}
    assert chat_of([own, USER, SAYS], {"system": "own"}).messages == [own, USER, SAYS]
    for nothing in ("", None):
        assert len(chat_of([USER, SAYS], {"system": nothing}).messages) == 2
    for messages in ([own, USER, SAYS], [USER, own, SAYS], [own, USER, {"role": "system", "content": "s"}, SAYS]):
        with pytest.raises(
            Malformed, match='"system" stands beside a system message that says something else; keep one'
        ):
            chat_of(messages, {"system": "s"})
    for key, value in product(("system", "mask"), (3, ["a"], {"a": 1})):
        with pytest.raises(Malformed, match=f'"{key}" is {type(value).__name__}, not text'):
            chat_of([USER, SAYS], {key: value})


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize("value, learned", [(0, False), (1, True), (True, True), (False, False), (None, True)])
def test_a_turn_that_is_not_to_be_learned(key, value, learned):
    from slipway.tokens.messages import UNLEARNED

    if key in UNLEARNED:
        assert chat_of([USER, {**SAYS, key: value}], {}).learned == [False, learned]


def test_what_a_speaker_says_that_is_masked_is_not_learned():
    turns = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]
    assert chat_of(turns, {"mask": "User"}).learned == [False, True]
    with pytest.raises(Malformed, match="the user's words would be learned"):
        chat_of(turns, {"mask": "Assistant"})


@pytest.mark.parametrize("content", ["[1", "{", '{"a"', "[]"])
def test_a_text_that_only_looks_like_json_stays_text(content):
    """A call's arguments may be such."""
    call = {**CALL, "arguments": content}
    found = chat_of([USER, {"role": "assistant", "content": None, "tool_calls": [call]}], {}).messages[1]
    wanted = [] if content == "[]" else content
    assert found["tool_calls"][0]["function"]["arguments"] == wanted


@pytest.mark.parametrize("part, said", [
    ({"type": "text"}, "a part of its content has no text"), ({"type": "text", "text": 3}, "has no text"),
    ({"type": "reasoning", "reasoning": 3}, "has no text"), ({"type": "image"}, "of type image"),
])  # fmt: skip
def test_parts_that_are_no_text(part, said):
    with pytest.raises(Malformed, match=f"^message 2: a part of its content .*{said.partition('content ')[2] or said}"):
        chat_of([USER, {"role": "assistant", "content": [part]}], {})


# ---------------------------------------------------------------------------- templates


def template(source: str, **arguments: Any) -> Template:
    return Template(source, {"eos_token": "<e>"}, ["<e>"], arguments, date(2026, 5, 6))


def texts(source: str, *messages: dict[str, Any], **arguments: Any) -> list[list[tuple[str, bool]]]:
    return template(source, **arguments).render(chat_of(list(messages), {}), last=False).samples


def test_a_template_that_wants_the_arguments_of_a_call_as_a_text_gets_one():
    asks = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}={0}{% endfor %}"
    )
    asks += "<e>{% endfor %}"
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "arguments": '["t"]'}]}
    for argument, shown in (
        ("{{ c.function.arguments.upper() }}", 'f={"X": "É"}f=["T"]'),
        ("{{ c.function.arguments.x }}", "f=éf="),
        ("{{ c.function.arguments | tojson }}", 'f={"x": "é"}f=["t"]'),
    ):
        ((*_, learned),) = texts(asks.replace("{0}", argument), USER, calls)
        assert learned == (f"{shown}<e>", True)


def test_a_template_that_wants_content_in_parts_gets_parts():
    asks = "{% for m in messages %}{% for p in m.content %}{{ p['text'] }}{% endfor %}<e>{% endfor %}"
    assert texts(asks, USER, SAYS) == [[("q<e>", False), ("a<e>", True)]]


def test_lines_of_a_template_are_as_transformers_has_them():
    """A new line after a block is not written, nor the white space before one."""
    asks = "{% for m in messages %}\n  {{ m.content }}<e>\n  {% endfor %}\n"
    assert "".join(text for text, _ in texts(asks, USER, SAYS)[0]) == "  q<e>\n  a<e>"


def test_the_day_is_that_of_the_settings():
    assert "06.05.2026" in "".join(
        text for text, _ in texts("{{ strftime_now('%d.%m.%Y') }} {{ messages[-1].content }}<e>", USER, SAYS)[0]
    )


@pytest.mark.parametrize("source, said", [
    ("{{ 9 ** 65 }}", "it computes with a number that is too large"),
    ("{{ 2000000000000 * 2 }}", "it computes with a number that is too large"),
    ("{{ 'a' * 2000000000000 }}", "it computes with a number that is too large"),
    ("{{ 'a' * 20000000 }}", "the chat template writes more than 16,777,216 characters for one chat"),
    ("{{ 'a' * 1000000000 }}", "the chat template takes too much memory for one chat"),
    ("{{ raise_exception('only two') }}", "the chat template refuses this chat: only two"),
    ("{{ messages | nothing }}", r"the chat template is not one: No filter named 'nothing'. in line 1 of it"),
    ("{% if %}", "the chat template is not one: .* in line 1 of it"),
    ("nothing", "the chat template refuses this chat: it leaves out what the assistant says"),
])  # fmt: skip
def test_a_template_that_does_too_much_or_nothing_is_named(source, said):
    with pytest.raises(Malformed, match=said):
        texts(source, USER, SAYS)


def test_what_a_template_may_compute():
    sums = "{% for m in messages %}{{ 9 ** 19 // 9 ** 19 }}{{ 1000 * 1000 }}{{ m.content }}<e>{% endfor %}"
    assert "".join(text for text, _ in texts(sums, USER, SAYS)[0]) == "11000000q<e>11000000a<e>"


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}a"
    with pytest.raises(Malformed, match="takes more than 0 s for one chat"):
        texts(forever, USER, SAYS)


def test_limits_of_the_process_are_as_they_were():
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    texts("{{ messages[-1].content }}<e>", USER, SAYS)
    with pytest.raises(Malformed):
        texts("{{ 'a' * 1000000000 }}", USER, SAYS)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
    with chat.bounded():
        assert before[0] != resource.getrlimit(resource.RLIMIT_AS)


def test_a_chat_without_turns_to_learn_gives_nothing():
    found = template("{{ messages }}").render(Chat([USER], [False], [], {}), last=False)
    assert not found.samples and not any(found.counts.values())
