"""Killed, out of space, not allowed to write: nothing half-done is visible, and the next run goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_model, texts
from slipway import cli
from slipway.commands.dequant import dequant
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import WriteError
from slipway.families import FAMILIES
from slipway.families.fabricate import fabricate


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory) -> Path:
    """About 100 MB, so that there is a middle to be killed in."""
    config = FAMILIES["gpt_oss"].tiny_config() | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_local_experts": 16,
    }
    folder = tmp_path_factory.mktemp("larger") / "model"
    fabricate(folder, config, texts()[:3], quantized=True, shards=3)
    return folder


@pytest.fixture(scope="module")
def expected(larger_model, tmp_path_factory) -> dict[str, Path]:
    """What undisturbed runs write."""
    folder = tmp_path_factory.mktemp("expected")
    dequant(str(larger_model), str(folder / "dequant"))
    import_checkpoint(str(larger_model), str(folder / "import"))
    from slipway.commands.export import export

    export(str(folder / "import"), str(folder / "export"))
    for name, words in FORMS.items():
        source = folder / name.replace("export", "import") if name.startswith("export") else larger_model
        assert cli.main([words[0], str(source), str(folder / name), *words[1:]]) == 0
    return {name: folder / name for name in ("dequant", "import", "export", *FORMS)}


# Of Megatron's classic layout the headers, and the sizes of some tensors, are written after all pieces.
LAYOUT = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2", "--expert-parallel-size=2", "--moe-grouped-gemm")
FORMS = {
    "import bridge": ("import", "--format=bridge"),
    "export bridge": ("export",),
    "import classic": ("import", "--format=classic", *LAYOUT),
    "import classic in nf4": ("import", "--format=classic", *LAYOUT, "--qlora-nf4"),
    "export classic": ("export",),
}


# Kills itself at a moment that is counted, not timed, so that a busy machine changes nothing. From 0 to 1: amid the
# writing of a piece, when this share of the pieces is in the journal, or after the last piece; the other thread is cut
# off wherever it is. From 1 on: at that sync after the last piece.
KILLED = """
import os, signal, sys
from slipway.checkpoint import stream
from slipway import cli

moment = float(sys.argv.pop(1))
real_fill, real_add, real_write, real_sync = stream._fill, stream._Journal.add, os.pwrite, stream.sync
pieces = done = syncs = 0
filled = False

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def fill(plan, partial, finished, *rest):
    global pieces, filled
    pieces = len(plan.pieces) - len(finished)
    real_fill(plan, partial, finished, *rest)
    filled = True
    if moment < 1:
        kill()

def add(self, number):
    global done
    real_add(self, number)
    self._commit.result()  # in the journal, before the next piece of this thread
    done += 1

