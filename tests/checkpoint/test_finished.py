"""An output that is there: the same command again ends well, another is refused, --overwrite keeps the old output."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from slipway import cli, untrusted
from slipway.checkpoint import archive, finished, stream
from slipway.checkpoint.heads import config_of


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "hf", "llama31", quantized=False)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


REFUSED = "exists, and was made from another source or with other flags"


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_the_same_command_again_writes_nothing_and_ends_well(model, tmp_path, capsys):
    """Through a whole chain, as a scheduler starts it again."""
    chain = [("import", model, tmp_path / "nemo"), ("export", tmp_path / "nemo", tmp_path / "out")]
    for words in chain:
        assert run(*words) == 0
    before = {folder: bytes_of(tmp_path / folder) for folder in ("nemo", "out")}
    times = [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]
    for words in chain:
        capsys.readouterr()
        assert run(*words) == 0
        assert "is there already, made from the same source with the same flags" in capsys.readouterr().out
    assert before == {folder: bytes_of(tmp_path / folder) for folder in ("nemo", "out")}
    assert times == [file.stat().st_mtime_ns for file in sorted(tmp_path.rglob("*"))]


def heads_of(model: Path, out: Path, seed: int) -> Path:
    """A folder as `extract-heads` writes it, for a base of this width."""
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    torch.manual_seed(seed)
    shapes = {"temp_head": hidden, "top_p_head": hidden + 1}
    tensors = {}
    for name, inputs in shapes.items():
        for layer, shape in (("0", (hidden, inputs)), ("2", (1, hidden))):
            tensors[f"{name}.mlp.{layer}.weight"] = torch.randn(shape).bfloat16()
            tensors[f"{name}.mlp.{layer}.bias"] = torch.randn(shape[0]).bfloat16()
    out.mkdir()
    save_file(tensors, out / "heads.safetensors")
    (out / "config.json").write_text(json.dumps(config_of(tensors, "base")))
    return out


def edited(file: Path, **fields: object) -> None:
    """The same JSON with some fields changed, saved as an editor saves it."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# What a person does between the same command and the same command, and how it changes what the output should be.
