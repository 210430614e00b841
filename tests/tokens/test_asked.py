"""What a person asks of `preprocess`, and what it answers before and after the work."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from sets import PLAIN, model_with, write_rows
from slipway.commands.preprocess import preprocess
from slipway.errors import DataError, UsageError
from slipway.tokens import inputs, tokenise
from slipway.tokens.encoder import Settings
from slipway.tokens.folders import Inputs
from slipway.tokens.outputs import Output
from slipway.tokens.sources import TEXT, Source
from slipway.tokens.wanted import Wanted

# All that decides which tokens are written.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)


def wanted(**options: object) -> Wanted:
    return Wanted(**{"tokenizer": "t", **options})


# ---------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "given, share", [("2%", 0.02), ("0.02", 0.02), (".5", 0.5), ("99.9%", 0.999), ("", 0.0), ("0.5%", 0.005)]
)
def test_a_share(given, share):
    assert wanted(eval_split=given).held_out() == pytest.approx(share, abs=1e-12)
    wanted(eval_split=given).check()


@pytest.mark.parametrize("given", ["0", "0%", "100%", "1", "1.0", "-1%", "2 %", "a", "%", "2%%", "150%"])
def test_no_share(given):
    with pytest.raises(UsageError, match="is not a share; give such as 2%"):
        wanted(eval_split=given).check()


def test_keys_of_theirs():
    assert wanted(map=["reply=completion", "ask=prompt"]).renamed() == {"reply": "completion", "ask": "prompt"}
    assert wanted().renamed() == {}
    for entry, said in (
        ("reply", "is not THEIRS=OURS"),
        ("=prompt", "is not THEIRS=OURS"),
        ("reply=compleition", r"did you mean completion\?"),
        ("completion=reply", "write --map reply=completion"),
    ):
        with pytest.raises(UsageError, match=said):
            wanted(map=[entry]).check()


def test_arguments_of_the_template():
    assert wanted(template_args='{"b": 1, "a": [true]}').arguments() == '{"a": [true], "b": 1}'
    for given in ("[]", "3", "{", "null", ""):
        with pytest.raises(UsageError, match="is not a JSON object"):
            wanted(template_args=given).check()


def test_a_day():
    wanted(date="2026-02-28").check()
    for given in ("2026-02-30", "28.02.2026", ""):
        with pytest.raises(UsageError, match="is not a day; give YYYY-MM-DD"):
            wanted(date=given).check()


@pytest.mark.parametrize(
    "option, value",
    [("learn", "none"), ("long", "keep"), ("pairs", "both"), ("seq_length", 2), ("workers", 0), ("show", -1)],
)
def test_values_out_of_range(option, value):
    with pytest.raises(UsageError, match=option.replace("_", "-")):
        wanted(**{option: value}).check()


@pytest.mark.parametrize(
    "option, values", [("learn", "all last"), ("long", "cut drop refuse"), ("pairs", "auto chat text")]
)
def test_values_in_range(option, values):
    for value in values.split():
        wanted(**{option: value}).check()
    wanted(seq_length=3, workers=1, show=0).check()


def test_what_is_wrong_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="--learn is 'none'"):
        tokenise.tokenise("no such file", tmp_path / "out.jsonl", wanted(learn="none"), 10)


# ---------------------------------------------------------------------------- where it writes


def check_targets(target: Path, held_out: Path | None = None, may_exist: bool = False) -> None:
    tokenise._check_targets(target, tokenise._written(target, held_out), may_exist)


def test_names_of_the_output(tmp_path):
    for name in ("out.jsonl", "out.bin"):
        check_targets(tmp_path / name)
    for name in ("out.json", "out", "out.idx"):
        with pytest.raises(UsageError, match=r"must end in \.jsonl"):
            check_targets(tmp_path / name)


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "a.idx").touch()
    with pytest.raises(UsageError, match=r"a\.idx exists"):
        check_targets(tmp_path / "a.bin")
    check_targets(tmp_path / "a.jsonl")  # whose name ends otherwise has no index
    check_targets(tmp_path / "a.bin", may_exist=True)
    (tmp_path / "b.eval.jsonl").touch()
    with pytest.raises(UsageError, match=r"b\.eval\.jsonl exists"):
        check_targets(tmp_path / "b.jsonl", tmp_path / "b.eval.jsonl")
    # A run of ours that ended between its last steps has named it: the same command finishes the rest.
    Output.partial(tmp_path / "b.jsonl").mkdir()
    check_targets(tmp_path / "b.jsonl", tmp_path / "b.eval.jsonl")
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(UsageError, match=r"b\.jsonl exists"):
        check_targets(tmp_path / "b.jsonl", tmp_path / "b.eval.jsonl")


# ---------------------------------------------------------------------------- what came of it


def settings(**options: object) -> Settings:
    return Settings(Path("t"), 100, **options)


def test_the_share_that_is_lost_counts_all_tokens():
    lost = {"lost": 6, "tokens": 94, "dropped_too_long": 2}
    with pytest.raises(DataError, match=r"^2 samples have 100 tokens or more: 6% of all tokens would be lost"):
        tokenise._check_lost(lost, settings())
    for counts in (lost | {"lost": 5, "tokens": 95}, lost | {"eval_tokens": 50}, {"tokens": 3}, {}):
        tokenise._check_lost(counts, settings())
    for long in ("drop", "cut"):
        tokenise._check_lost(lost, settings(long=long))
    with pytest.raises(DataError, match="100% of all"):
        tokenise._check_lost({"lost": 1, "dropped_too_long": 1}, settings())


def test_too_little_is_said():
    tokenise._check_counts("d", {"samples": 1}, settings())
    tokenise._check_counts("d", {"samples": 9, "eval_samples": 1}, settings(held_out=0.1))
    for counts, options, said in (
        ({}, {}, "d is empty: there is no row and no text in it; give other data"),
        ({"dropped_empty": 4}, {}, "d gives no sample: 4 had nothing to learn; give other data"),
        (
            {"eval_samples": 2},
            {"held_out": 0.9},
            "d gives no sample: 2 were held out; hold out a smaller share by --eval-split",
        ),
        ({"samples": 3}, {"held_out": 0.1}, "of 3 samples none was held out"),
        ({"samples": 3, "map reply": 0}, {}, "no row has the key 'reply' of --map"),
    ):
        with pytest.raises(DataError, match=said):
            tokenise._check_counts("d", counts, settings(**options))


def test_what_the_summary_says():
    found = tokenise._said({"samples": 2, "rows": 3, "turns_apart": 0, "map a": 5})
    assert found == {"samples": 2, "tokens": 0, "learned": 0, "dropped_too_long": 0, "dropped_empty": 0, "rows": 3}


def source(tmp_path: Path, size: int) -> Source:
    (tmp_path / f"{size}.txt").write_bytes(b"a" * size)
    return Source(tmp_path / f"{size}.txt", TEXT)


def test_as_many_processes_as_there_is_work_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE_BYTES", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    small, large = [source(tmp_path, 99)], [source(tmp_path, 250), source(tmp_path, 450)]
    assert [tokenise._processes(asked, small) for asked in (None, 1, 8)] == [1, 1, 1]
    assert [tokenise._processes(asked, large) for asked in (None, 1, 3, 8)] == [4, 1, 3, 7]


def test_another_file_or_another_flag_is_other_work(tmp_path, mxfp4_model):
    one = source(tmp_path, 10)
    known = settings()
    first = tokenise._identity([one], known)
    assert first == tokenise._identity([one], known) and json.dumps(first)
    assert set(first) == {"files", "settings", "tokenizer"}, "other names would begin the work of an older version anew"
    for other in (
        settings(append_eos=False),
        settings(day="2026-01-02"),
        settings(held_out=0.5),
        settings(learn="last"),
    ):
        assert tokenise._identity([one], other) != first
    os.utime(one.path, ns=(0, 5))
    assert tokenise._identity([one], known) != first
    with_tokenizer = Settings(mxfp4_model, 100)
    beside = [name for name in FILES if (mxfp4_model / name).is_file()]
    assert len(tokenise._identity([one], with_tokenizer)["tokenizer"]) == len(beside) > 1, "all of its files count"
    (tmp_path / "t" / "additional_chat_templates").mkdir(parents=True)
    for number, name in enumerate(FILES, 1):
        (tmp_path / "t" / name).touch()
        assert len(tokenise._identity([one], Settings(tmp_path / "t", 100))["tokenizer"]) == number


def test_another_template_for_tools_makes_another_output(tmp_path, mxfp4_model):
    """What was made with the old one is not said to be there already."""
    model = model_with(mxfp4_model, tmp_path / "model", PLAIN)
    (own := model / "additional_chat_templates" / "tool_use.jinja").parent.mkdir()
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = write_rows(tmp_path / "in.jsonl", [{"messages": chat, "tools": [{"name": "f"}]}])
    own.write_text(f"one {PLAIN}")
    preprocess(str(data), str(tmp_path / "out.jsonl"), tokenizer=str(model), seq_length=512)
    own.write_text(f"another {PLAIN}")
    with pytest.raises(UsageError, match="was made from another source or with other flags"):
        preprocess(str(data), str(tmp_path / "out.jsonl"), tokenizer=str(model), seq_length=512)


def test_the_day_is_that_of_the_newest_file(tmp_path, mxfp4_model):
    files = [source(tmp_path, 1), source(tmp_path, 2)]
    for file, day in zip(files, (86_400, 3 * 86_400), strict=True):
        os.utime(file.path, (day, day))
    found = tokenise._settings(
        wanted(tokenizer=str(mxfp4_model), map=["b=prompt", "a=completion"], append_eos=False, eval_split="5%"),
        77, Path("x.bin"), Inputs(files, {}),
    )  # fmt: skip
    assert (found.day, found.indexed, found.seq_length, found.append_eos) == ("1970-01-04", True, 77, False)
    assert found.renamed == (("a", "completion"), ("b", "prompt")) and found.held_out == 0.05
    asked = wanted(tokenizer=str(mxfp4_model), date="2026-05-06")
    assert tokenise._settings(asked, 5, Path("x.jsonl"), Inputs(files, {})).day == "2026-05-06"


class Progress:
    """Keeps what is said of the work."""

    made: list[Progress]

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        Progress.made.append(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, size: int) -> None:
        self.done += size


class Kept:
    """An output that has some pieces already."""

    def __init__(self, pieces: int, counts: dict[str, int]) -> None:
        self.pieces, self.counts, self.added = pieces, counts, []

    def add(self, tokens: object) -> None:
        self.added.append(tokens)
        self.pieces += 1


def test_work_that_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE_BYTES", 10)
    Progress.made = []
    monkeypatch.setattr(tokenise, "Progress", Progress)
    seen: list[Counter] = []
    monkeypatch.setattr(tokenise, "_check_lost", lambda counts, known: seen.append((counts, known)))

    class Numbers:
        settings = "known"

        def __call__(self, piece):
            return piece.line

    (tmp_path / "a.txt").write_text("nine byte\n" * 30)
    output = Kept(3, {"lost": 0})
    tokenise._fill(output, [Source(tmp_path / "a.txt", TEXT)], Numbers(), 1)
    assert output.added == list(range(4, 31)), "the first three pieces are not encoded again"
    (made,) = Progress.made
    assert (made.title, made.total, made.done) == ("preprocess", 300, 300)
    assert seen == [({"lost": 0}, "known")], "the loss is looked at once, early"
