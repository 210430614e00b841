"""What a template leaves out of a chat is written in another way, or it is counted; an answer is never lost."""

from __future__ import annotations

import pytest
from sets import model_with, processed, write_rows
from slipway.errors import DataError

END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALL = "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
# As DeepSeek-R1's distilled models have it: calls only where the content is null, with arguments that are text.
IF_NULL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.content is none %}"
    "{{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}"
    "{% else %}{{ m.content }}{% endif %}" + END
)
IF_EMPTY = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% else %}" + CALL + "{% endif %}" + END
)
# As Llama 3.1 has it: a message with calls has no words.
NO_WORDS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if 'tool_calls' in m %}"
    + CALL
    + "{% else %}{{ m.content }}{% endif %}"
    + END
)
# It says tool_calls, but writes no call whatever is given to it.
NEVER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls is none %}x{% endif %}" + END
NAMES = IF_NULL.replace("+ ' ' + m.tool_calls[0].function.arguments ", "")
# As SmolVLM has it: what is no list of parts is passed over.
PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}" + END


@pytest.fixture
def learned(mxfp4_model, tmp_path):
    """learned(template, messages) → (the samples, marked, as one text, and the counts)."""

    def run(template: str, messages: list, **options: object) -> tuple[str, dict]:
        model = model_with(mxfp4_model, tmp_path / f"model-{len(list(tmp_path.iterdir()))}", template)
        found, counts = processed(model, write_rows(tmp_path / "in.jsonl", [{"messages": messages}]), **options)
        return "".join(found), counts

    return run


def asked(content: str | None, **arguments: object) -> list[dict]:
    """Weather as OpenAI's clients write it: the arguments of a call are text."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    return [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]


WHOLE = "<|user|>Weather in Rome?<|end|><|assistant|>⟦{}<|end|>⟧<|tool|>sunny<|end|><|assistant|>⟦Sunny.<|end|>⟧"
WRITTEN = 'weather {"city": "Paris"}'
BESIDE = "words_beside_calls_left_out"


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("template", [IF_NULL, IF_EMPTY, NO_WORDS])
def test_a_call_is_written_whatever_its_content_is(learned, template, content):
    found, counts = learned(template, asked(content))
    assert found == WHOLE.format(WRITTEN) and counts.get(BESIDE, 0) == bool(content)


@pytest.mark.parametrize("city", ["Paris", "None"])
def test_null_is_never_the_word_none(learned, city):
    """It asks for null, but of something else."""
    template = (
        "{% if tools is not none %}T{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}" + CALL + "{% endif %}" + END
    )
    messages = asked(None)
    messages[1]["tool_calls"][0]["function"]["arguments"] = f'{{"city": "{city}"}}'
    found, counts = learned(template, messages)
    assert found == WHOLE.format(f'weather {{"city": "{city}"}}') and "calls_as_text" not in counts


@pytest.mark.parametrize("content, words", [(None, ""), ("", ""), ("Let me look.", "Let me look.\n")])
def test_a_call_that_a_template_never_writes_is_text(learned, content, words):
    found, counts = learned(NEVER, asked(content))
    assert found == WHOLE.format(words + '{"name": "weather", "arguments": {"city": "Paris"}}')
    assert counts["calls_as_text"] == 1 and BESIDE not in counts


@pytest.mark.parametrize("value", ['"Paris"', "7", "7.5", '{"in": ["Paris"]}'])
def test_a_call_without_its_arguments_is_counted(learned, value):
    messages = asked("")
    messages[1]["tool_calls"][0]["function"]["arguments"] = f'{{"city": {value}}}'
    found, counts = learned(NAMES, messages)
    assert found == WHOLE.format("weather") and counts["calls_written_in_part"] == 1


@pytest.mark.parametrize("answer", ["A", "user", "s"])
def test_an_answer_that_stands_in_the_template_s_own_words(learned, answer):
    messages = [{"role": "user", "content": "List A or B?"}, {"role": "assistant", "content": answer}]
    found, _ = learned(PARTS, messages)
    assert found == f"User: List A or B?<|end|>Assistant: ⟦{answer}<|end|>⟧"
    with pytest.raises(DataError, match="leaves out what the assistant says"):
        learned(
            "Assistant user s {% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            messages,
        )


def test_other_messages_that_are_left_out_are_counted(learned):
    messages = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    found, counts = learned(NO_SYSTEM, messages)
    assert found == "<|user|>a<|end|><|assistant|>⟦b<|end|>⟧" and counts["messages_left_out"] == 1


def test_reasoning_that_a_template_with_marks_leaves_out(learned):
    """As those of transformers for training have it: the reasoning of the last turn alone is written."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    )
    turns = [("user", "q1", None), ("assistant", "a1", "r1"), ("user", "q2", None), ("assistant", "a2", "r2")]
    messages = [{"role": role, "content": text, "reasoning_content": thought} for role, text, thought in turns]
    found, counts = learned(template, messages)
    assert "<think>r2</think>a2" in found and "r1" not in found and counts["reasoning_left_out"] == 1


def test_reasoning_that_stands_in_the_answer_too(learned):
    answer = {"role": "assistant", "content": "It is 4.", "reasoning_content": "4"}
    _, counts = learned(NO_SYSTEM, [{"role": "user", "content": "2+2?"}, answer])
    assert counts["reasoning_left_out"] == 1
