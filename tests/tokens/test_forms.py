"""Rows as people have them: which form each is, what of it is learned, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sets import PLAIN, model_with, processed, samples, write_rows
from slipway.commands.preprocess import preprocess
from slipway.errors import DataError, UsageError
from slipway.tokens.outputs import MOST_UNUSED

ASKED = [{"role": "user", "content": "q"}]
CHAT = [*ASKED, {"role": "assistant", "content": "a"}]
ANSWERED = "<|user|>q<|end|>\n<|assistant|>⟦a<|end|>⟧"
CALLED = '{"name": "f", "arguments": {"x": 1}}'


@pytest.fixture
def model(mxfp4_model, tmp_path) -> Path:
    return model_with(mxfp4_model, tmp_path / "model", PLAIN)


def given(model: Path, *rows: dict) -> Path:
    return write_rows(model.parent / "in.jsonl", rows)


def one(model: Path, row: dict, **options) -> str:
    """The samples of a row, one after the other."""
    return "".join(processed(model, given(model, row), show=0, **options)[0])


@pytest.mark.parametrize("row, wanted", [
    ({"text": "q"}, "⟦q<|end|>⟧"),
    ({"prompt": "q", "completion": "a"}, "q⟦a<|end|>⟧"),
    ({"prompt": "q", "response": "a"}, "q⟦a<|end|>⟧"),
    ({"input": "q", "output": "a"}, "q⟦a<|end|>⟧"),
    ({"question": "q", "answer": "a"}, ANSWERED),
    ({"instruction": "q", "input": "", "output": "a"}, ANSWERED),
    ({"instruction": "q", "output": "a"}, ANSWERED),
    ({"instruction": "q", "input": "x", "output": "a"}, "<|user|>q\nx<|end|>\n<|assistant|>⟦a<|end|>⟧"),
    ({"instruction": "q", "output": "a", "system": "s"}, "<|system|>s<|end|>\n" + ANSWERED),
    ({"instruction": "q", "output": "a", "history": [["q1", "a1"]]},
     "<|user|>q1<|end|>\n<|assistant|>⟦a1<|end|>⟧\n" + ANSWERED),
    ({"instruction": "q", "output": "a", "history": "[]", "text": "all of it"}, ANSWERED),
    ({"prompt": "q", "completion": "a", "system": "s"}, "<|system|>s<|end|>\n" + ANSWERED),
    ({"messages": CHAT}, ANSWERED),
    ({"messages": json.dumps(CHAT)}, ANSWERED),
    ({"messages": CHAT, "system": "s"}, "<|system|>s<|end|>\n" + ANSWERED),
    ({"prompt": ASKED, "completion": CHAT[1:]}, ANSWERED),
    ({"prompt": json.dumps(ASKED), "completion": json.dumps(CHAT[1:])}, ANSWERED),
    ({"prompt": ASKED, "completion": "a"}, ANSWERED),
    ({"prompt": "q", "completion": CHAT[1:]}, ANSWERED),
    ({"prompt": [*CHAT, *ASKED], "completion": CHAT[1:]},
     "<|user|>q<|end|>\n<|assistant|>a<|end|>\n" + ANSWERED),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ANSWERED),
    ({"conversations": CHAT}, ANSWERED),
    ({"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}],
      "system": "s", "mask": "User", "type": "TEXT_TO_VALUE"}, "<|system|>s<|end|>\n" + ANSWERED),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                        {"from": "function_call", "value": CALLED}, {"from": "observation", "value": "o"},
                        {"from": "gpt", "value": "a"}], "tools": "[]"},
     f"<|system|>s<|end|>\n<|user|>q<|end|>\n<|assistant|>⟦{CALLED}<|end|>⟧\n<|tool|>o<|end|>\n"
     "<|assistant|>⟦a<|end|>⟧"),
    ({"messages": [*ASKED,
                   {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                   {"role": "function", "name": "f", "content": {"deg": 3}}, CHAT[1]]},
     f'<|user|>q<|end|>\n<|assistant|>⟦{CALLED}<|end|>⟧\n<|tool|>{{"deg": 3}}<|end|>\n<|assistant|>⟦a<|end|>⟧'),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                   {"role": "assistant",
                    "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]}]},
     ANSWERED),
    ({"messages": [*ASKED, {"role": "assistant", "content": [{"type": "tool_call", "value": CALLED}]}]},
     f"<|user|>q<|end|>\n<|assistant|>⟦{CALLED}<|end|>⟧"),
    # Two spellings in a message: a table has the names of all of its rows, most of them null.
    ({"messages": [{"role": None, "content": None, "from": "human", "value": "q"},
                   {"role": "assistant", "content": "a", "from": None, "value": None}]}, ANSWERED),
    ({"messages": [{"role": "user", "content": "q", "from": "Alice", "value": "q"},
                   {"role": "assistant", "content": "a", "value": "", "from": "gpt"}]}, ANSWERED),
    ({"messages": [*ASKED, {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'},
                            "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}]}]},
     f"<|user|>q<|end|>\n<|assistant|>⟦{CALLED}<|end|>⟧"),
    # Several forms in a row: the first of the documented order counts, and a null is no key.
    ({"prompt": "p", "prompt_id": "x", "messages": CHAT}, ANSWERED),
    ({"text": "t", "messages": CHAT}, ANSWERED),
    ({"text": "t", "prompt": "q", "completion": "a"}, "q⟦a<|end|>⟧"),
    ({"messages": None, "text": "t", "chosen": None, "label": None}, "⟦t<|end|>⟧"),
    ({"text": "t", "label": 1}, "⟦t<|end|>⟧"),
    ({"messages": None, "conversations": CHAT}, ANSWERED),
])  # fmt: skip
def test_each_form(model, row, wanted):
    assert one(model, row) == wanted


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data .chosen, rejected."),
    ({"chosen": CHAT, "rejected": CHAT}, "preference data"),
    ({"conversations": CHAT, "chosen": {"from": "gpt", "value": "a"}, "rejected": {}}, "preference data"),
    ({"messages": CHAT, "rejected_response": "b"}, "preference data .rejected_response."),
    ({"messages": CHAT, "label": True}, "preference data .label."),
    ({"messages": CHAT, "label": "false"}, "preference data .label."),
    ({"prompt": "q", "completion": "a", "label": False}, "preference data .label."),
    ({"instruction": "q", "output": "a", "kto_tag": True}, "preference data .kto_tag."),
    ({"prompt": "q", "completions": ["a"], "labels": [True]}, "preference data"),
    ({"messages": CHAT, "images": ["x.jpg"]}, "images beside the text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]}, "message 1: .*type image"),
    ({"prompt": "q", "completion": None}, "its keys are prompt .and null are completion.; needed are"),
    ({"prompt": "q", "completion": 3}, '"completion" is int, not text'),
    ({"instruction": "q", "output": ["a"]}, '"output" is list, not text'),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, '"history" is not a list of pairs'),
    ({"query": "q", "reply": "a"}, "its keys are query, reply; .*--map"),
    ({}, "its keys are none"),
    ({"text": 3}, '"text" is int'),
    ({"messages": []}, "not a list of messages, or an empty one"),
    ({"messages": "hello"}, "not a list of messages"),
    ({"messages": [3]}, "message 1: it is not an object"),
    ({"messages": [{"content": "x"}]}, 'message 1: it has no "role"'),
    ({"messages": [{"role": 3, "from": "human", "content": "x"}]}, 'message 1: it has no "role"'),
    ({"messages": [{"role": "robot", "content": "x"}]}, "message 1: its role 'robot' is not known"),
    ({"messages": [{"role": "user"}, CHAT[1]]}, "message 1: its content is null"),
    ({"messages": [*ASKED, {"role": "assistant", "content": None}]}, "message 2: .* calls no tool"),
    ({"messages": [*ASKED, {"role": "assistant", "content": 3}]}, "message 2: its content is int"),
    ({"messages": [*ASKED, {**CHAT[1], "weight": 0.5}]}, "message 2: weight is 0.5"),
    ({"messages": [*ASKED, {**CHAT[1], "value": "b"}]}, 'message 2: its "content" and its "value" say two things'),
    ({"messages": [*ASKED, {**CHAT[1], "from": "human"}]}, 'message 2: its "role" and its "from" say two things'),
    ({"messages": [*ASKED, {**CHAT[1], "thinking": "t", "reasoning": "r"}]}, '"reasoning" and its "thinking" say two'),
    ({"messages": [*ASKED, {**CHAT[1], "weight": 1, "train": False}]}, '"weight" and its "train" say two things'),
    ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]},
     '"tool_calls" and its "function_call" say two things'),
    ({"messages": [*ASKED, {**CHAT[1], "label": "toxicity:0"}]}, "message 2: it has a label"),
    ({"conversations": [*ASKED, {"from": "function_call", "value": "f(x)"}]}, "message 2: a call of a tool is not"),
    ({"conversations": CHAT, "mask": "Assistant"}, "the user's words would be learned"),
    ({"messages": CHAT, "tools": "weather"}, "tools is not a list"),
    ({"messages": CHAT, "tools": [3]}, "tools holds something"),
    ({"messages": CHAT, "chat_template_kwargs": 3}, "chat_template_kwargs is not an object"),
    ({"inputs": {"p_ids": [1]}}, '"inputs" is not'),
])  # fmt: skip
def test_what_is_refused_is_named(model, row, said):
    data = write_rows(model.parent / "in.jsonl", [{"text": "fine"}, row])
    for workers in (1, None):
        with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{said}"):
            processed(model, data, show=0, workers=workers)


def test_the_demo_of_preferences_is_refused_whatever_is_shown(model):
    data = write_rows(model.parent / "in.jsonl", [{"messages": CHAT, "label": True}])
    for show in (0, 1):
        with pytest.raises(DataError, match=r"in\.jsonl:1: preference data"):
            processed(model, data, show=show)


def test_keys_under_other_names(model, capsys):
    row = {"query": "q", "reply": "a", "id": 7}
    assert one(model, row, map=["query=question", "reply=answer"]) == ANSWERED
    assert one(model, {"dialogue": CHAT}, map=["dialogue=messages"]) == ANSWERED
    # Ours gives way where it has another meaning in these rows.
    assert one(model, {"prompt": "q", "response": "no", "gold": "a"}, map=["gold=response"]) == "q⟦a<|end|>⟧"
    for pairs, said in (
        (["question=query"], "'query' is no key of ours; write --map query=question"),
        (["query=qestion"], "did you mean question"),
        (["query"], "is not THEIRS=OURS"),
    ):
        with pytest.raises(UsageError, match=said):
            one(model, row, map=pairs)
    with pytest.raises(DataError, match="no row has the key 'qery' of --map"):
        one(model, {"text": "t"}, map=["qery=question"])


def test_how_pairs_are_written(model, mxfp4_model, tmp_path):
    pair, alpaca = {"prompt": "q", "completion": "a"}, {"instruction": "q", "input": "x", "output": "a"}
    assert one(model, pair, pairs="chat") == ANSWERED
    text = one(model, alpaca, pairs="text")
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nq\n\n### Input:\nx\n\n### Response:\n⟦a<|end|>⟧")
    (tmp_path / "base").mkdir()
    base = model_with(mxfp4_model, tmp_path / "base" / "model", None)
    assert one(base, alpaca) == text, "a model without a template is no chat model"
    assert one(base, {"question": "q", "answer": "a"}) == "Question: q\nAnswer:⟦ a<|end|>⟧"
    with pytest.raises(DataError, match="no chat template"):
        one(base, pair, pairs="chat")


def test_every_key_that_is_not_used_is_said(model, tmp_path):
    """Of every row, not only of the first, and in messages too."""
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello.", "refusal": "", "note": "x"}]
    chosen = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", "context": "long", "": 0}]
    _, counts = processed(model, given(model, *chosen, {"messages": turns, "context": "e"}))
    assert counts["notes"] == ["keys not used, and in how many rows: context in 2, '' in 1, note of messages in 1"]
    many = [{"question": "a", "answer": "b", f"key {number}": 1} for number in range(3000)]
    _, counts = processed(model, given(model, *many))
    assert counts["notes"][0].count(" in 1,") == MOST_UNUSED and counts["notes"][0].endswith("other keys in 2950")
    data = given(model, {"text": "a", "url": "b"})
    done = preprocess(str(data), str(tmp_path / "x.bin"), tokenizer=str(model), show=0)
    assert done.details["notes"] == ["keys not used, and in how many rows: url in 1"]


@pytest.mark.parametrize("key", ["images", "audio"])
def test_a_picture_in_a_message_is_refused(model, key):
    turns = [{"role": "user", "content": "What is this?", key: ["a"]}, {"role": "assistant", "content": "A cat."}]
    with pytest.raises(DataError, match=f"message 1: {key} beside the text, which is not learned"):
        processed(model, given(model, {"messages": turns}))


def test_what_is_recognised_is_said(model, capsys):
    one(model, {"prompt": "p", "id": 3, "messages": CHAT})
    assert "reading in.jsonl (JSON lines)" in (said := capsys.readouterr().err)
    assert "rows of messages; not used: prompt, id" in said and "⟦" not in said
    processed(
        model, write_rows(model.parent / "in.jsonl", [{"messages": CHAT}, {"text": "\x1b[2J" + "long " * 400}]), show=2
    )
    said = capsys.readouterr().err
    assert "sample 1 of 7 tokens, ⟦learned⟧:\n  | <|user|>q<|end|>\n  | <|assistant|>⟦a<|end|>⟧" in said
    assert "\x1b" not in said and "\\x1b[2J" in said and " … " in said and len(said) < 2000


def test_counts_add_up(model):
    rows = [
        {"messages": CHAT},
        {"text": "t"},
        {"prompt": "q", "completion": ""},
        {"prompt": "q " * 600, "completion": "a"},
    ]
    found, counts = processed(model, write_rows(model.parent / "in.jsonl", rows), seq_length=64, long="drop")
    assert counts["samples"] == len(found) == 2
    assert counts["dropped_empty"] == counts["dropped_too_long"] == 1
    assert counts["messages_rows"] == counts["text_rows"] == 1 and counts["prompt_and_completion_rows"] == 2
    kept = samples(next(model.parent.glob("out*")))
    assert counts["tokens"] == sum(len(s.prompt) + len(s.response) for s in kept)
    assert counts["learned"] == sum(len(s.response) - sum(e - b for b, e in s.context) for s in kept)


# ---------------------------------------------------------------------------- where a text begins


def with_begin(mxfp4_model: Path, folder: Path, config: dict, template: str | None = None) -> Path:
    """The model with a token that its tokenizer puts before a text."""
    from tokenizers import Tokenizer, processors

    model = model_with(mxfp4_model, folder, template)
    if config.pop("processor", False):
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|system|> $A", special_tokens=[("<|system|>", 2)]
        )
        tokenizer.save(str(model / "tokenizer.json"))
    words = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<|system|>"} | config
    (model / "tokenizer_config.json").write_text(json.dumps(words))
    return model


BEGINS = [
    {"processor": True},
    {"processor": True, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    {"tokenizer_class": "LlamaTokenizerFast"},
    {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    {},
]


@pytest.mark.parametrize("config", BEGINS)
def test_a_text_begins_as_in_the_model_s_inference(mxfp4_model, tmp_path, config):
    from transformers import AutoTokenizer

    model = with_begin(mxfp4_model, tmp_path / "model", dict(config), PLAIN)
    wanted = AutoTokenizer.from_pretrained(model)("words")["input_ids"]
    rows = [
        {"text": "words"},
        {"prompt": "words", "completion": "more"},
        {"text": "<|system|>words"},
        {"messages": CHAT},
    ]
    text, pair, own, chat = (
        [*s.prompt, *s.response]
        for s in (processed(model, write_rows(tmp_path / "in.jsonl", rows)), samples(next(tmp_path.glob("out*"))))[1]
    )
    assert text[: len(wanted)] == pair[: len(wanted)] == wanted
    assert own.count(2) == 1 and chat.count(2) == 0, "once, and in a chat where the template writes it"


def test_only_the_beginning_of_a_text_has_it(mxfp4_model, tmp_path, monkeypatch):
    from slipway.tokens import inputs

    monkeypatch.setattr(inputs, "PIECE_BYTES", 40)
    model = with_begin(mxfp4_model, tmp_path / "model", {"processor": True})
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("some words in a line\n" * 20)
    preprocess(str(tmp_path / "texts"), str(tmp_path / "x.jsonl"), tokenizer=str(model), seq_length=16, show=0)
    assert [token for s in samples(tmp_path / "x.jsonl") for token in s.response].count(2) == 2
