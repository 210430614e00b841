"""preprocess: the four forms of input, and what is said of anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import texts
from slipway.commands.preprocess import preprocess
from slipway.errors import DataError, UsageError
from slipway.tokens import inputs, outputs
from slipway.tokens.encoder import Encoded, Encoder
from slipway.tokens.inputs import Piece
from tokenizers import Tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(mxfp4_model) -> Tokenizer:
    return Tokenizer.from_file(str(mxfp4_model / "tokenizer.json"))


def end_of_text(model: Path, tokenizer: Tokenizer) -> int:
    return tokenizer.token_to_id(json.loads((model / "tokenizer_config.json").read_text())["eos_token"])


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
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert [token for _, response in found for token in response] == [*ids, end_of_text(mxfp4_model, tokenizer)]
    assert details["samples"] == len(found) and details["tokens"] == sum(len(r) for _, r in found)


def test_prompts_and_completions(mxfp4_model, tokenizer, tmp_path):
    lines = [{"prompt": "import ", "completion": "torch"}, {"prompt": "x", "completion": ""}, {"text": "return None"}]
    found, details = run(mxfp4_model, tmp_path, lines)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("import ", "torch", "return None")]
    end = end_of_text(mxfp4_model, tokenizer)
    assert found == [(ids[0], [*ids[1], end]), ([], [*ids[2], end])] and details["dropped_empty"] == 1
    (tmp_path / "out.jsonl").unlink()
    found, _ = run(mxfp4_model, tmp_path, lines, append_eos=False)
    assert found == [(ids[0], ids[1]), ([], ids[2])]


def test_the_last_message_of_a_chat_is_learned(mxfp4_model, tokenizer, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(mxfp4_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    found, _ = run(model, tmp_path, [{"messages": chat}])
    assert tokenizer.decode(found[0][0]) == "<user>hello;<assistant>" and tokenizer.decode(found[0][1]) == "yes;"


def test_long_samples_are_dropped_and_counted(mxfp4_model, tmp_path):
    lines = [{"prompt": "a " * 50, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    found, details = run(mxfp4_model, tmp_path, lines, seq_length=16, long="drop")
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
    (tmp_path / "exists.jsonl").touch()
    (tmp_path / "exists.idx").touch()
    (tmp_path / "no-end").mkdir()
    shutil.copyfile(mxfp4_model / "tokenizer.json", tmp_path / "no-end" / "tokenizer.json")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    tokenizer = str(mxfp4_model)
    for error, data, out, options in [
        (UsageError, "none.txt", "out.jsonl", {}),
        (UsageError, "a.txt", "out.txt", {}),
        (UsageError, "a.txt", "exists.jsonl", {}),
        (UsageError, "a.txt", "exists.bin", {}),
        (UsageError, "a.txt", "out.jsonl", {"tokenizer": str(tmp_path)}),
        (UsageError, "a.txt", "out.jsonl", {"tokenizer": str(tmp_path / "no-end")}),
        (UsageError, "a.txt", "out.jsonl", {"seq_length": 2}),
        (UsageError, "a.txt", "out.jsonl", {"workers": 0}),
        (DataError, "b.txt", "out.jsonl", {}),
        (DataError, "prompts.jsonl", "out.bin", {}),
    ]:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error):
            preprocess(str(tmp_path / data), str(tmp_path / out), **{"tokenizer": tokenizer, **options})
        assert sorted(tmp_path.iterdir()) == before


def test_tokens_pass_as_they_are(mxfp4_model, tmp_path):
    lines = [{"inputs": {"p_ids": [1, 2], "r_ids": [3]}}, {"inputs": {"p_ids": [1] * 20, "r_ids": [3]}}]
    found, details = run(mxfp4_model, tmp_path, lines, seq_length=16, long="drop")
    assert found == [([1, 2], [3])] and details["dropped_too_long"] == 1


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 2000)


@pytest.fixture
def corpus(tmp_path, small_pieces) -> Path:
    """Texts and JSON lines of many pieces, an empty file and an empty text among them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(texts()[:6]):
        (folder / f"{number}.py").write_text(text)
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n\n"))
        )
    (folder / "empty.txt").touch()
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    return folder


