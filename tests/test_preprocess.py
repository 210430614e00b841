"""preprocess: the four forms of input, and what is said of anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from entrypoints.errors import DataError, UsageError
from entrypoints.preprocess import preprocess

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(mxfp4_model) -> Tokenizer:
    return Tokenizer.from_file(str(mxfp4_model / "tokenizer.json"))


def run(model: Path, tmp_path: Path, lines: list | str, name: str = "in.jsonl", **options) -> tuple[list, dict]:
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / name).write_text(text)
    summary = preprocess(str(tmp_path / name), str(tmp_path / "out.jsonl"), tokenizer=str(model), **options)
    found = [json.loads(line)["inputs"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    return [(entry["p_ids"], entry["r_ids"]) for entry in found], summary.details


def test_text_is_cut_into_windows_that_lose_nothing(mxfp4_model, tokenizer, tmp_path):
    text = "def topology(nodes):\n    return nodes\n" * 20
    found, details = run(mxfp4_model, tmp_path, text, "in.txt", seq_length=32)
    assert all(prompt == [] and len(response) == 31 for prompt, response in found[:-1])
    assert [token for _, response in found for token in response] == tokenizer.encode(
        text, add_special_tokens=False
    ).ids
    assert details["samples"] == len(found) and details["tokens"] == sum(len(r) for _, r in found)


def test_prompts_and_completions(mxfp4_model, tokenizer, tmp_path):
    lines = [{"prompt": "import ", "completion": "torch"}, {"prompt": "x", "completion": ""}, {"text": "return None"}]
    found, details = run(mxfp4_model, tmp_path, lines)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("import ", "torch", "return None")]
    assert found == [(ids[0], ids[1]), ([], ids[2])] and details["dropped_empty"] == 1


def test_the_last_message_of_a_chat_is_learned(mxfp4_model, tokenizer, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(mxfp4_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    found, _ = run(model, tmp_path, [{"messages": chat}])
    assert tokenizer.decode(found[0][0]) == "<user>hello;<assistant>" and tokenizer.decode(found[0][1]) == "yes;"


def test_long_samples_are_dropped_and_counted(mxfp4_model, tmp_path):
    lines = [{"prompt": "a " * 50, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    found, details = run(mxfp4_model, tmp_path, lines, seq_length=16)
    assert len(found) == 1 and details["dropped_too_long"] == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"prompt": "x"}', '{"messages": []}', '{"messages": [3]}']
)
def test_a_malformed_line_is_named_and_nothing_is_left(mxfp4_model, tmp_path, line):
    with pytest.raises(DataError, match=r"in.jsonl:2|chat template"):
        run(mxfp4_model, tmp_path, '{"text": "fine"}\n' + line + "\n")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_cannot_be_is_said(mxfp4_model, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "exists").touch()
    tokenizer = str(mxfp4_model)
    for error, data, out, options in [
        (UsageError, "none.txt", "out", {}),
        (UsageError, "a.txt", "exists", {}),
        (UsageError, "a.txt", "out", {"tokenizer": str(tmp_path)}),
        (UsageError, "a.txt", "out", {"seq_length": 2}),
        (DataError, "b.txt", "out", {}),
    ]:
        with pytest.raises(error):
            preprocess(str(tmp_path / data), str(tmp_path / out), **{"tokenizer": tokenizer, **options})
        assert not (tmp_path / "out").exists()
