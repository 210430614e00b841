"""Names of models, without the hub: what is asked of its client, how often, and what each of its errors becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from slipway.checkpoint import locate
from slipway.errors import DataError, PreflightError, SlipwayError, Stopped, UsageError, WriteError

NAME = "hf://org/name@main"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> SimpleNamespace:
    """The client: what it was asked, and what it raises or has, one after the other."""
    asked, waited, answers = [], [], []

    def snapshot_download(repository: str, **options) -> str:
        asked.append((repository, options))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(locate.time, "sleep", waited.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:word@the.hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return SimpleNamespace(asked=asked, waited=waited, answers=answers)


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).touch()
    return path


def test_what_is_asked_for(hub, tmp_path):
    hub.answers += [folder(tmp_path / "a", "model.safetensors"), folder(tmp_path / "b", "tokenizer.json")]
    assert locate.locate("hf://org/name") == tmp_path / "a"
    assert locate.locate("hf://org/name@v2", files=locate.TOKENIZER) == tmp_path / "b", "no weights were wanted"
    (one, first), (two, second) = hub.asked
    assert one == two == "org/name" and (first["revision"], second["revision"]) == ("main", "v2")
    assert {"*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"} <= set(first["allow_patterns"])
    assert "*.safetensors" not in second["allow_patterns"] and "pytorch_model*.bin" not in first["allow_patterns"]
    for wanted, patterns in (({*OF_A_TOKENIZER, *OF_A_MODEL}, first), (OF_A_TOKENIZER, second)):
        allowed, ignored = patterns["allow_patterns"], patterns["ignore_patterns"]
        published = [*wanted, *LEFT]
        assert {*filter_repo_objects(published, allow_patterns=allowed, ignore_patterns=ignored)} == wanted


# Files of models of the hub, as they are published. Folders hold the same weights in other forms, but for two.
OF_A_TOKENIZER = {
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ),
    "additional_chat_templates/tools.jinja",
}
OF_A_MODEL = {
    *("model.safetensors", "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "USE_POLICY.md", "modeling_x.py"),
    "custom_generate/generate.py",
}
LEFT = [
    *("original/params.json", "original/consolidated.00.pth", "original/tokenizer.model", "metal/model.bin"),
    *("onnx/config.json", "coreml/x.json", "figures/a.md", "assets/picture.png", ".gitattributes"),
]


def test_an_old_model_has_no_safetensors(hub, tmp_path):
    hub.answers += [folder(tmp_path / "a", "config.json"), folder(tmp_path / "b", "pytorch_model.bin")]
    assert locate.folder("hf://org/name@v1") == tmp_path / "b"
    assert "pytorch_model*.bin" in hub.asked[1][1]["allow_patterns"] and hub.asked[1][1]["revision"] == "v1"


def test_the_config_alone(hub, tmp_path):
    place = folder(tmp_path / "a", "config.json")
    hub.answers += [place]
    assert locate.configuration("hf://org/name") == place
    assert "*.json" in hub.asked[0][1]["allow_patterns"]
    assert "*.safetensors" not in hub.asked[0][1]["allow_patterns"]
    assert locate.configuration(str(place)) == locate.configuration(str(place / "config.json")) == place
    with pytest.raises(UsageError):
        locate.configuration(str(place / "other.json"))


def test_a_download_is_tried_five_times(hub, tmp_path):
    lost = ConnectionResetError("reset")
    hub.answers += [lost] * 4 + [folder(tmp_path / "a", "model.safetensors")]
    assert locate.locate("hf://org/name") == tmp_path / "a"
    assert hub.waited == [0.1, 0.2, 0.4, 0.8], "it waits longer each time"
    hub.answers[:] = [lost] * 5
    with pytest.raises(Stopped, match=r"interrupted 5 times \(ConnectionResetError\); run the same command again"):
        locate.locate("hf://org/name")
    assert len(hub.asked) == 10
    hub.answers[:] = [RuntimeError("of its library for large files")] * 5
    with pytest.raises(Stopped, match="RuntimeError"):
        locate.locate("hf://org/name")


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None, url="x")


def answered(kind: type[Exception], status: int | None) -> Exception:
    """An error of the client, with the server's answer where there is one."""
    error = kind.__new__(kind)
    Exception.__init__(error, "as the client says it")
    error.response = response(status) if status else None
    return error


def wrapped(error: Exception, kind: type[Exception] = errors.LocalEntryNotFoundError) -> Exception:
    """As the client wraps an error in another."""
    outer = answered(kind, None)
    outer.__cause__ = error
    return outer