def write(descriptor, data, offset):
    if moment < 1 and done and done >= moment * pieces:
        real_write(descriptor, data[: len(data) // 2], offset)
        kill()
    return real_write(descriptor, data, offset)

def sync(path):
    global syncs
    syncs += filled
    if filled and syncs >= moment:
        kill()
    real_sync(path)

stream.JOURNAL_SECONDS = 0
stream.cores = lambda: 2
stream._fill, stream._Journal.add, os.pwrite, stream.sync = fill, add, write, sync
sys.exit(cli.main(sys.argv[1:]))
"""


KILLS = int(os.environ.get("SLIPWAY_KILLS", "4"))  # of each command; 13 are the hundred of docs/checkpoints.md


@pytest.mark.parametrize("verb", ["dequant", "import", "export", *FORMS])
def test_killed_at_random_moments_and_run_again(verb, larger_model, expected, tmp_path):
    """Each kill comes before, amid or after the writing; about half of them hit a run that was killed before."""
    source = expected[verb.replace("export", "import")] if verb.startswith("export") else larger_model
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    rng = random.Random(verb)
    command, *flags = FORMS.get(verb, (verb,))
    words = [command, str(source), str(out), *flags]
    for number in range(KILLS):
        if number % 4 == 0:  # in its first seconds, wherever it is then
            process = subprocess.Popen([sys.executable, "-m", "slipway.cli", *words])
            time.sleep(rng.uniform(0, 1))
            process.kill()
            process.wait()
        else:
            moment = rng.uniform(0, 0.95) if number % 4 < 3 else rng.randint(1, 6)
            written = (partial / "plan.json").exists() and not (partial / "journal").exists()  # by the one before
            killed = subprocess.run([sys.executable, "-c", KILLED, str(moment), *words])
            assert killed.returncode == -signal.SIGKILL and not out.exists()
            assert moment >= 1 or written or journal_lines(partial), "the kill came amid the work"
        if rng.random() < 0.5 or number == KILLS - 1 or out.exists():
            assert out.exists() or subprocess.run([sys.executable, "-m", "slipway.cli", *words]).returncode == 0
            assert files(out) == files(expected[verb]) and not partial.exists()
            shutil.rmtree(out)


def journal_lines(partial: Path) -> int:
    try:
        return (partial / "journal").read_text().count("\n")
    except OSError:
        return 0


def test_another_source_begins_anew(tmp_path, monkeypatch):
    make_model(tmp_path / "a", seed=1)
    make_model(tmp_path / "b", seed=2)
    from slipway.checkpoint import stream

    real = stream._write

    def fail(*_):
        raise OSError(28, "full")

    monkeypatch.setattr(stream, "_write", fail)
    with pytest.raises(WriteError):
        dequant(str(tmp_path / "a"), str(tmp_path / "out"))
    monkeypatch.setattr(stream, "_write", real)
    dequant(str(tmp_path / "b"), str(tmp_path / "out"))
    dequant(str(tmp_path / "b"), str(tmp_path / "direct"))
    assert files(tmp_path / "out") == files(tmp_path / "direct")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    if os.geteuid() != 0:
        pytest.fail("the test of a full disk mounts a tmpfs and needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_too_little_space_is_said_before_any_work(larger_model, small_disk, slipway):
    done = slipway("dequant", larger_model, small_disk / "out")
    assert done.returncode == 73
    assert " free, but " in done.stderr and " are needed" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [f.name for f in small_disk.iterdir() if not f.name.startswith(".")] == []


@pytest.mark.parametrize("form", ["bridge", "classic"])
def test_a_disk_that_fills_up_while_megatrons_forms_are_exported(form, mxfp4_model, small_disk, tmp_path, monkeypatch):
    from slipway.checkpoint import stream
    from slipway.commands.export import export

    import_checkpoint(str(mxfp4_model), str(tmp_path / "made"), format=form)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_950_000))
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    with pytest.raises(WriteError, match="the disk is full; free some space"):
        export(str(tmp_path / "made"), str(small_disk / "out"))
    assert not (small_disk / "out").exists()
    filler.unlink()
    export(str(tmp_path / "made"), str(small_disk / "out"))
    export(str(tmp_path / "made"), str(tmp_path / "direct"))
    assert files(small_disk / "out") == files(tmp_path / "direct")


@pytest.mark.parametrize("form", ["nemo", "bridge", "classic"])
def test_a_disk_that_fills_up_and_is_cleared(form, mxfp4_model, small_disk, slipway, tmp_path, monkeypatch):
    """The disk fills after the check: the run fails with what it did kept, and goes on when there is space."""
    from slipway.checkpoint import stream

    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_950_000))
    free = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: free)
    with pytest.raises(WriteError, match="the disk is full; free some space") as error:
        import_checkpoint(str(mxfp4_model), str(small_disk / "out"), format=form)
    assert error.value.exit_code == 73 and not (small_disk / "out").exists()
    filler.unlink()
    import_checkpoint(str(mxfp4_model), str(small_disk / "out"), format=form)
    import_checkpoint(str(mxfp4_model), str(tmp_path / "direct"), format=form)
    assert files(small_disk / "out") == files(tmp_path / "direct")


def test_a_target_that_cannot_be_written(mxfp4_model, small_disk, slipway):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = slipway("import", mxfp4_model, small_disk / "out")
    assert done.returncode == 73
    assert done.stderr.count("\n") == 1 and "out: Read-only file system; choose another place" in done.stderr


def test_an_output_that_exists_is_not_touched(mxfp4_model, tmp_path, slipway):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for verb in ("dequant", "import", "export"):
        done = slipway(verb, mxfp4_model, tmp_path / "out")
        assert done.returncode == 2 and "exists; remove it or choose another name" in done.stderr
    assert files(tmp_path / "out") == {"mine": b"mine"}
