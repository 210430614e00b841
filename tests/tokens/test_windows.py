"""How long samples are, what becomes of those that are too long, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sets import PLAIN, model_with, processed, samples, write_rows
from slipway.commands.preprocess import Purpose, preprocess
from slipway.errors import DataError, UsageError
from slipway.tokens.indexed import Documents
from slipway.tokens.scan import scan
from slipway.training.recipes import names

SHORT = [{"prompt": f"question {n} ", "completion": f"answer {n}"} for n in range(200)]
LONG = {"prompt": "why ", "completion": "because " * 200}
CHAT = {"messages": [{"role": role, "content": f"{role} " * 9} for role in ("user", "assistant") * 4]}


@pytest.fixture
def model(mxfp4_model, tmp_path) -> Path:
    return model_with(mxfp4_model, tmp_path / "model", PLAIN)


def rows(model: Path, *entries: dict) -> Path:
    return write_rows(model.parent / "in.jsonl", entries)


# ---------------------------------------------------------------------------- too long


def test_few_that_are_too_long_are_left_out_and_counted(model):
    many = [{**row, "completion": row["completion"] * 15} for row in SHORT]
    _, counts = processed(model, rows(model, *many, LONG), seq_length=200, show=0)
    assert counts["dropped_too_long"] == 1 and counts["samples"] == 200
    assert counts["lost"] / (counts["lost"] + counts["tokens"]) < 0.05


def test_a_share_above_five_percent_is_refused(model):
    with pytest.raises(
        DataError, match=r"2 samples have 200 tokens or more: [1-9]\d% of all tokens would be lost, .*--long cut"
    ):
        processed(model, rows(model, *SHORT, LONG, LONG), seq_length=200, show=0)
    assert [path.name for path in model.parent.iterdir() if path.name.startswith((".", "out"))] == []
    _, counts = processed(model, rows(model, *SHORT, LONG, LONG), seq_length=200, long="drop", show=0)
    assert counts["dropped_too_long"] == 2


def test_the_share_is_looked_at_early(model, monkeypatch):
    from slipway.tokens import inputs, tokenise
    from slipway.tokens.encoder import Encoder

    monkeypatch.setattr(inputs, "PIECE_BYTES", 100)
    monkeypatch.setattr(tokenise, "EARLY", 3)
    done, original = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, piece: done.append(piece) or original(self, piece))
    with pytest.raises(DataError, match="would be lost"):
        processed(model, rows(model, *[LONG] * 9), seq_length=64, workers=1, show=0)
    assert len(done) == 3


def test_what_is_cut_keeps_its_beginning(model):
    found, counts = processed(model, rows(model, LONG), seq_length=32, long="cut", show=0)
    (sample,) = samples(next(model.parent.glob("out*")))
    assert len(sample.prompt) + len(sample.response) == 31 and counts["cut"] == 1 and counts["lost"] > 100
    assert found[0].startswith("why ⟦because because") and not found[0].endswith("<|end|>⟧")
    with pytest.raises(DataError, match="gives no sample: 1 were too long"):
        processed(model, rows(model, {"prompt": "why " * 99, "completion": "b"}), seq_length=32, long="cut", show=0)


@pytest.mark.parametrize("seq_length", range(56, 200, 9))
def test_a_chat_that_is_cut_ends_with_what_is_learned(model, seq_length):
    whole = (processed(model, rows(model, CHAT), seq_length=10_000, show=0), samples(next(model.parent.glob("out*"))))[
        1
    ]
    length = sum(len(part) for part in whole[0][:2])
    if length < seq_length:
        return
    processed(model, rows(model, CHAT), seq_length=seq_length, long="cut", show=0)
    (sample,) = samples(sorted(model.parent.glob("out*"))[-1])
    size = len(sample.prompt) + len(sample.response)
    assert size < seq_length and [*sample.prompt, *sample.response] == [*whole[0].prompt, *whole[0].response][:size]
    assert not sample.context or sample.context[-1][1] < len(sample.response), "the end is learned"
    assert set(sample.context) <= set(whole[0].context)


def test_texts_are_never_lost(model):
    text = "some words of a long text " * 300
    _, counts = processed(model, rows(model, {"text": text}), seq_length=16, show=0)
    out = next(model.parent.glob("out*"))
    assert "lost" not in counts and counts["dropped_too_long"] == 0
    # Neither in a training with shorter sequences than the file was made for.
    tokens = sum(len(sample.response) for sample in samples(out))
    processed(model, rows(model, {"text": text}), seq_length=10_000, show=0)
    index = scan(sorted(model.parent.glob("out*"))[-1], 16, 512)
    assert index.too_long == 0 and int(index.lengths.sum()) == tokens == counts["tokens"]


def test_the_length_that_is_nobody_s_is_short_enough_for_every_recipe():
    shortest = Purpose().sequence_length()
    for name in names():
        for mode in ("heads", "lora", "sft", "pretrain"):
            assert shortest <= Purpose(name, mode).sequence_length()
    assert Purpose(names()[0]).sequence_length() == min(
        Purpose(names()[0], mode).sequence_length() for mode in ("heads", "lora", "sft", "pretrain")
    )


def test_the_length_is_the_recipe_s(model, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "[sft]\nseq_length = 24\n[sft.80GB]\nnodes = 1\n[lora]\nseq_length = 48\n[lora.80GB]\nnodes = 1\n"
    )
    for mode, length in (("sft", 23), ("lora", 47), (None, 23)):
        data = rows(model, {"text": "some words of a long text " * 30})
        out = tmp_path / f"{mode}.jsonl"
        preprocess(
            str(data), str(out), tokenizer=str(model), recipe=str(recipe), show=0, **({"mode": mode} if mode else {})
        )
        assert len(samples(out)[0].response) == length
    for length in ({}, {"seq_length": 16}):  # a flag takes the place of a recipe's value, not of a recipe
        with pytest.raises(UsageError, match="no recipe none"):
            preprocess(str(data), str(tmp_path / "x.jsonl"), tokenizer=str(model), recipe="none", **length)
    summary = preprocess(str(data), str(tmp_path / "x.jsonl"), tokenizer=str(model), recipe=str(recipe), seq_length=16)
    assert Path(summary.wrote).exists()


# ---------------------------------------------------------------------------- held out


def texts(path: Path) -> list[list[int]]:
    return [[*sample.prompt, *sample.response] for sample in samples(path)]


def test_a_share_is_held_out(model, tmp_path):
    processed(model, rows(model, *SHORT), show=0)
    everything = texts(next(tmp_path.glob("out*")))
    for name, order in (("a", SHORT), ("b", SHORT[::-1])):
        data = write_rows(tmp_path / f"{name}.jsonl", [*order, *order[:50]])
        done = preprocess(
            str(data), str(tmp_path / f"{name}-out.jsonl"), tokenizer=str(model), eval_split="10%", show=0
        )
        kept, held = texts(tmp_path / f"{name}-out.jsonl"), texts(tmp_path / f"{name}-out.eval.jsonl")
        assert done.details["samples"] == len(kept) and done.details["eval_samples"] == len(held)
        assert 10 < len(held) < 45 and len(kept) + len(held) == 250
        assert {*map(tuple, kept)} | {*map(tuple, held)} == {*map(tuple, everything)}
        assert not {*map(tuple, kept)} & {*map(tuple, held)}, "equal rows are on one side"
    assert sorted(map(tuple, texts(tmp_path / "a-out.eval.jsonl")))[0] in {
        *map(tuple, texts(tmp_path / "b-out.eval.jsonl"))
    }


def test_the_same_rows_are_held_out_of_every_format(model, tmp_path):
    held = []
    for name, content in (("x.jsonl", "".join(json.dumps(row) + "\n" for row in SHORT)), ("y.json", json.dumps(SHORT))):
        (tmp_path / name).write_text(content)
        out = tmp_path / f"{name}.out.jsonl"
        preprocess(str(tmp_path / name), str(out), tokenizer=str(model), eval_split="0.1", show=0)
        held.append(texts(tmp_path / f"{name}.out.eval.jsonl"))
    assert held[0] == held[1]


def test_a_chat_is_on_one_side_with_all_of_its_samples(model, tmp_path):
    changing = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else 'earlier' }}")
    own = model_with(model, tmp_path / "changing", changing)
    chats = [{"messages": [{**m, "content": f"{n} {m['content']}"} for m in CHAT["messages"]]} for n in range(40)]
    _, counts = processed(own, rows(own, *chats), eval_split="20%", show=0)
    assert counts["samples"] % 4 == counts["eval_samples"] % 4 == 0 and counts["eval_samples"]


def test_whole_texts_are_held_out(model, tmp_path):
    data = rows(model, *({"text": f"text {n} " * 20} for n in range(50)))
    done = preprocess(str(data), str(tmp_path / "x.bin"), tokenizer=str(model), eval_split="20%", show=0)
    kept, held = Documents.open(tmp_path / "x.bin"), Documents.open(tmp_path / "x.eval.bin")
    assert done.details["samples"] == len(kept.lengths) and done.details["eval_samples"] == len(held.lengths)
    assert len(kept.lengths) + len(held.lengths) == 50 and done.details["eval_tokens"] == len(held.tokens)


def test_what_cannot_be_held_out_is_said(model, tmp_path):
    for share in ("2 %", "0", "100%", "1.0", "half"):
        with pytest.raises(UsageError, match=r"--eval-split .* is not a share"):
            processed(model, rows(model, *SHORT), eval_split=share)
    with pytest.raises(DataError, match="of 2 samples none was held out"):
        processed(model, rows(model, *SHORT[:2]), eval_split="0.0001%")  # with 1 % some tokenizers hold one out
    (tmp_path / "out.eval.jsonl").touch()
    with pytest.raises(UsageError, match=r"out\.eval\.jsonl exists"):
        preprocess(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), tokenizer=str(model), eval_split="5%")


# ---------------------------------------------------------------------------- in training

BATCHES = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from slipway.training import cpu
cpu.enable()
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from slipway.tokens.scan import open_units, scan
from slipway.training.data import TokenData
from slipway.training.samples import Samples
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[2], rank=0, world_size=1)
parallel_state.initialize_model_parallel()
init_num_microbatches_calculator(0, None, 2, 2, 1)
path = Path(sys.argv[1])
data = TokenData(Samples([open_units(path, scan(path, 64, 512), 64)], 2, 64, 1, shuffled=False), None, 2, 2)
data.trainer = SimpleNamespace(global_step=0)
batch = next(iter(data.data_sampler.transform_dataloader(data.train_dataloader())))
print(json.dumps([batch["labels"].tolist(), batch["loss_mask"].tolist()]))
"""