ANSWERS: dict[str, tuple[Exception, type[SlipwayError], str]] = {
    "gated": (answered(errors.GatedRepoError, 401), PreflightError, "accept the model's terms on its page"),
    "forbidden": (answered(errors.HfHubHTTPError, 403), PreflightError, "accept the model's terms on its page"),
    "no model": (answered(errors.RepositoryNotFoundError, 401), UsageError, "has no such model"),
    "no revision": (answered(errors.RevisionNotFoundError, 404), UsageError, "no such revision"),
    "a wrong token": (answered(errors.HfHubHTTPError, 401), PreflightError, "refuses the token"),
    "a defect of the hub": (answered(errors.HfHubHTTPError, 500), PreflightError, "answers with status 500"),
    "a defect, wrapped": (wrapped(answered(errors.HfHubHTTPError, 502)), PreflightError, "answers with status 502"),
    "no network": (wrapped(ConnectionError("no route")), PreflightError, "cannot reach http://***@the.hub"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_of_the_hub(hub, name):
    error, kind, said = ANSWERS[name]
    hub.answers += [error]
    with pytest.raises(kind) as found:
        locate.locate("hf://org/name")
    assert str(found.value).startswith(NAME) and said in str(found.value) and "word" not in str(found.value)
    assert len(hub.asked) == 1 and not hub.waited, "another attempt would not help"


def test_too_many_requests_are_tried_again(hub, tmp_path):
    hub.answers += [answered(errors.HfHubHTTPError, 429), wrapped(answered(errors.HfHubHTTPError, 429))]
    hub.answers += [folder(tmp_path / "a", "model.safetensors")]
    assert locate.locate("hf://org/name") == tmp_path / "a" and len(hub.waited) == 2


def test_without_a_network_what_is_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.answers += [answered(errors.LocalEntryNotFoundError, None)]
    with pytest.raises(PreflightError, match=r"is not in .*cache; unset HF_HUB_OFFLINE"):
        locate.locate("hf://org/name")


def test_a_name_that_is_none_and_a_disk_that_is_full(hub):
    hub.answers += [errors.HFValidationError("no"), OSError(28, "No space left on device")]
    with pytest.raises(UsageError, match="is not the name of a model; give hf://ORG/NAME"):
        locate.locate("hf://a/b/c")
    with pytest.raises(WriteError, match="the disk is full"):
        locate.locate("hf://org/name")
    assert not hub.waited


def test_progress_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    bar = locate._progress()["tqdm_class"](total=8, desc="Fetching")
    bar.update(3)
    bar.display()
    bar.close()
    said = capsys.readouterr().err.splitlines()
    assert "download: 3 of 8 files" in said and all(line.startswith("download: ") for line in said)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert locate._progress() == {}


def test_the_newest_checkpoint_of_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (9, 200, 1000, 2000, 3000):
        folder(run / "checkpoints" / f"step={step}" / "context", ".complete")
    (run / "checkpoints" / "step=2000" / "context" / ".complete").unlink()
    (run / "checkpoints" / "step=3000-unfinished").touch()
    folder(run / "checkpoints" / "step=latest" / "context", ".complete")
    newest = run / "checkpoints" / "step=1000"
    assert locate.latest_checkpoint(run / "checkpoints") == (1000, newest)
    assert locate.nemo_folder(str(run)) == newest
    assert capsys.readouterr().err == f"slipway: {run} is a run; its newest checkpoint is step=1000\n"
    (run / "weights").mkdir()
    assert locate.nemo_path(str(run)) == run, "a checkpoint that has weights of its own is meant itself"
    assert locate.latest_checkpoint(tmp_path / "none") is None and locate.nemo_path("none") == Path("none")


def test_a_run_without_a_checkpoint_is_named_as_one(tmp_path):
    for name in ("recipe.json", "status.json"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="is a run without a complete checkpoint; `slipway watch"):
        locate.nemo_path(str(tmp_path))


def test_a_folder_by_the_name_of_the_hub():
    for read in (locate.nemo_path, locate.locate):
        assert read("hf:///data/model") == Path("/data/model")


def test_a_model_of_the_hub_is_no_nemo_checkpoint():
    for path in ("hf://org/name", "hf://org/name@v1"):
        with pytest.raises(UsageError, match=f"run `slipway import {path} nemo://org/name`"):
            locate.nemo_path(path)
