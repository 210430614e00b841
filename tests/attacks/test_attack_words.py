"""Words of others on the terminal and in logs, wherever a command prints some.

What they do: control characters, which clear the screen or change the title, and marks that turn the direction of a
text, stand in names of tensors and files, in config.json, in a run's status, in the note of who owns a run, in keys and
values of recipes and data.

What must happen: they are spelled out on standard output and on standard error, of every command and of all that they
print on their way; and values that no run writes end `watch` with one line.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
from pathlib import Path

import pytest
import slipway
import torch
from arena import Outcome
from safetensors.torch import load_file, save_file
from slipway.untrusted import Harmless, harmless_lines

EVIL = "\x1b[2J\x1b]0;pwned\x07\u202e\x9b31m"
SPELLED = "\\x1b[2J\\x1b]0;pwned\\x07\\u202e\\x9b31m"
PRINTERS = {  # modules that may print by themselves: lines of ours, or what has been made harmless
    "cli", "untrusted", "report", "signals", "streams", "training.watching", "launch.all_reduce",
}  # fmt: skip


def check(found: Outcome, *codes: int) -> None:
    assert found.code in codes, found.err
    said = found.out + found.err
    assert SPELLED in said and not set(said) & (set(EVIL) - set("[2J]0;pwned31m")), repr(said)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def changed(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_names_of_tensors(arena, model, tmp_path):
    file = sorted(model.glob("*.safetensors"))[0]
    save_file({**load_file(file), f"model.{EVIL}": torch.ones(2)}, file)
    for words in (["inspect", model], ["import", model, tmp_path / "out"]):
        check(arena.run(*words), 65)


def test_fields_of_a_config(arena, model, tmp_path):
    for name, value in (("model_type", EVIL), (EVIL, 1), ("torch_dtype", EVIL)):
        other = Path(shutil.copytree(model, tmp_path / "other"))
        changed(other / "config.json", **{name: value})
        for words in (["inspect", other], ["import", other, tmp_path / "out"]):
            found = arena.run(*words)
            if found.code or name == "model_type":
                check(found, 0, 65)
        shutil.rmtree(other)


def test_names_of_files(arena, model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{EVIL}.txt").write_text("a text")
    check(arena.run("preprocess", tmp_path / "data", tmp_path / "o.jsonl", "--tokenizer", model), 0)
    check(arena.run("inspect", tmp_path / EVIL), 2, 65)


def test_the_status_of_a_run(arena, run):
    for status in ({"state": EVIL}, {"state": "failed", "why": EVIL, "exit_code": 3}):
        (run / "status.json").write_text(json.dumps({"step": 1, "steps": 9, "loss": math.nan, **status}))
        check(arena.run("watch", run, "--once"), 0, 3)
        found = arena.run("watch", run, "--once", "--json")
        assert "\x1b" not in found.out and json.loads(found.out)["state"] == status["state"]


STATUSES = [
    {}, {"state": []}, {"state": None}, {"state": "running", "updated": "yesterday"},
    {"state": "failed", "exit_code": 256}, {"state": "failed", "exit_code": -1}, {"state": "failed", "exit_code": True},
    {"state": "running", "loss": "1"}, {"state": "running", "steps": 10**30}, {"state": "running", "step": 1.5},
    {"state": "running", "seconds_left": "x"}, {"state": "done", "why": ["x"]}, {"state": "running", "eval_loss": {}},
]  # fmt: skip


@pytest.mark.parametrize("status", STATUSES, ids=str)
def test_a_status_that_no_run_writes(arena, run, status):
    (run / "status.json").write_text(json.dumps(status))
    assert "status.json" in arena.run("watch", run, "--once").check(2, 65)


ENTRY = {"step": 1, "loss": 0.5, "lr": 0.1, "tokens_per_second": 9.0, "seconds": 1.0}


@pytest.mark.parametrize("change", [{"lr": None}, {"loss": "x"}, {"step": 10**400}, {"seconds": []}, {"step": ...}])
def test_metrics_that_no_run_writes(arena, run, change):
    (run / "status.json").write_text('{"state": "running"}')
    entry = {name: value for name, value in {**ENTRY, **change}.items() if value is not ...}
    for content in (json.dumps(entry), "[]", "3"):
        (run / "metrics.jsonl").write_text(json.dumps(ENTRY) + "\n" + content + "\n")
        assert "metrics.jsonl" in arena.run("watch", run, "--once").check(65)


def test_a_loss_that_is_no_number_is_shown(arena, run):
    """It is what a person watches for: runs write it as JSON's NaN."""
    (run / "status.json").write_text('{"state": "running", "loss": NaN}')
    losses = (1.0, math.nan, math.inf, 0.5)
    (run / "metrics.jsonl").write_text("".join(json.dumps({**ENTRY, "loss": loss}) + "\n" for loss in losses))
    found = arena.run("watch", run, "--once")
    assert found.code == 0 and "loss nan" in found.out and "█××▁" in found.out, found.out + found.err


