"""A run goes on with what it began with: other data, another model or tokenizer under the same name is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model
from slipway import cli
from slipway.checkpoint.locate import COMPLETE
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.launch.topology import Topology
from slipway.tokens.scan import scan
from slipway.training import agreement, preflight
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder
from test_parallel import write_data

ALONE = Topology(1, 1, 0, "127.0.0.1", 29500, "flags")


@pytest.fixture
def begun(tmp_path) -> tuple[Path, list[str]]:
    """(the folder of everything, the command) of a run that stopped at step 2."""
    make_model(tmp_path / "hf", "llama31", quantized=False)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "nemo"))
    write_data(tmp_path)
    words = ["--model", tmp_path / "nemo", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run"]
    words += ["--steps", "4", "--warmup-steps", "0", "--constant-steps", "0", "--seq-length", "32", "--mode", "sft"]
    recipe = Recipe(
        str(tmp_path / "nemo"), str(tmp_path / "data.jsonl"), str(tmp_path / "run"), mode="sft", steps=4, seq_length=32,
        warmup_steps=0, constant_steps=0,
    )  # fmt: skip
    folder = RunFolder.of(recipe)
    shutil.copytree(tmp_path / "nemo", folder.checkpoint(2))
    (folder.checkpoint(2) / "context" / COMPLETE).touch()
    recipe.save(folder.recipe)
    claims = agreement.claims(recipe, [scan(tmp_path / "data.jsonl", 32, 512)], None, ALONE, 0)
    folder.inputs.write_text(json.dumps({name: claims[name] for name in agreement.STAY}))
    return tmp_path, ["train", *map(str, words)]


def other_samples(folder: Path) -> None:
    """The same number of bytes in the same places, one token another."""
    text = (folder / "data.jsonl").read_text()
    at = text.index("1", text.index("r_ids"))
    (folder / "data.jsonl").write_text(f"{text[:at]}2{text[at + 1 :]}")


def other_weights(folder: Path) -> None:
    make_model(folder / "hf2", "llama31", quantized=False, seed=1)
    shutil.rmtree(folder / "nemo")
    import_checkpoint(str(folder / "hf2"), str(folder / "nemo"))


def other_tokenizer(folder: Path) -> None:
    file = folder / "nemo" / "context" / "nemo_tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")


@pytest.mark.parametrize(
    "change, named",
    [(other_samples, "the data"), (other_weights, "the model"), (other_tokenizer, "the tokenizer")],
)
def test_another_input_under_the_same_name_is_refused_with_what_changed(begun, change, named, capsys):
    folder, words = begun
    change(folder)
    assert cli.main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run on other inputs: " + named in error and "restore them or choose another --out" in error


@pytest.mark.parametrize("changed, said", [
    ({"mode": "lora"}, "holds another run: --mode was sft and is lora"),
    ({"mode": "lora", "steps": "1"}, "holds another run: --mode was sft and is lora"),
    ({"steps": "1"}, "holds a run at step 2, more than --steps 1; raise --steps"),
])  # fmt: skip
def test_another_run_is_said_before_how_long_it_was(begun, changed, said, capsys):
    """A person who raises --steps as told would learn only then that the folder is that of another run."""
    _, words = begun
    for name, value in changed.items():
        words = [*words[: (at := words.index(f"--{name}") + 1)], value, *words[at + 1 :]]
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_same_inputs_pass(begun):
    folder, _ = begun
    recipe = Recipe.load(folder / "run" / "recipe.json")
    claims = agreement.claims(recipe, [scan(folder / "data.jsonl", 32, 512)], None, ALONE, 2)
    preflight.check_inputs(RunFolder(folder / "run"), 2, claims)
