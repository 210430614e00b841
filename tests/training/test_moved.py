"""A run goes on where its files have another path, and only where they have the same content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import make_model
from slipway import cli
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.training import start
from slipway.training.recipe import MODES, Recipe
from slipway.training.run_folder import RunFolder
from test_finish import ended, inputs, words  # noqa: F401 (inputs is a fixture)


@pytest.fixture
def begun(inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Begins a run that is at step 4 of 8, whose workers do nothing here; returns the folder of its inputs and it."""
    monkeypatch.setattr(start, "_work", lambda *_: None)

    def begin(mode: str = "sft") -> tuple[Path, RunFolder]:
        place = Path(shutil.copytree(inputs, tmp_path / "here"))
        run = ended(place, tmp_path / "run", capsys, mode=mode, steps=8)
        for step in (2, 4):  # as NeMo notes it for adapters and heads
            note = run.checkpoint(step) / "weights" / "adapter_metadata.json"
            note.write_text(json.dumps({"model_ckpt_path": str(place / "nemo")}))
        cli.main(words(place, run.path, mode=mode, steps=8))
        capsys.readouterr()
        assert run.read_status()["state"] == "starting"
        return place, run

    return begin


@pytest.mark.parametrize("mode", MODES)
def test_the_same_files_at_another_place_go_on(begun, tmp_path, capsys, mode):
    place, run = begun(mode)
    place.rename(tmp_path / "there")
    cli.main(words(tmp_path / "there", run.path, mode=mode, steps=8))
    said = capsys.readouterr().err
    for name in ("model", "data", "eval-data"):
        assert f"--{name} was {place}/" in said and "its content must be the same, and is compared" in said
    assert run.read_status()["begun_at"] == 4 and Recipe.load(run.recipe).model == str(tmp_path / "there" / "nemo")
    note = run.checkpoint(4) / "weights" / "adapter_metadata.json"
    assert json.loads(note.read_text()) == {"model_ckpt_path": str(tmp_path / "there" / "nemo")}


def test_a_checkpoint_of_nemos_own_may_move_too(begun, tmp_path, capsys):
    """The run's folder has a context for it, with a link to its weights."""
    place, _ = begun()
    (place / "nemo" / "context" / "hf_config.json").unlink()
    out = tmp_path / "of-nemo"
    cli.main(words(place, out, steps=8))
    assert (out / "model" / "weights").resolve() == place / "nemo" / "weights", capsys.readouterr().err
    place.rename(tmp_path / "there")
    cli.main(words(tmp_path / "there", out, steps=8))
    assert "does not exist" not in capsys.readouterr().err
    assert (out / "model" / "weights").resolve() == tmp_path / "there" / "nemo" / "weights"


def test_relative_paths_links_and_another_out_go_on(begun, tmp_path, capsys, monkeypatch):
    place, _ = begun()
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "link", "./link/../here"):
        cli.main(words(Path(folder), Path("run"), steps=8))
        assert "holds" not in capsys.readouterr().err
    os.rename("run", "other")
    cli.main(words(place, Path("other"), steps=8))
    assert RunFolder(Path("other")).read_status()["begun_at"] == 4


def other_data(place: Path) -> None:
    (place / "data.jsonl").write_text((place / "data.jsonl").read_text().replace("9]", "8]", 1))


def other_model(place: Path) -> None:
    make_model(place / "hf2", "llama31", quantized=False, seed=1)
    shutil.rmtree(place / "nemo")
    import_checkpoint(str(place / "hf2"), str(place / "nemo"))


@pytest.mark.parametrize("change, named", [(other_data, "the data"), (other_model, "the model")])
@pytest.mark.parametrize("moves", [False, True])
def test_other_content_is_refused_wherever_it_is(begun, tmp_path, capsys, change, named, moves):
    place, run = begun()
    before = run.inputs.read_text()
    if moves:
        place = place.rename(tmp_path / "there")
    change(place)
    assert cli.main(words(place, run.path, steps=8)) == 2
    assert f"holds a run on other inputs: {named}" in capsys.readouterr().err.splitlines()[-1]
    assert run.inputs.read_text() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_done_is_compared_too_where_its_files_have_moved(begun, tmp_path, capsys, mode):
    """It is not the run of other data, though nothing is left to do."""
    place, run = begun(mode)
    place = place.rename(tmp_path / "there")
    assert cli.main(words(place, run.path, mode=mode, steps=4)) == 0
    assert run.read_status()["state"] == "done"
    place = place.rename(tmp_path / "elsewhere")
    other_data(place)
    assert cli.main(words(place, run.path, mode=mode, steps=4)) == 2
    assert "holds a run on other inputs: the data" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["data.jsonl", "another.jsonl"])
def test_evaluations_are_on_the_data_that_they_began_on(begun, capsys, name):
    """They may be left out and taken up again, which is said."""
    place, run = begun()
    command = words(place, run.path, steps=8)
    at = command.index("--eval-data") + 1
    without = command[: command.index("--eval-every")]
    cli.main(without)
    assert f"--eval-data was {place}/data.jsonl and is none" in capsys.readouterr().err
    cli.main(command)
    assert f"--eval-data was none and is {place}/data.jsonl" in capsys.readouterr().err
    other = place / name
    command[at] = str(other)
    content = (place / "data.jsonl").read_text().replace("9]", "8]")
    if other.exists():  # the data of the run too; it stays as it was at another place
        shutil.copy(other, place / "kept.jsonl")
        command[command.index("--data") + 1] = str(place / "kept.jsonl")
    other.write_text(content)
    assert cli.main(command) == 2
    assert "other inputs: the data of evaluations" in capsys.readouterr().err.splitlines()[-1]


def test_without_digests_a_path_is_all_that_is_known(begun, tmp_path, capsys):
    place, run = begun()
    run.inputs.unlink()
    place.rename(tmp_path / "there")
    assert cli.main(words(tmp_path / "there", run.path, steps=8)) == 2
    assert "holds another run: --model was" in capsys.readouterr().err.splitlines()[-1]
