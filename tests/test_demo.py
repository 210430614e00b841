"""`slipway demo`: the whole flow as README shows it, and checks that fail when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import seconds_of_children
from printed import not_ours
from safetensors.torch import load_file, save_file
from slipway.commands.demo import checks as demo_checks
from slipway.commands.demo import demo
from slipway.errors import SlipwayError
from slipway.families import FAMILIES


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    words = [sys.executable, "-m", "slipway.cli", "demo", "--out", folder, "--json"]
    with seconds_of_children() as seconds:
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not not_ours(done.stderr), "no library says anything to the person who reads this"
    assert seconds[0] < 300, "of a processor, however busy it is with other things"
    return json.loads(done.stdout), folder


def test_every_step_ran_and_every_check_passed(finished):
    found, folder = finished
    names = [step["name"] for step in found["steps"]]
    for name in (
        "dequant",
        "import",
        "train until SIGTERM",
        "train to the end",
        "extract-heads",
        "merge-heads",
        "export",
    ):
        assert name in names
    assert len(found["checks"]) == 8 and all(check["passed"] for check in found["checks"])
    assert (folder / "run" / "loss.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt_oss"}))
def test_the_demo_of_every_family_passes(family, tmp_path):
    words = [sys.executable, "-m", "slipway.cli", "demo", "--model", family, "--out", tmp_path / "out", "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == 8 and all(check["passed"] for check in checks), checks


def test_the_readme_shows_what_the_demo_prints(finished):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    shown = re.search(r"```text\n(step .*?)```", readme, flags=re.DOTALL).group(1)
    steps = [line.split("  ")[0] for line in shown.partition("\n\n")[0].splitlines()[1:-1]]
    assert steps == [step["name"] for step in finished[0]["steps"]]
    assert re.findall(r"(?m)^ok   (.*?): ", shown) == [
        check["what"].partition(": ")[0] for check in finished[0]["checks"]
    ]


@pytest.mark.parametrize("gpus, processes", [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_it_takes_no_more_processes_than_there_are_gpus(tmp_path, monkeypatch, gpus, processes):
    commands = []
    monkeypatch.setattr(demo, "gpus_here", lambda: gpus)
    monkeypatch.setattr(demo, "_run", lambda result, name, words, **_: commands.append(words))
    (tmp_path / "run").mkdir()
    demo.RunFolder(tmp_path / "run").status.write_text("{}")
    demo._train(demo.Demo(tmp_path), tmp_path, steps=4)
    trains = [words for words in commands if words[0] == "train"]
    assert [words[words.index("--nproc-per-node") + 1] for words in trains] == [str(processes)] * 2


@pytest.mark.parametrize("broken", ["bf16", "merged"])
def test_the_checks_can_fail(finished, broken):
    """One bit of one value turned in the result of a step."""
    _, folder = finished
    file = sorted((folder / broken).glob("*.safetensors"))[0]
    before = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "mlp" in name)
    save_file(
        tensors
        | {name: tensors[name].flatten().index_fill(0, tensors[name].new_zeros(1).long(), 7).view_as(tensors[name])},
        file,
    )
    check = demo_checks._dequantised_is_exact if broken == "bf16" else demo_checks._merged_is_complete
    found = check(folder)
    file.write_bytes(before)
    assert not found.passed and check(folder).passed


def test_a_folder_that_no_demo_made_is_kept(tmp_path, slipway):
    (tmp_path / "mine").write_text("precious")
    done = slipway("demo", "--out", tmp_path)
    assert done.returncode == 2 and "no demo made it" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_training_that_ends_before_it_is_stopped_is_said_by_its_exit_code(tmp_path, monkeypatch, capsys):
    """Here the data have no sample that is short enough. Who watches its progress takes no exit status."""
    (tmp_path / "nemo").mkdir()
    run = demo._run
    monkeypatch.setattr(
        demo, "_run", lambda found, name, *given, **more: name != "preprocess" and run(found, name, *given, **more)
    )
    wait = os.wait4
    monkeypatch.setattr(os, "wait4", lambda *given: time.sleep(0.1) or wait(*given))  # the watcher looks every 0.02 s
    with pytest.raises(SlipwayError, match=r"train until SIGTERM ended with exit code [0-9]+, not 75; see above"):
        demo._train(demo.Demo(tmp_path), tmp_path, 6)