def test_the_owner_of_a_run(arena, run):
    (run / "owner.json").write_text(json.dumps({name: EVIL for name in ("host", "pid", "started", "job")}))
    check(arena.run("@run", run), 65, 0)
    (run / "owner.json").write_text(json.dumps({"pid": 10**4000, "host": "h" * 10**6}))
    assert len(arena.run("@run", run).err) < 5000


RECIPES = {
    "a key": f'"{json.dumps(EVIL)[1:-1]}" = 1', "brackets": "a = " + "[" * 10_000, "dots": "a." * 20_000 + "a = 1",
    "digits": "a = " + "9" * 10_000, "no UTF-8": "a = '\udcff'", "large": "#" * 100_000, "twice": "a = 1\na = 2",
    "hexadecimal digits": "steps = 0x" + "f" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(arena, nemo, samples, tmp_path, name):
    (tmp_path / "own.toml").write_bytes(RECIPES[name].encode("utf-8", "surrogateescape"))
    words = ["train", "--model", nemo, "--data", samples, "--out", tmp_path / "out", "--dry-run", "--recipe"]
    found = arena.run(*words, tmp_path / "own.toml")
    assert "own.toml" in found.check(2, 65, lines=None)
    if name == "a key":
        check(found, 2, 65)


@pytest.mark.parametrize("name", RECIPES)
def test_files_of_a_cluster(arena, tmp_path, name):
    (tmp_path / "lab.toml").write_bytes(RECIPES[name].encode("utf-8", "surrogateescape"))
    words = ["submit", "--cluster", tmp_path / "lab.toml", "--", "inspect", "hf"]
    assert "lab.toml" in arena.run(*words).check(2)


@pytest.mark.parametrize("setting", [f"lr={EVIL}", f"{EVIL}=1", "lr=" + "9" * 5000, "steps=²", "=", "lr=1=2"])
def test_settings(arena, nemo, samples, tmp_path, setting):
    words = ["train", "--model", nemo, "--data", samples, "--out", tmp_path / "out", "--dry-run", "--set", setting]
    found = arena.run(*words)
    assert "--set" in found.check(2) and len(found.err) < 6000


def test_what_is_printed_on_the_way_is_made_harmless():
    """Every other module says things by `untrusted.tell`, which spells out what it must."""
    package = Path(slipway.__file__).parent
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if name in PRINTERS or name.startswith("commands.demo"):
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [call for call in calls if getattr(call.func, "id", "") in ("print", "put")]
        assert not printing, f"{name} prints: use tell()"


def test_a_stream_for_libraries_that_print_by_themselves():
    import io

    kept = io.StringIO()
    stream = Harmless(kept)
    print(f"a {EVIL}", f"https://user:{'x' * 9}@host/", file=stream, flush=True)
    assert kept.getvalue() == f"a {SPELLED} https://***@host/\n"
    assert not stream.isatty() and stream.encoding == "utf-8" and stream.writable()


def test_lines_stay_lines():
    assert harmless_lines(f"a\n{EVIL}\nb") == f"a\n{SPELLED}\nb"
