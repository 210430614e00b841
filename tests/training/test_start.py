"""What `train` finds out and says before NeMo is imported: steps and epochs, several files, adapters, keys."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from slipway import cli
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import PreflightError, UsageError
from slipway.options import flag
from slipway.tokens.blend import as_text, order, parts_of
from slipway.tokens.indexed import write_index
from slipway.tokens.lines import as_line
from slipway.training import preflight, start
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

SEQ_LENGTH = 16


def end_here(_: Recipe) -> None:
    raise PreflightError("reached")


def write_texts(file: Path, sequences: int) -> Path:
    """As many windows as asked for, in Megatron's format."""
    tokens = np.random.default_rng(sequences).integers(5, 500, sequences * SEQ_LENGTH + 1).astype(np.uint16)
    file.write_bytes(tokens.tobytes())
    with file.with_suffix(".idx").open("wb") as index:
        write_index(index, np.uint16, np.array([len(tokens)], np.int32), np.array([True]))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense model and one with experts, 40 samples, and two files of texts."""
    root = tmp_path_factory.mktemp("start")
    for kind in ("llama31", "qwen3_moe"):
        make_model(root / "hf" / kind, kind, quantized=False)
        import_checkpoint(str(root / "hf" / kind), str(root / kind))
    (root / "data.jsonl").write_bytes(b"".join(as_line([5, 6], list(range(5, 7 + n % 9))) for n in range(40)))
    (root / "long.jsonl").write_bytes(as_line([5, 6], list(range(5, 30))) + as_line([5, 6], [7]))
    write_texts(root / "web.bin", 60)
    write_texts(root / "code.bin", 6)
    return root


@pytest.fixture
def plan(folder, capsys):
    """(exit code, recipe, what was said) of a dry run."""

    def run(
        *words: str, kind: str = "llama31", data: str = "data.jsonl", seq_length: int = SEQ_LENGTH
    ) -> tuple[int, dict, str]:
        data = str(folder / data) if ":" not in data else data
        given = ["--model", folder / kind, "--data", data, "--out", folder / "out", "--seq-length", seq_length]
        code = cli.main(["train", *map(str, given), *words, "--dry-run"])
        said = capsys.readouterr()
        return code, json.JSONDecoder().raw_decode(said.out)[0] if not code else {}, said.err

    return run


@pytest.mark.parametrize(
    "out, said",
    [
        ("", "--out is empty"),
        ("nemo://run", "--out nemo://run is the name of a model, and a run is in a folder"),
        ("data.jsonl", "--out data.jsonl is a file, and a folder is expected"),
        ("llama31", "--out llama31 is --model llama31, which stays as it is"),
        ("llama31/weights/run", "--out llama31/weights/run lies in --model llama31, which stays as it is"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_is_in_a_folder_of_its_own(folder, monkeypatch, capsys, out, said, dry):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", "--model", "llama31", "--data", "data.jsonl", f"--out={out}", *dry]) == 2
    assert said in capsys.readouterr().err and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
@pytest.mark.parametrize("name, content, said", [
    ("rows.jsonl", b'{"instruction": "q", "output": "a"}\n', ":1: not a sample, which is"),
    ("table.parquet", b"PAR1" + bytes(99), ":1: not a sample, which is"),
    ("texts.bin", b"abc", "texts.idx does not exist; .bin and .idx need each other"),
])  # fmt: skip
def test_what_is_still_to_be_tokenised_is_refused_by_a_dry_run(folder, plan, flag, name, content, said):
    (folder / name).write_bytes(content)
    words = ["--eval-data", str(folder / name)] if flag == "--eval-data" else []
    code, _, found = plan(*words, data="data.jsonl" if words else name)
    assert code == 65 and said in found, found


@pytest.mark.parametrize("data", ["data.jsonl", "web.bin:2,copy.jsonl:1"])
@pytest.mark.parametrize("held_out, is_said", [("data.jsonl", True), ("copy.jsonl", True), ("other.jsonl", False)])
def test_an_evaluation_on_what_is_trained_on_is_said(folder, tmp_path, monkeypatch, capsys, data, held_out, is_said):
    """Whatever the file is called: its loss would be taken for that of new data."""
    monkeypatch.chdir(folder)
    shutil.copyfile("data.jsonl", "copy.jsonl")
    Path("other.jsonl").write_bytes(Path("data.jsonl").read_bytes().replace(b"[5, 6]", b"[6, 5]"))
    monkeypatch.setattr(start, "meet", lambda *_: end_here(_[0]))
    words = ["train", "--model", "llama31", "--data", data, "--eval-data", held_out, "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--seq-length", str(SEQ_LENGTH), "--global-batch-size", "4", "--mode", "pretrain"]) == 78
    found = f"--eval-data {folder / held_out} is data that is trained on" in capsys.readouterr().err
    assert found is is_said


def test_epochs_become_steps(plan):
    """40 samples in global batches of 16: the last step is a whole one."""
    for epochs, steps in (("1", 3), ("2", 5), ("0.1", 1), ("10", 25)):
        code, recipe, said = plan("--epochs", epochs, "--global-batch-size", "16")
        assert code == 0 and recipe["steps"] == steps, said
    code, recipe, _ = plan("--epochs", "2", "--global-batch-size", "1", "--pack")
    assert code == 0 and 30 < recipe["steps"] < 80  # two or more samples in most sequences


def test_lora_packs_unless_it_is_told_not_to(plan):
    code, recipe, said = plan("--mode", "lora")
    assert code == 0 and recipe["pack"] is True and "--pack=false for one each" in said
    assert plan("--mode", "lora", "--pack=false")[1]["pack"] is False
    assert plan("--mode", "heads")[1]["pack"] is False


def test_fp8_is_refused_where_no_gpu_can_multiply_it(folder, capsys, tmp_path, monkeypatch):
    words = ["--model", folder / "llama31", "--data", folder / "data.jsonl", "--out", tmp_path / "out"]
    words = ["train", *map(str, words), "--seq-length", "16", "--precision", "fp8"]
    assert cli.main(words) == PreflightError.exit_code
    assert "needs GPUs from Hopper (H100) on" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "gpus_here", lambda: 2)
    monkeypatch.setattr(preflight, "asked_of_gpus", lambda _: ["9.0", "8.0"])
    assert cli.main(words) == PreflightError.exit_code
    assert "compute capability 9.0, and there is one of 8.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fp8_of_a_recipe_is_used_where_it_can_be(plan, folder, capsys, tmp_path, monkeypatch):
    """It is faster, and nothing that a run cannot do without."""
    in_fp8, in_bf16 = "large products are in FP8, as the recipe has it", "large products are in BF16, because"
    named = ("--mode", "lora", "--recipe", "llama31_8b")
    code, recipe, said = plan(*named)
    assert code == 0 and recipe["precision"] == "fp8" and in_fp8 in said
    assert plan(*named, "--precision", "bf16")[1]["precision"] == "bf16"
    for words, length, why in (
        ((), 20, "takes micro batches of a multiple of 16 tokens, not 2 × --seq-length 20"),
        (("--base-precision", "nf4"), 16, "does not go with --base-precision nf4"),
    ):
        code, recipe, said = plan(*named, *words, seq_length=length)
        assert code == 0 and recipe["precision"] == "bf16" and in_bf16 in said and why in said
        code, _, said = plan(*named, *words, "--precision", "fp8", seq_length=length)
        assert code == 2 and why in said
    # A machine without FP8 trains in BF16, and says so. It gets as far as the base, which is refused on purpose.
    monkeypatch.setattr(preflight, "check_base", end_here)
    words = ["--model", folder / "llama31", "--data", folder / "data.jsonl", "--out", tmp_path / "out"]
    words = ["train", *map(str, words), "--seq-length", "16", *named, "--steps", "2"]
    for capabilities, expected in (([], in_bf16), (["9.0"], in_fp8), (["8.0"], "and there is one of 8.0")):
        monkeypatch.setattr(preflight, "gpus_here", lambda found=capabilities: len(found))
        monkeypatch.setattr(preflight, "asked_of_gpus", lambda _, found=capabilities: found)
        assert cli.main(words) == PreflightError.exit_code
        said = capsys.readouterr().err
        assert expected in said and "reached" in said
    # What has begun goes on as it is.
    (tmp_path / "out").mkdir()
    Recipe("m", "d", "o", mode="lora", precision="fp8").save(RunFolder(tmp_path / "out").recipe)
    assert start._precision({"model": "m", "data": "d", "out": str(tmp_path / "out")}, (), None, False) == (
        {"precision": "fp8"},
        [],
    )


@pytest.mark.parametrize(
    "words, data, said",
    [
        (["--epochs", "1", "--steps", "9"], "data.jsonl", "--epochs and --steps both say how long the run is"),
        (["--epochs", "0"], "data.jsonl", "--epochs is 0"),
        (["--epochs", "1"], "BLEND", "--epochs has no meaning for several files"),
        ([], "web.bin:1,nowhere.bin:2", "nowhere.bin does not exist"),
        ([], "web.bin:1,code.bin:0", "'code.bin:0' is not PATH:WEIGHT with a weight above 0"),
        ([], "web.bin:1,web.bin:2", "names web.bin twice"),
        (["--eval-data", "BLEND"], "web.bin", "names several files; evaluate on one"),
        (["--wandb-project", "x"], "data.jsonl", "there is no key: set WANDB_API_KEY, or WANDB_MODE=offline"),
        (["--min-lr", "1"], "data.jsonl", "--min-lr is 1, larger than --lr"),
        (["--lr", "1", "--set", "lr=2"], "data.jsonl", "--lr and --set lr are both given; leave out one"),
        (["--config", "."], "data.jsonl", "--config . has no config.json; give the file, its folder"),
    ],
)
def test_what_cannot_be_is_one_line(plan, folder, monkeypatch, tmp_path, words, data, said):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    blend = "web.bin:7,code.bin:3"
    code, _, error = plan(*[word.replace("BLEND", blend) for word in words], data=data.replace("BLEND", blend))
    assert code == 2 and said in error.splitlines()[-1], error


@pytest.mark.parametrize("mode", ["heads", "sft", "pretrain"])
@pytest.mark.parametrize(
    "words",
    [["--adapter", "x"], ["--lora-rank", "8"], ["--lora-alpha", "8"], ["--lora-dropout", "0.1"], ["--dora"],
     ["--rslora"], ["--lora-targets", "q_proj"], ["--set", "lora_rank=8"]],
)  # fmt: skip
def test_flags_of_adapters_are_for_lora_alone(plan, folder, capsys, tmp_path, mode, words):
    """In a dry run and in a run."""
    wrong = flag(words[1].partition("=")[0]) if words[0] == "--set" else words[0]
    said = f"{wrong} is for --mode lora, and --mode is {mode}; leave it out"
    code, _, error = plan("--mode", mode, *words)
    assert code == 2 and said in error.splitlines()[-1]
    given = ["--model", folder / "llama31", "--data", folder / "data.jsonl", "--out", tmp_path / "out"]
    assert cli.main(["train", *map(str, given), "--mode", mode, *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_to_say_that_there_is_none_is_no_flag_without_a_meaning(plan):
    assert plan("--mode", "sft", "--dora=false", "--lora-dropout", "0")[0] == 0
    code, _, said = plan("--mode", "sft", "--eval-every", "2")
    assert code == 2 and "--eval-every is for --eval-data, which is not given; leave it out" in said


@pytest.mark.parametrize(
    "words, options, code, said",
    [
        ([], {"data": "llama31"}, 2, "llama31 is a folder, and a file is expected; `slipway preprocess`"),
        ([], {"data": "llama31:1,web.bin:1"}, 2, "--data llama31 is a folder, and a file is expected"),
        (["--eval-data", "llama31"], {}, 2, "--eval-data llama31 is a folder, and a file is expected"),
        ([], {"kind": "data.jsonl"}, 2, "data.jsonl is a file, and a folder is expected; `slipway import`"),
        ([], {"data": "empty.jsonl"}, 65, "empty.jsonl is empty; `slipway preprocess` makes it from text"),
        ([], {"data": "empty.bin"}, 65, "empty.bin is empty"),
        (["--eval-data", "empty.jsonl"], {}, 65, "--eval-data empty.jsonl is empty"),
    ],
)
def test_what_is_no_data_or_model_is_said_as_what_it_is(plan, folder, monkeypatch, words, options, code, said):
    monkeypatch.chdir(folder)
    for name in ("empty.jsonl", "empty.bin"):
        (folder / name).touch()
    found, _, error = plan(*words, **options)
    assert found == code and said in error.splitlines()[-1], error


def test_a_key_for_weights_and_biases_may_be_anywhere_it_looks(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert plan("--wandb-project", "x")[0] == 0
    (tmp_path / ".netrc").unlink()
    for name, value in (("WANDB_API_KEY", "x"), ("WANDB_MODE", "offline")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert plan("--wandb-project", "x")[0] == 0


def test_the_same_rate_at_both_ends_has_no_warm_up(plan):
    code, recipe, said = plan("--lr", "1e-4", "--min-lr", "1e-4")
    assert code == 0 and recipe["warmup_steps"] == recipe["constant_steps"] == 0, said
    assert "--warmup-steps → 0, since --steps is 400, and --min-lr is --lr" in said
    assert plan("--lr", "1e-4", "--min-lr", "1e-4", "--warmup-steps", "7")[1]["warmup_steps"] == 7


def test_too_much_that_is_too_long_is_refused_with_what_to_do(folder, capsys):
    words = ["--model", folder / "llama31", "--data", folder / "long.jsonl", "--out", folder / "run"]
    assert cli.main(["train", *map(str, words), "--seq-length", str(SEQ_LENGTH)]) == 65
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1 samples have 16 tokens or more: 90% of all tokens would be lost" in said
    assert "use a larger --seq-length, or make the data with `slipway preprocess --seq-length 16`" in said
    assert not (folder / "run").exists()


def test_dora_is_where_nemo_has_it(plan):
    code, recipe, _ = plan("--mode", "lora", "--dora")
    assert code == 0 and recipe["dora"] and recipe["lora_targets"] == "linear_qkv,linear_proj,linear_fc1,linear_fc2"
    code, recipe, said = plan("--mode", "lora", "--dora", kind="qwen3_moe")
    assert code == 0 and recipe["lora_targets"] == "linear_qkv,linear_proj"
    assert "--dora cannot be on experts, so its adapters are on linear_qkv,linear_proj" in said
    code, _, said = plan("--mode", "lora", "--dora", "--lora-targets", "linear_fc1", kind="qwen3_moe")
    assert code == 2 and "--dora cannot be on experts" in said
    code, _, said = plan("--mode", "lora", "--dora", "--tensor-parallel-size", "2", "--nproc-per-node", "2")
    assert code == 2 and "--dora takes --tensor-parallel-size 1" in said


def test_a_checkpoint_without_a_tokenizer_is_said(plan, folder):
    shutil.copytree(folder / "llama31", folder / "bare")
    shutil.rmtree(folder / "bare" / "context" / "nemo_tokenizer")
    assert "bare has no tokenizer, so an export of this run will have none" in plan(kind="bare")[2]
    assert "tokenizer" not in plan()[2]


# ---------------------------------------------------------------------------- several files


def test_weights_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = parts_of("a.bin:3,b.bin:1")
    assert [(str(part.path), part.share) for part in parts] == [("a.bin", 0.75), ("b.bin", 0.25)]
    assert [part.share for part in parts_of(as_text(parts))] == [0.75, 0.25]
    assert [part.share for part in parts_of("only.bin")] == [1.0]
    odd = tmp_path / "a:1,b.jsonl"
    odd.touch()
    assert [part.path for part in parts_of(str(odd))] == [odd]
    with pytest.raises(UsageError, match=r"'a\.bin' is not PATH:WEIGHT"):
        parts_of("a.bin,b.bin:1")


def test_every_stretch_is_a_blend_and_the_order_does_not_depend_on_the_length():
    shares = [0.7, 0.2, 0.1]
    parts, numbers = order(shares, 1000)
    for end in (10, 50, 1000):
        found = Counter(parts[:end].tolist())
        assert all(abs(found[part] - share * end) <= 1 for part, share in enumerate(shares))
    for part in range(3):
        assert numbers[parts == part].tolist() == list(range(int((parts == part).sum())))
    longer = order(shares, 3000)
    assert (longer[0][:1000] == parts).all() and (longer[1][:1000] == numbers).all()


def test_a_blend_reads_each_file_epoch_by_epoch(folder):
    from slipway.tokens.scan import open_units, scan
    from slipway.training.samples import Samples

    files = [folder / "web.bin", folder / "code.bin"]
    units = [open_units(file, scan(file, SEQ_LENGTH, 512), SEQ_LENGTH) for file in files]
    samples = Samples(units, 60, SEQ_LENGTH, 1, shares=[0.5, 0.5])
    drawn = [samples.unit_of(number) for number in range(60)]
    assert len({unit for part, unit in drawn if part == 0}) == 30
    small = [unit for part, unit in drawn if part == 1]
    assert all(sorted(small[epoch * 6 : epoch * 6 + 6]) == list(range(6)) for epoch in range(5))
    part, unit = drawn[7]
    assert samples[7]["tokens"].tolist() == units[part][unit][0].response[:-1]
