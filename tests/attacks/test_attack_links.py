"""Names at which somebody has put something before: links to another file of the user's, folders, files.

What they do: whoever may write to a shared folder puts a link at a name that a command will write to: the file by which
`doctor` tries a folder, the file beside an output's note, a run's status. The command then writes to where the link
leads. Or a person's own folder has the name that a command uses for a while.

What must happen: no link is followed, nothing of anybody's is written to or deleted, and where a command cannot go on,
one line says so. A dry run opens no file for writing at all, outside the system's temporary folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slipway.checkpoint import finished
from slipway.checkpoint.finished import note_of
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import PreflightError
from slipway.launch import checks
from slipway.launch.token import NAME, Token
from slipway.launch.topology import Topology
from slipway.training.claim import Claim
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder
from slipway.untrusted import replace_file

SECRET = "a line of the user's own"


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file of the user's, to which links lead."""
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "file"
    file.write_text(SECRET)
    return file


class Alone:
    """The link to the other nodes, all of which have looked."""

    def finish(self) -> None: ...


def probe(folder: Path, nodes: int = 1) -> checks.Check:
    topology = Topology(
        nodes=nodes, processes_per_node=1, node_rank=0, master_addr="127.0.0.1", master_port=29500, source="flags"
    )
    return checks.shared_folder(folder, topology, Alone(), 0.5)


def test_the_probe_of_doctor(tmp_path, mine):
    place = tmp_path / "out"
    place.mkdir()
    (place / ".slipway-doctor-29500-0").symlink_to(mine)
    assert probe(place).state == "ok"
    assert mine.read_text() == SECRET and not list(place.iterdir()), "the link is gone, and what it led to is as it was"
    (place / ".slipway-doctor-29500-0").mkdir()
    assert probe(place).state == "unfit" and (place / ".slipway-doctor-29500-0").is_dir()


def test_a_link_does_not_pass_for_another_nodes_probe(tmp_path, mine):
    (tmp_path / ".slipway-doctor-29500-1").symlink_to(tmp_path / "nowhere")
    found = probe(tmp_path, 2)
    assert found.state == "unfit" and "node 1" in found.found


def test_the_secret_of_a_run(tmp_path, mine):
    (tmp_path / NAME).symlink_to(mine)
    secret = Token(tmp_path).make()
    assert mine.read_text() == SECRET and not (tmp_path / NAME).is_symlink() and Token(tmp_path).read() == secret
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to(mine)
    assert Token(tmp_path).read() is None, "a node does not take what a link leads to"


def test_files_of_a_run(tmp_path, mine):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for name in ("status.json", "status.part", "recipe.json", "metrics.jsonl", "metrics.part", "evaluations.jsonl"):
        (run.path / name).symlink_to(mine)
    run.status.unlink()
    run.write_status({"state": "starting"})
    for file in (run.metrics, run.evaluations):
        file.unlink()
        file.write_text(json.dumps({"step": 3, "loss": 1.0, "lr": 1, "tokens_per_second": 1, "seconds": 1}) + "\n")
    run.forget_from(2)
    Recipe(model="m", data="d", out="o").save(run.recipe)
    assert mine.read_text() == SECRET and run.read_metrics() == [] and run.read_status() == {"state": "starting"}


def test_the_owner_of_a_run(tmp_path, mine, capsys):
    for target in (mine, tmp_path / "nowhere"):
        (tmp_path / "owner.json").symlink_to(target)
        with Claim(tmp_path / "owner.json", beat=0.02, silent=0.04):
            assert not (tmp_path / "owner.json").is_symlink()
    (tmp_path / "owner.json").mkdir()
    with pytest.raises(PreflightError, match="remove it"), Claim(tmp_path / "owner.json", beat=0.02, silent=0.04):
        pass
    assert mine.read_text() == SECRET


def test_the_note_of_an_output(tmp_path, mine, mxfp4_model):
    out = tmp_path / "nemo"
    note = finished.note_of(out)
    for place in (note, note.with_suffix(".new")):
        place.symlink_to(mine)
    import_checkpoint(str(mxfp4_model), str(out))
    assert mine.read_text() == SECRET and not note.is_symlink() and finished.noted(out)


def test_replacing_an_output_leaves_a_persons_folders(tmp_path, mxfp4_model, arena):
    """The names that --overwrite uses for a while may be somebody's own."""
    out = tmp_path / "nemo"
    import_checkpoint(str(mxfp4_model), str(out))
    note = json.loads(note_of(out).read_text())
    mine = [tmp_path / name for name in (".nemo.old", ".nemo.new", ".nemo.old-thesis", ".nemo.old-0123456789abcdef")]
    for folder, named in zip(mine, (".nemo.old", "../nemo", ".nemo.old-thesis", ""), strict=True):
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        note_of(out).write_text(json.dumps(note | {"aside": named}))
        arena.run("import", mxfp4_model, out, "--overwrite").check(0, lines=None)
        assert all((one / "thesis.txt").read_text() == "years of work" for one in mine if one.exists())
        assert (out / "weights").is_dir()
    partial = tmp_path / ".nemo.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    before = (out / "weights" / ".metadata").stat().st_mtime_ns
    said = arena.run("import", mxfp4_model, out, "--overwrite").check(2, 73)
    assert partial.name in said and (partial / "thesis.txt").exists()
    assert (out / "weights" / ".metadata").stat().st_mtime_ns == before


def test_a_file_is_replaced_and_a_link_is_not_followed(tmp_path, mine):
    (tmp_path / "x").symlink_to(mine)
    replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and not (tmp_path / "x").is_symlink() and mine.read_text() == SECRET
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "home", "x"], "nothing is left behind"


# ---------------------------------------------------------------------------- dry runs

WATCHED = """
import json, os, sys
written = []
def heed(event, words):
    if event == "open" and isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.fsdecode(words[0]) if not isinstance(words[0], int) else f"descriptor {words[0]}")
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"):
        written.append(f"{event} {words[0]}")
    elif event == "subprocess.Popen":
        written.append(f"{event} {words[1]}")
sys.addaudithook(heed)
from slipway import cli
for words in json.loads(sys.argv[1]):
    assert cli.main(words) == 0, words
print("WRITTEN", json.dumps(written))
"""


def test_a_dry_run_writes_nothing(tmp_path, mxfp4_model, nemo_model, samples):
    """Python says of every file that it opens. Nothing is there afterwards, and the temporary folder is as before."""
    out = tmp_path / "new" / "out"
    model, nemo = str(mxfp4_model), str(nemo_model)
    train = ["train", "--model", nemo, "--data", str(samples), "--out", str(out), "--dry-run"]
    jobs = [["import", model, str(out)], ["dequant", model, str(out)], ["export", nemo, str(out)]]
    jobs = [[*words, "--dry-run"] for words in [*jobs, ["init", model, str(out)]]] + [train]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-W", "ignore", "-c", WATCHED, json.dumps(jobs)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.partition("WRITTEN ")[2])
    inside = [path for path in written if str(scratch) in path]
    assert [path for path in written if path not in inside and path != os.devnull] == [], "no file outside of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "scratch"]
    assert list(scratch.iterdir()) == [] and tempfile.gettempdir() != str(scratch)
