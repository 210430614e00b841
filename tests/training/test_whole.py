"""A damaged checkpoint is found before any worker starts: the run goes on from the newest whole one and says so."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slipway import cli
from slipway.training import start, whole
from slipway.training.recipe import MODES
from slipway.training.run_folder import RunFolder
from test_finish import ended, inputs, words  # noqa: F401 (inputs is a fixture)


def shortened(name: str, to: int = 10) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, to)


def garbled(name: str) -> Callable[[Path], None]:
    """Other bytes, as many: what is left where a disk has lost some."""
    return lambda checkpoint: (checkpoint / name).write_bytes(bytes((checkpoint / name).stat().st_size))


def gone(name: str) -> Callable[[Path], None]:
    def remove(checkpoint: Path) -> None:
        path = checkpoint / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


DAMAGES = {
    "half a file of weights": (shortened("weights/__0_0.distcp"), "weights/__0_0.distcp has 10 bytes, and had"),
    "no file of weights": (gone("weights/__0_0.distcp"), "weights/__0_0.distcp cannot be read (No such file"),
    "an empty common.pt": (shortened("weights/common.pt", 0), "weights/common.pt has 0 bytes, and had"),
    "no metadata.json": (gone("weights/metadata.json"), "weights/metadata.json cannot be read"),
    "no .metadata": (gone("weights/.metadata"), "weights/.metadata cannot be read"),
    "no weights": (gone("weights"), "cannot be read (No such file"),
    "half a context": (shortened("context/io.json"), "context/io.json has 10 bytes, and had"),
    "zeros for .metadata": (garbled("weights/.metadata"), "weights/.metadata is damaged"),
    "zeros for common.pt": (garbled("weights/common.pt"), "weights/common.pt is damaged"),
    "zeros for a context": (garbled("context/io.json"), "context/io.json"),
    "zeros for the sizes": (garbled("context/.complete"), "context/.complete"),
}


@pytest.fixture
def run(inputs, tmp_path, capsys) -> RunFolder:  # noqa: F811
    """Stopped at step 4 of 8, with sealed checkpoints after 2 and 4."""
    folder = ended(inputs, tmp_path / "run", capsys, steps=8)
    for step in (2, 4):
        whole.seal(folder.checkpoint(step))
    return folder


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(run, what):
    damage, said = DAMAGES[what]
    damage(run.checkpoint(4))
    step, damaged = whole.newest_whole(run)
    assert step == 2 and list(damaged) == [run.checkpoint(4)]
    (why,) = damaged.values()
    assert str(run.checkpoint(4)) in why and said in why and "import the model" not in why, why


@pytest.mark.parametrize("mode", MODES)
def test_a_run_says_so_before_it_goes_on_and_nothing_is_deleted(mode, inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    """No worker is started here: what it would find is."""
    run, found = ended(inputs, tmp_path / "run", capsys, mode=mode, steps=8), []
    for step in (2, 4):
        whole.seal(run.checkpoint(step))
    os.truncate(run.checkpoint(4) / "weights" / "common.pt", 0)
    (run.checkpoints / "damaged-step=4").mkdir()  # an earlier one
    monkeypatch.setattr(start, "_work", lambda started, *_: found.append(run.latest_checkpoint()[0]))
    assert cli.main([*words(inputs, run.path, mode=mode, steps=8), "--dry-run"]) == 0
    assert run.latest_checkpoint()[0] == 4, "a dry run changes nothing"
    capsys.readouterr()
    cli.main(words(inputs, run.path, mode=mode, steps=8))
    said = capsys.readouterr().err
    assert "common.pt has 0 bytes, and had" in said
    assert "step=4 is kept as damaged-step=4, and the run goes on from step 2" in said
    assert found == [2] and run.read_status()["step"] == 2
    assert (run.checkpoints / "damaged-step=4-2" / "weights" / ".metadata").is_file()


def test_a_run_without_a_whole_checkpoint_is_refused(run, inputs, capsys):  # noqa: F811
    for step in (2, 4):
        os.truncate(run.checkpoint(step) / "weights" / "common.pt", step)
    before = sorted(run.path.rglob("*"))
    assert cli.main(words(inputs, run.path, steps=8)) == 65
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step=4/weights/common.pt has 4 bytes" in said and "step=2/weights/common.pt has 2 bytes" in said
    assert "no other checkpoint is there to go on from: restore it, or choose another --out" in said
    assert sorted(run.path.rglob("*")) == before


def test_a_run_that_ends_at_an_older_checkpoint_stands_for_that_one(run, inputs):  # noqa: F811
    os.truncate(run.checkpoint(4) / "weights" / "common.pt", 0)
    assert cli.main(words(inputs, run.path, steps=2)) == 0
    assert run.latest_checkpoint() == (2, run.checkpoint(2)) and run.read_status()["step"] == 2


@pytest.mark.parametrize("first", ["step=2", "step=2-unfinished"])
def test_a_removal_that_was_killed_is_finished(run, monkeypatch, first):
    """Whichever of the folder and its mark is found first."""
    (run.checkpoints / "step=2-unfinished").touch()
    found = sorted(run.checkpoints.iterdir(), key=lambda path: path.name != first)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(found))
    run.remove_incomplete()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step=4"]


def test_a_checkpoint_that_cannot_be_removed_yet_is_not_whole(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
        run.remove_older(1)
    assert run.complete_checkpoints() == [(4, run.checkpoint(4))] and run.checkpoint(2).is_dir()
    run.remove_incomplete()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step=4"]


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_folder_that_another_user_has_made_is_refused_before_any_work(run, inputs, capsys, monkeypatch, name):  # noqa: F811
    """Not when the first checkpoint is saved. Root may write everywhere: here its temporary files are refused."""
    place, make = run.path / name, tempfile.TemporaryFile
    place.mkdir(exist_ok=True)

    def refusing(dir: Path) -> Any:
        if dir == place:
            raise PermissionError(13, "Permission denied")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    monkeypatch.setattr(start, "_work", lambda *_: pytest.fail("work was begun"))
    assert cli.main(words(inputs, run.path, steps=8)) == 73
    assert f"{place} cannot be written: Permission denied; " in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_is_on_disk_before_it_is_marked(run, monkeypatch):
    """Every file and folder of it, before and after the mark."""
    checkpoint, synced, sync = run.checkpoint(2), [], os.fsync

    def note(descriptor: int) -> None:
        sync(descriptor)
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), (checkpoint / whole.MARK).exists()))

    monkeypatch.setattr(os, "fsync", note)
    (checkpoint / whole.MARK).unlink()
    whole.seal(checkpoint)
    everything = {path for path in checkpoint.rglob("*") if path.name != whole.MARK.name}
    assert everything <= {path for path, marked in synced if not marked}
    assert {checkpoint, checkpoint / "context", run.checkpoints} <= {path for path, marked in synced if marked}
    assert stat.S_ISREG((checkpoint / whole.MARK).stat().st_mode) and not whole.damage(checkpoint)
