"""Tokenizers and chat templates of strangers.

What they do: tokenizer.json is garbled or makes the library panic; its normalizer makes a text a million times as
long, its patterns try for ever; a template raises, does not parse, never ends, or multiplies a text; a folder asks for
its own code to be run; a line has 20 MB.

What must happen: exit code 65 or 2 and one line, in bounded time and memory; no code of a folder is run.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slipway.tokens import limits

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(CHAT) + "\n")
    return file


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "does not parse": "{% if %}",
    "an unknown filter": "{{ messages | nothing }}",
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "multiplies a text": "{{ 'a' * 10000000000 }}",
    "multiplies in steps": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}"
    "{% endfor %}{{ n.t }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a wide text": "{{ 'a'.ljust(100000000000) }}",
    "a wide filter": "{{ 'a' | center(100000000000) }}",
    "a wide format": "{{ '%100000000000d' % 1 }}",
    "another wide format": "{{ '{:>100000000000}'.format(1) }}",
    "numbers of numbers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"
    "{{ n.x }}",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "includes": "{% include '/etc/passwd' %}",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(arena, model, chats, tmp_path, name):
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    found = arena.run("preprocess", chats, tmp_path / "out.jsonl", "--tokenizer", model, "--seq-length", "64")
    assert "chat template" in found.check(65, lines=None), found.err
    assert "root:" not in found.err


GARBLED = {
    "nothing": b"", "brackets": b"[" * 100_000, "bytes": bytes(range(256)), "a list": b"[]", "an empty object": b"{}",
    "no model": b'{"version": "1.0", "model": null}',
    "an unknown model": b'{"version": "1.0", "model": {"type": "X", "vocab": {}, "merges": []}}',
    "merges of nothing": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
    "a pattern without an end": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]},"normalizer":'
    b'{"type":"Replace","pattern":{"Regex":"(("},"content":""}}',
    "an empty unigram": b'{"version":"1.0","model":{"type":"Unigram","unk_id":5,"vocab":[["a",0.0]]}}',
}  # fmt: skip


@pytest.mark.parametrize("name", GARBLED)
def test_tokenizers(arena, model, chats, tmp_path, name):
    (model / "tokenizer.json").write_bytes(GARBLED[name])
    found = arena.run("preprocess", chats, tmp_path / "out.jsonl", "--tokenizer", model)
    assert "token" in found.check(65, 2, lines=None)


def replaced(text: str, by: str, times: int = 1) -> dict[str, object]:
    each = {"type": "Replace", "pattern": {"String": text}, "content": by}
    return {"type": "Sequence", "normalizers": [each] * times}


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ADDED = {"x": {"id": "x", "ids": [1] * 100, "tokens": ["a"] * 100}}
BEFORE = [{"SpecialToken": {"id": "x", "type_id": 0}}] * 10_000
FILLED = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
# Of "a" 30,000 times: what is changed in tokenizer.json, and what is said; empty: it is of no consequence.
GREEDY: dict[str, tuple[dict[str, object], str]] = {
    "a long replacement": ({"normalizer": replaced("a", "b" * 10**6)}, "1,000,000 times as long"),
    "replacements of replacements": ({"normalizer": replaced("a", "aa", 40)}, "times as long"),
    "a replacement of nothing": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "c" * 99}}, "100 times as long"),
    "a long beginning": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "times as long"),
    "a decoder": ({"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 999}}, "its decoder"),
    "added tokens": (
        {"post_processor": {"type": "TemplateProcessing", "single": BEFORE, "pair": [], "special_tokens": ADDED}},
        "adds 1,000,000 tokens"),
    "a pattern of patterns": ({"pre_tokenizer": split("(a+)+$")}, "retry-limit"),
    "repetitions of repetitions": ({"pre_tokenizer": split("((a{1,100}){1,100}){1,100}$")}, "retry-limit"),
    "a pattern in a normalizer": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}, "retry-limit"),
    "filled up": ({"padding": {"strategy": {"Fixed": 2**40}, **FILLED}}, ""),
    "filled up to a multiple": ({"padding": {"strategy": "BatchLongest", **FILLED, "pad_to_multiple_of": 2**40}}, ""),
    "cut off": ({"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_tokenizers_that_want_much(arena, model, tmp_path, name):
    changes, said = GREEDY[name]
    path = model / "tokenizer.json"
    words = ["preprocess", tmp_path / "a.txt", "--tokenizer", model, "--seq-length", "64", "--show", "0"]
    (tmp_path / "a.txt").write_text("a" * 30_000 + "!")
    if not said:
        arena.run(*words[:2], tmp_path / "before.jsonl", *words[2:]).check(0, lines=None)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    found = arena.run(*words[:2], tmp_path / "out.jsonl", *words[2:])
    if said:
        assert said in found.check(65, lines=None) and "panicked" not in found.err
    else:
        assert found.code == 0, found.err
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "before.jsonl").read_bytes()


SLOW = """
import sys
from pathlib import Path
from slipway.tokens import limits
limits.SECONDS = 0.5
from slipway import cli
cli.main(sys.argv[1:])
"""


def test_a_tokenizer_that_does_not_end_is_ended(model, tmp_path):
    """A pattern may take seconds at each letter of the text, all of it in one call of the library."""
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split("(?:a?){30000}a{30000}")}))
    (tmp_path / "a.txt").write_text("a" * 30_000)
    words = ["preprocess", tmp_path / "a.txt", tmp_path / "o.jsonl", "--tokenizer", model, "--seq-length", "64"]
    done = subprocess.run([sys.executable, "-c", SLOW, *words], capture_output=True, text=True)
    assert done.returncode == 65 and "takes more than" in done.stderr, (done.returncode, done.stderr)
    assert not (tmp_path / "o.jsonl").exists()


TABLE = base64.b64encode(b"\x02\0\0\0ii" + b"a" * 40 + b"\0b\0").decode()


@pytest.mark.parametrize(
    "part, times",
    [
        ({"type": "NFC"}, 3), ({"type": "NFKC"}, 18), ({"type": "Strip"}, 1), (replaced(" ", "▁"), 1),
        (replaced("ab", "c" * 10), 5), (replaced("a", "bb", 3), 8), ({"type": "Prepend", "prepend": "▁"}, 1),
        ({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}, 2),
        ({"type": "Sequence", "decoders": [{"type": "Fuse"}, replaced("a", "bb")]}, 2),
        ({"type": "Precompiled", "precompiled_charsmap": TABLE}, 40),
    ],
)  # fmt: skip
def test_how_much_longer_a_text_gets(part, times):
    assert limits.growth([part]) == times


CONFIGS = [
    {"chat_template": 3}, {"chat_template": [3]}, {"chat_template": [{"name": "default"}]}, {"chat_template": {"a": 1}},
    {"chat_template": [{"name": [], "template": "x"}]}, {"eos_token": 3}, {"eos_token": "\ud800"}, {"eos_token": {}},
    {"eos_token": {"content": []}}, {"tokenizer_class": []}, {"bos_token": ["a"], "tokenizer_class": "LlamaTokenizer"},
    {"chat_template": "x" * (2 << 20)},
]  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode())
def test_configs(arena, model, chats, tmp_path, changes):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    arena.run("preprocess", chats, tmp_path / "out.jsonl", "--tokenizer", model).check(0, 2, 65, lines=None)


def test_code_of_a_folder_is_never_run(arena, model, samples, tmp_path):
    (model / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass T: pass\n")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    found = arena.run("preprocess", tmp_path / "text.txt", tmp_path / "out.jsonl", "--tokenizer", model)
    assert found.code == 0 and "never run" in found.err and not os.path.exists(tmp_path / "marker")


@pytest.mark.parametrize("line", ["text", "row"])
def test_a_line_of_many_megabytes(arena, model, tmp_path, line):
    """Words without a new line; as the library encodes them at once, 20 MB took 3.56 GB."""
    text = "some words of a text " * 200_000
    source = tmp_path / ("a.txt" if line == "text" else "a.jsonl")
    source.write_text(text if line == "text" else json.dumps({"text": text}))
    found = arena.run("preprocess", source, tmp_path / "out.jsonl", "--tokenizer", model, "--show", "0")
    assert found.code == 0, found.err
    assert found.memory < 600 << 20, found.memory >> 20