def test_megatron_reads_the_texts(mxfp4_model, tokenizer, corpus, tmp_path, warm):
    """Each document is its text and the end, however many pieces it was read in, with Megatron's own reader."""
    summary = preprocess(str(corpus), str(tmp_path / "out.bin"), tokenizer=str(mxfp4_model))
    reads = (
        "import sys, json; from slipway.training import cpu; cpu.enable();"
        "from megatron.core.datasets.indexed_dataset import IndexedDataset as I; d = I(sys.argv[1]);"
        "b = d.document_indices.tolist();"
        "print(json.dumps([sum((d[i].tolist() for i in range(*r)), []) for r in zip(b, b[1:])]))"
    )
    code, printed = warm.python(["-c", reads, tmp_path / "out"], tmp_path / "printed")
    assert code == 0, printed
    found = json.loads(printed.splitlines()[-1])
    documents = []
    for file in sorted(corpus.iterdir()):
        whole = file.suffix != ".jsonl"
        documents += [file.read_text()] if whole else [json.loads(line)["text"] for line in file.open()]
    assert [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in found] == [d for d in documents if d]
    assert {ids[-1] for ids in found} == {end_of_text(mxfp4_model, tokenizer)}
    assert summary.details["samples"] == len(found) and summary.details["tokens"] == sum(map(len, found))
    assert summary.details["dropped_empty"] == len([d for d in documents if not d]) - 1, "an empty file is no document"


@pytest.mark.parametrize("suffix", [".bin", ".jsonl"])
def test_many_processes_write_the_same_bytes(mxfp4_model, corpus, tmp_path, suffix):
    for name, workers in (("one", 1), ("three", 3)):
        done = preprocess(str(corpus), str(tmp_path / f"{name}{suffix}"), tokenizer=str(mxfp4_model), workers=workers)
    assert done.details["samples"] > 20
    for end in {suffix, ".idx"} if suffix == ".bin" else {suffix}:
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"three{end}").read_bytes()


@pytest.mark.parametrize("suffix", [".bin", ".jsonl"])
def test_a_killed_command_goes_on_where_it_was(mxfp4_model, corpus, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(outputs, "COMMIT_SECONDS", 0.0)
    preprocess(str(corpus), str(tmp_path / f"whole{suffix}"), tokenizer=str(mxfp4_model))
    done: list[Piece] = []

    def encode(self: Encoder, piece: Piece) -> Encoded:
        done.append(piece)
        if len(done) in (5, 12):
            raise KeyboardInterrupt
        return original(self, piece)

    original = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", encode)
    out = tmp_path / f"out{suffix}"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            preprocess(str(corpus), str(out), tokenizer=str(mxfp4_model), workers=1)
        assert not out.exists()
        with (tmp_path / f".out{suffix}.partial" / "content").open("ab") as file:
            file.write(b"what was not committed")
    preprocess(str(corpus), str(out), tokenizer=str(mxfp4_model), workers=1)
    assert [done.count(piece) for piece in dict.fromkeys(done)].count(2) == 2, "only what was cut off is done again"
    for end in {suffix, ".idx"} if suffix == ".bin" else {suffix}:
        assert out.with_suffix(end).read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_other_settings_begin_anew(mxfp4_model, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(outputs.Output, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preprocess(str(corpus), str(out), tokenizer=str(mxfp4_model), seq_length=100)
    preprocess(str(corpus), str(out), tokenizer=str(mxfp4_model), seq_length=50)
    preprocess(str(corpus), str(tmp_path / "fresh.jsonl"), tokenizer=str(mxfp4_model), seq_length=50)
    assert out.read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()