CHANGES = {
    "weights": lambda place: make_model(place / "hf", "llama31", quantized=False, seed=2),
    "configuration": lambda place: edited(place / "hf" / "config.json", rms_norm_eps=0.5),
    "tokenizer": lambda place: edited(place / "hf" / "tokenizer_config.json", model_max_length=7),
    "template": lambda place: (place / "hf" / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_source_of_the_same_name_is_another_source(model, tmp_path, capsys, change):
    assert run("import", model, tmp_path / "nemo") == 0
    shutil.rmtree(model) if change == "weights" else None
    CHANGES[change](tmp_path)
    assert run("import", model, tmp_path / "nemo") == 2
    assert REFUSED in capsys.readouterr().err.splitlines()[-1]


def test_other_flags_are_refused(model, tmp_path, capsys):
    assert run("import", model, tmp_path / "nemo") == 0
    for name, eps in (("a", 1e-5), ("b", 0.5)):
        shutil.copytree(model, tmp_path / name)
        edited(tmp_path / name / "config.json", rms_norm_eps=eps)
    export = ("export", tmp_path / "nemo", tmp_path / "out")
    assert run(*export, "--config", tmp_path / "a") == 0
    for words in (["--config", tmp_path / "b"], ["--config", tmp_path / "a", "--shard-size", "100KB"], []):
        assert run(*export, *words) == 2
        assert REFUSED in capsys.readouterr().err.splitlines()[-1]
    assert run(*export, "--config", tmp_path / "a" / "config.json") == 0, "the same file"


def test_other_heads_are_another_source(model, tmp_path, capsys):
    """For what is there, and for work that was begun."""
    first, second = (heads_of(model, tmp_path / f"heads{seed}", seed) for seed in (1, 2))
    assert run("merge-heads", first, model, tmp_path / "merged") == 0
    assert run("merge-heads", second, model, tmp_path / "merged") == 2
    assert REFUSED in capsys.readouterr().err.splitlines()[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.shutil, "copyfile", ended)  # all pieces are written then
        with pytest.raises(Killed):
            run("merge-heads", first, model, tmp_path / "begun")
    assert run("merge-heads", second, model, tmp_path / "begun") == 0
    merged = load_file(tmp_path / "begun" / "model.safetensors")
    assert all(torch.equal(merged[name], one) for name, one in load_file(second / "heads.safetensors").items())


class Killed(BaseException):
    """The process is gone: nothing after it is done."""


def ended(*_: object, **__: object) -> None:
    raise Killed


def left(place: Path) -> set[str]:
    names = {path.name for path in place.iterdir() if path.name.startswith(".")}
    return {name for name in names if not name.endswith(finished.NOTE)}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged at once", "one after the other"])
@pytest.mark.parametrize("again", [["--overwrite"], []], ids=["with --overwrite", "without"])
def test_overwrite_that_is_killed_is_finished_by_the_next(model, tmp_path, monkeypatch, capsys, exchange, again):
    """At each call that changes what a name stands for: before it, and of a removal in the middle."""
    other = make_model(tmp_path / "hf2", "llama31", quantized=False, seed=2)
    for source, name in ((other, "wanted"), (model, "out")):
        assert run("import", source, tmp_path / name) == 0
    wanted, before = bytes_of(tmp_path / "wanted"), bytes_of(tmp_path / "out")
    if not exchange:
        monkeypatch.setattr(finished, "_exchange", lambda *_: False)
    calls = 0
    while killed_at(calls, "import", other, tmp_path / "out", "--overwrite"):
        code = run("import", other, tmp_path / "out", *again)
        if code:  # killed before the new one was whole: the old one is there, and is not taken for the new one
            assert not again and bytes_of(tmp_path / "out") == before
            assert REFUSED in capsys.readouterr().err
            assert run("import", other, tmp_path / "out", "--overwrite") == 0
        assert bytes_of(tmp_path / "out") == wanted and not left(tmp_path)
        shutil.rmtree(tmp_path / "out")
        assert run("import", model, tmp_path / "out") == 0
        calls += 1
    assert calls >= 6


def killed_at(number: int, *words: object) -> bool:
    """Run a command that is killed at the call of this number, if there are so many."""
    calls, rmtree = itertools.count(), shutil.rmtree

    def counted(do):
        def found(*arguments, **options):
            if next(calls) == number:
                if do is rmtree:
                    rmtree(next(Path(arguments[0]).rglob("weights")))
                raise Killed
            return do(*arguments, **options)

        return found

    places = ((os, "rename"), (finished, "_exchange"), (finished.shutil, "rmtree"), (Path, "mkdir"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (*places, (finished, "write_note")):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            assert run(*words) == 0
        except Killed:
            return True
    return False


def test_an_output_that_is_not_whole_or_not_ours_is_not_taken_for_one(model, tmp_path, capsys):
    assert run("import", model, tmp_path / "nemo") == 0
    (file,) = (tmp_path / "nemo" / "weights").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert run("import", model, tmp_path / "nemo") == 2
    assert "nemo exists; remove it or choose another name" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert run("import", model, tmp_path / "mine") == 2


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(model, tmp_path, monkeypatch):
    assert run("import", model, tmp_path / "nemo") == 0
    before = bytes_of(tmp_path / "nemo")
    other = make_model(tmp_path / "hf2", "llama31", quantized=False, seed=2)
    assert run("import", other, tmp_path / "wanted") == 0

    def fail(*_: object) -> None:
        assert bytes_of(tmp_path / "nemo") == before
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(stream, "_fill", fail)
        assert run("import", other, tmp_path / "nemo", "--overwrite") == 73
    assert bytes_of(tmp_path / "nemo") == before
    assert run("import", other, tmp_path / "nemo", "--overwrite") == 0
    assert bytes_of(tmp_path / "nemo") == bytes_of(tmp_path / "wanted")
    notes = {f".{name}{finished.NOTE}" for name in ("nemo", "wanted")}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == notes


@pytest.mark.parametrize("name", ["a file", "a folder of mine", "a link"])
def test_overwrite_replaces_nothing_but_models(model, tmp_path, capsys, name):
    out = tmp_path / "out"
    if name == "a file":
        out.write_text("mine")
    elif name == "a link":
        out.symlink_to(model)
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert run("import", model, out, "--overwrite") == 2
    assert "remove it or choose another name" in capsys.readouterr().err
    assert (
        out.is_symlink() or out.read_text() == "mine" if name != "a folder of mine" else (out / "thesis.txt").exists()
    )


# What another program or a person has put beside a config.json: file → content.
OTHERS = {
    "{}": {},
    '{"model_type": "llama"}': {"thesis.tex": "mine"},
    '{"model_type": "qwen3"}': {"data/train.jsonl": "{}"},
    '{"model_type": "gpt_oss"}': {".git/HEAD": "ref: refs/heads/main"},
    "of another program": {"main.py": "print()"},
}


@pytest.mark.parametrize("config", OTHERS)
def test_overwrite_leaves_alone_what_is_no_file_of_a_model(model, tmp_path, capsys, config):
    out = tmp_path / "out"
    for name, content in {"config.json": config, **OTHERS[config]}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    before = bytes_of(out)
    assert run("import", model, out, "--overwrite") == 2
    assert bytes_of(out) == before
    said = capsys.readouterr().err
    assert f"{out} holds" in said and "choose another name" in said


PUBLISHED = """README.md LICENSE.txt .gitattributes USE_POLICY.md modeling_llama.py generation_config.json vocab.json
original/params.json original/consolidated.00.pth special_tokens_map.json"""


def test_overwrite_replaces_what_others_publish(model, tmp_path):
    """A folder as the hub has it."""
    out = tmp_path / "out"
    shutil.copytree(model, out)
    for name in PUBLISHED.split():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    assert run("import", model, out, "--overwrite") == 0
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("form", ["classic", "bridge", "nemo"])
def test_overwrite_replaces_every_kind_of_output(model, tmp_path, form):
    for words in ([], ["--overwrite"]):
        assert run("import", model, tmp_path / "out", "--format", form, *words) == 0
    finished.note_of(tmp_path / "out").unlink()  # as one that was copied from elsewhere
    assert run("import", model, tmp_path / "out", "--format", form, "--overwrite") == 0


@pytest.mark.parametrize("words", [["--overwrite"], []], ids=["with --overwrite", "without"])
def test_no_command_writes_to_what_it_reads(model, tmp_path, capsys, words):
    """By whatever name: the same folder, one in it, one around it, a link."""
    assert run("import", model, tmp_path / "nemo") == 0
    quantised = make_model(tmp_path / "quantised", "deepseek_v3", quantized=True)
    heads = heads_of(model, tmp_path / "heads", 1)
    (tmp_path / "link").symlink_to(model)
    before = bytes_of(tmp_path)
    for command in (
        ("import", model, model),
        ("import", model, model / "nemo"),
        ("import", tmp_path / "link", model),
        ("import", model, tmp_path / "link" / "nemo"),
        ("export", tmp_path / "nemo", tmp_path / "nemo"),
        ("export", tmp_path / "nemo", tmp_path / "nemo" / "hf"),
        ("dequant", quantised, quantised),
        ("merge-heads", heads, model, model),
        ("merge-heads", heads, model, heads),
        ("init", model, model),
    ):
        assert run(*command, *words) == 2, command
        said = capsys.readouterr().err
        assert "choose another name" in said
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("folder", ["", "new/"], ids=["in a folder that is there", "in a new one"])
def test_of_two_commands_with_one_output_one_is_refused(model, tmp_path, folder):
    """Processes of their own, as two nodes of a step start them, or a retry beside a job that lives."""
    words = [sys.executable, "-m", "slipway.cli", "import", model, tmp_path / f"{folder}out"]
    for delay in (0, 0.05, 0.3):
        both = []
        for _ in range(2):
            both.append(subprocess.Popen(words, stdout=PIPE, stderr=PIPE, text=True))
            time.sleep(delay)  # the second one comes while the first imports, makes its folder, or fills it
        said = [one.communicate() for one in both]
        codes = [one.returncode for one in both]
        assert 0 in codes and {*codes} <= {0, 78}, said
        for code, (_, errors) in zip(codes, said, strict=True):
            assert not code or "another command is at work on" in errors
        assert run("verify", model, tmp_path / f"{folder}out") == 0 and not left(tmp_path / folder)
        shutil.rmtree(tmp_path / f"{folder}out")


def test_what_is_there_already_may_lie_where_nothing_can_be_written(model, tmp_path, monkeypatch, capsys):
    """As a shared folder of models, mounted for reading."""
    assert run("import", model, tmp_path / "out") == 0
    open_ = os.open

    def refusing(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return open_(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert run("import", model, tmp_path / "out") == 0
    assert run("import", model, tmp_path / "out", "--overwrite") == 73
    assert f"cannot write {tmp_path / 'out'}: Read-only file system; choose another place" in capsys.readouterr().err


def test_a_command_that_cannot_begin_makes_no_folder(model, tmp_path):
    assert run("import", tmp_path / "none", tmp_path / "new" / "out") == 2
    assert run("import", model, tmp_path / "new" / "out", "--dry-run") == 0
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_moved_is_refused_before_any_work(model, tmp_path, capsys, monkeypatch):
    assert run("import", model, tmp_path / "out") == 0
    monkeypatch.setattr(stream, "_fill", lambda *_: pytest.fail("work was done"))
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
        assert run("import", model, tmp_path / "out", "--overwrite") == 2
    assert "a file system is mounted at" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "access", lambda path, _: path != tmp_path / "out" / "weights")
        assert run("import", model, tmp_path / "out", "--overwrite") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_file_that_nobody_may_read_is_named_before_any_work(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "_fill", lambda *_: pytest.fail("work was done"))
    secret, open_ = model / "tokenizer.json", Path.open

    def refusing(path, *arguments, **options):
        if path == secret:
            raise PermissionError(13, "Permission denied")
        return open_(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    assert run("import", model, tmp_path / "out") == 65
    assert f"{secret} cannot be read (Permission denied); let its owner allow it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number, refused", [(errno.EACCES, (os, "open")), (errno.EIO, (os, "preadv")), (errno.EIO, (archive, "fill"))]
)
def test_what_cannot_be_read_is_not_said_to_be_the_output(model, tmp_path, capsys, monkeypatch, number, refused):
    """A file that may not be opened, and a disk that fails while it is read."""
    nemo, classic = tmp_path / "nemo", tmp_path / "mp"
    assert run("import", model, nemo) == 0
    assert run("import", model, classic, "--format", "classic") == 0
    before = getattr(*refused)

    def refusing(path: object, *arguments: object, **options: object) -> object:
        if refused[1] == "open" and not str(path).endswith(".distcp"):
            return before(path, *arguments, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*refused, refusing)
    sources = {"open": [nemo], "preadv": [model], "fill": [nemo, classic]}[refused[1]]
    for source in sources:
        capsys.readouterr()
        assert run("import" if source == model else "export", source, tmp_path / f"of-{source.name}") == 65
        said = capsys.readouterr().err.splitlines()[-1]
        assert str(source) in said and f"cannot be read ({os.strerror(number)})" in said, said


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(13, "Permission denied"), "let its owner allow it"),
        (MemoryError(), "there is too little memory to read it"),
        (OSError(5, "Input/output error"), "cannot be read (Input/output error); copy it again"),
        (ValueError("x"), "is damaged (ValueError); copy it again"),
    ],
)
def test_the_cure_is_one_for_the_cause(error, said):
    assert said in str(untrusted.unreadable("file", error, "copy it again"))


def test_a_limit_of_files_is_named(model, tmp_path, capsys):
    """As `ulimit -f`, or a file system for small files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code = run("import", model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert code == 73
    assert "no file may be so large here; raise the limit" in capsys.readouterr().err


def test_a_dry_run_of_what_is_there_says_what_it_would_take(model, tmp_path, capsys):
    assert run("import", model, tmp_path / "nemo") == 0
    assert run("import", model, tmp_path / "nemo", "--dry-run", "--overwrite") == 0


def test_a_note_that_says_nothing_counts_as_none(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for content in (
        "",
        "[]",
        '{"files": 3}',
        '{"files": ["a"], "aside": ["x"]}',
        '{"aside": ".out.old-/../x"}',
        json.dumps({"made_from": "x", "files": {"a": [1, 2]}}),
    ):
        finished.note_of(out).write_text(content)
        assert finished.noted(out) is None and not finished.is_settled(out)
        finished.recover(out)
        finished.check_replaceable(out)
