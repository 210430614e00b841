"""What a model's folder says of its tokens, and what is said of a folder that does not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from slipway.errors import DataError, UsageError
from slipway.tokens.vocabulary import folder_of, loaded, quiet_panics, tokenizer_folder
from tokenizers import Tokenizer, models


def folder(tmp_path: Path, **config: Any) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<b>": 1, "<e>": 2}, unk_token="a"))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_text_is_neither_cut_nor_filled(tmp_path):
    tokenizer = loaded(folder(tmp_path))
    assert tokenizer.truncation is None and tokenizer.padding is None


def test_special_tokens_are_texts_or_objects_with_one(tmp_path):
    found = folder_of(
        folder(tmp_path, bos_token="<b>", eos_token={"content": "<e>"}, pad_token=None, unk_token=3, x="y")
    )
    assert found.special == {"bos_token": "<b>", "eos_token": "<e>"} and found.end(loaded(tmp_path)) == 2
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "old", "sep_token": "<s>"}')
    assert folder_of(tmp_path).special == {"bos_token": "<b>", "eos_token": "<e>", "sep_token": "<s>"}


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": ""}])
def test_a_model_without_an_end_is_named(tmp_path, config):
    with pytest.raises(UsageError) as error:
        folder_of(folder(tmp_path, **config)).end(loaded(tmp_path))
    assert str(error.value) == (
        f"{tmp_path / 'tokenizer_config.json'} has no eos_token; add one, or use --no-append-eos"
    )


def test_an_end_that_the_tokenizer_does_not_know_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"config.json: its eos_token '<none>' is not in tokenizer.json; correct it, or"
    ):
        folder_of(folder(tmp_path, eos_token={"content": "<none>"})).end(loaded(tmp_path))


@pytest.mark.parametrize("config, begin", [
    ({"tokenizer_class": "LlamaTokenizer"}, [1]), ({"tokenizer_class": "CodeLlamaTokenizerFast"}, [1]),
    ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": False}, []), ({"tokenizer_class": "Other"}, []), ({}, []),
])  # fmt: skip
def test_what_a_text_begins_with(tmp_path, config, begin):
    assert folder_of(folder(tmp_path, bos_token="<b>", **config)).begin(loaded(tmp_path)) == begin
    assert folder_of(folder(tmp_path, **config)).begin(loaded(tmp_path)) == []


@pytest.mark.parametrize("templates", ["plain", {"default": "plain"}, [{"name": "default", "template": "plain"}]])
def test_a_template_is_a_text_or_has_a_name(tmp_path, templates):
    found = folder_of(folder(tmp_path, chat_template=templates))
    assert found.has_template and found.template(False) == found.template(True) == "plain"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("no template")
    assert (found.template(True), found.template(False)) == ("for tools", "plain")
    (tmp_path / "chat_template.jinja").write_text("own")
    assert (found.template(True), found.template(False)) == ("for tools", "own"), "the file of its own comes first"


def test_a_model_without_a_template_is_named(tmp_path):
    found = folder_of(folder(tmp_path, chat_template={"tool_use": "x"}))
    assert not found.has_template and found.template(True) == "x"
    with pytest.raises(DataError, match=f"^{tmp_path}: the tokenizer has no chat template; give the model that"):
        found.template(False)


@pytest.mark.parametrize("templates, said", [
    ([3], "chat_template is not a list of names and templates"), ([{"name": "a"}], "is not a list of names"),
    ([{"name": [], "template": "x"}], "is not a list of names"), (3, "chat_template is not a text"),
    ({"default": 3}, "chat_template is not a text"), ([{"name": "default", "template": 3}], "is not a text"),
    ("x" * (1 << 20 | 1), "a chat template has more than 1,048,576 characters"),
])  # fmt: skip
def test_what_is_no_template_is_named(tmp_path, templates, said):
    with pytest.raises(DataError, match=f"^{tmp_path}.*{said}.*; copy it again$"):
        folder_of(folder(tmp_path, chat_template=templates)).template(False)


def test_the_longest_template_is_taken(tmp_path):
    assert len(folder_of(folder(tmp_path, chat_template="x" * (1 << 20))).template(False)) == 1 << 20


def test_where_a_model_s_tokenizer_is(tmp_path):
    with pytest.raises(UsageError, match=r"has no tokenizer.json; give the folder of a model that has one"):
        tokenizer_folder(str(tmp_path))
    inside = tmp_path / "context" / "nemo_tokenizer"
    inside.mkdir(parents=True)
    assert tokenizer_folder(str(folder(inside).parents[1])) == inside
    assert tokenizer_folder(str(folder(tmp_path))) == tmp_path


def test_what_the_library_writes_itself_is_not_seen(capfd):
    os.write(2, b"before ")
    with quiet_panics():
        os.write(2, b"a panic ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"
    with pytest.raises(ValueError), quiet_panics():
        raise ValueError
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with quiet_panics():
            pass
    assert len(os.listdir("/proc/self/fd")) == before, "no descriptor stays open"


def test_a_tokenizer_that_is_none_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "X"}}')
    with pytest.raises(
        DataError, match=r"^.*tokenizer\.json cannot be used as a tokenizer \(.{1,140}\); copy it again$"
    ):
        loaded(tmp_path)
