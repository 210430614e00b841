"""What `preprocess` shows before it works, to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sets import PLAIN, model_with, write_rows
from slipway.errors import DataError
from slipway.tokens.encoder import Encoder, Settings
from slipway.tokens.folders import inputs_of
from slipway.tokens.preview import preview


@pytest.fixture(scope="module")
def model(mxfp4_model, tmp_path_factory) -> Path:
    return model_with(mxfp4_model, tmp_path_factory.mktemp("preview") / "model", PLAIN)


@pytest.fixture
def shown(model, capsys):
    """Shows a file and returns the lines."""

    def show(data: Path, count: int = 1, tokenizer: Path = model) -> list[str]:
        encoder = Encoder(Settings(tokenizer, 4096))
        capsys.readouterr()
        preview(data, inputs_of(data, None), encoder, count)
        return capsys.readouterr().err.splitlines()

    return show


def tokens(model: Path, text: str) -> int:
    return len(Encoder(Settings(model, 99)).encode(text))


def test_a_text(shown, model, tmp_path):
    (tmp_path / "a.txt").write_text("two\nlines\x1b[2J")
    assert shown(tmp_path / "a.txt") == [
        "preprocess: reading a.txt (text)",
        f"preprocess: sample 1 of {tokens(model, 'two' + chr(10) + 'lines' + chr(27) + '[2J')} tokens, ⟦learned⟧:",
        "  | ⟦two",
        "  | lines\\x1b[2J⟧",
    ], "its end is not shown, since only its beginning is read"


def test_a_long_text_is_shown_by_both_ends_of_its_beginning(shown, tmp_path):
    (tmp_path / "a.txt").write_text("a" + "é" * 3000)  # the 2000 bytes that are read end inside of a letter
    head = shown(tmp_path / "a.txt")[2]
    assert head == "  | ⟦a" + "é" * 199 + " … " + "é" * 200 + "⟧"
    (tmp_path / "b.txt").write_text("b" * 400)
    assert shown(tmp_path / "b.txt")[2] == "  | ⟦" + "b" * 400 + "⟧"
    (tmp_path / "c.txt").write_text("c" * 401)
    assert shown(tmp_path / "c.txt")[2] == "  | ⟦" + "c" * 200 + " … " + "c" * 200 + "⟧"


def test_rows(shown, model, tmp_path):
    rows = [{"prompt": "p", "completion": "c", "id": 3}, {"text": "t"}, {"text": "u"}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    about = ["preprocess: reading a.jsonl (JSON lines)", "preprocess: rows of prompt and completion; not used: id"]
    first = ["preprocess: sample 1 of 3 tokens, ⟦learned⟧:", "  | p⟦c<|end|>⟧"]
    second = ["preprocess: sample 2 of 2 tokens, ⟦learned⟧:", "  | ⟦t<|end|>⟧"]
    for count, samples in ((0, []), (1, first), (2, first + second)):
        assert shown(file, count) == about + samples
    assert len(shown(file, 9)) == 8, "there are three"
    assert shown(write_rows(tmp_path / "b.jsonl", rows[1:]), 0)[1] == "preprocess: rows of text"


def test_each_turn_that_is_learned_is_marked(shown, tmp_path):
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    assert shown(file)[3:] == [
        "  | <|user|>q<|end|>",
        "  | <|assistant|>⟦a<|end|>⟧",
        "  | <|user|>r<|end|>",
        "  | <|assistant|>⟦b<|end|>⟧",
    ]
    sample = shown(file)[2]
    assert int(sample.split()[4]) == 15, sample


def test_a_row_that_teaches_nothing_is_passed_over(shown, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "completion": ""}, {"prompt": "q", "completion": "c"}])
    assert shown(file)[-1] == "  | q⟦c<|end|>⟧"


def test_a_malformed_row_is_named_whatever_is_shown(shown, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"reply": "x"}\n')
    for count in (0, 1):
        with pytest.raises(DataError, match=r"a\.jsonl:1: no form that is known"):
            shown(tmp_path / "a.jsonl", count)


def test_nothing_to_read_is_nothing_to_show(shown, tmp_path):
    (tmp_path / "a.txt").touch()
    assert shown(tmp_path / "a.txt") == ["preprocess: reading a.txt (text)"]
    (tmp_path / "b.jsonl").write_text("\n\n")
    assert shown(tmp_path / "b.jsonl") == ["preprocess: reading b.jsonl (JSON lines)"]


def test_code_of_a_tokenizer_is_said_not_to_run(shown, model, tmp_path):
    own = model_with(model, tmp_path / "own", PLAIN)
    config = own / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["a.T", None]}}))
    (tmp_path / "a.txt").write_text("x")
    said = shown(tmp_path / "a.txt", tokenizer=own)[1]
    assert said == (
        "preprocess: the tokenizer has code of its own (auto_map), which is never run: tokenizer.json alone is used"
    )