def test_nemo_s_batches_learn_the_assistant_s_words_alone(model, tmp_path, warm):
    from conftest import free_port
    from tokenizers import Tokenizer

    chat = {
        "messages": [
            {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
        ]
    }
    processed(model, rows(model, chat, {"prompt": "x", "completion": "y"}), show=0)
    code, printed = warm.python(["-c", BATCHES, next(tmp_path.glob("out*")), free_port()], tmp_path / "printed")
    assert code == 0, printed[-3000:]
    labels, mask = json.loads(printed.splitlines()[-1])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    learned = [
        tokenizer.decode([label for label, on in zip(*row, strict=True) if on], skip_special_tokens=False)
        for row in zip(labels, mask, strict=True)
    ]
    assert learned == ["b<|end|>d<|end|>", "y<|end|>"]


# ---------------------------------------------------------------------------- again


@pytest.mark.parametrize("name", ["out.jsonl", "out.bin"])
def test_the_same_command_again_writes_nothing_and_another_is_refused(model, tmp_path, name):
    data = rows(model, *({"text": f"text {n} " * 20} for n in range(50)))
    flags = {"tokenizer": str(model), "eval_split": "20%", "show": 0}
    out = tmp_path / name
    first = preprocess(str(data), str(out), **flags)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = preprocess(str(data), str(out), **flags)
    assert again.details.pop("notes") and again.details == first.details
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="was made from another source or with other flags"):
        preprocess(str(data), str(out), **flags | {"append_eos": False})
    with data.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UsageError, match="was made from another source or with other flags"):
        preprocess(str(data), str(out), **flags)
    replaced = preprocess(str(data), str(out), **flags, overwrite=True)
    assert replaced.details["samples"] + replaced.details["eval_samples"] == 51
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(UsageError, match="exists; remove it, choose another OUT, or --overwrite"):
        preprocess(str(data), str(out), **flags)
