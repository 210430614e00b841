"""Models by name, from a stand-in for the hub on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from slipway.checkpoint.locate import locate, nemo_path, output
from slipway.errors import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny"
RESOLVE = re.compile(rf"/{REPOSITORY}/resolve/{COMMIT}/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves one model under the endpoints that huggingface_hub asks; keeps what was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.files |= {"original/weights.safetensors": b"another format", "README.md": b"about"}
        self.asked: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}  # file → how many more times its download is cut in the middle
        self.token: str | None = None  # whose bearer may fetch files of the model, which is gated
        self.status = 200
        self.is_a_page = False  # as of a proxy that wants a login

    def got(self, name: str) -> list[str | None]:
        """The ranges asked for of one file, None for all of it."""
        return [span for method, path, span in self.asked if method == "GET" and path.endswith(f"/{name}")]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if hub.status != 200:
            self.refuse(hub.status, "")
        elif hub.is_a_page:
            self.answer(b"<html>Please log in.</html>")
        elif self.path in (f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/{REPOSITORY}/"):
            self.refuse(404, "RevisionNotFound")
        elif not (match := RESOLVE.fullmatch(self.path)):
            self.refuse(401, "RepoNotFound")  # what the hub says to those who might not see it
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.refuse(401, "GatedRepo")
        else:
            self.answer(hub.files[match[1]], match[1])

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes, name: str = "") -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            rest = content[start:]
            if cut := self.server.cuts.get(name, 0):
                self.server.cuts[name] = cut - 1
                rest = rest[: len(rest) // 2]
            self.wfile.write(rest)


@pytest.fixture
def hub(mxfp4_model):
    server = Hub(mxfp4_model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def env(hub, tmp_path) -> dict[str, str]:
    """An environment in which the stand-in is the hub, and its cache is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "NEMO_"))}
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    return {**kept, **own, "NEMO_HOME": str(tmp_path / "nemo"), "NO_PROXY": "127.0.0.1"}


def refused(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("download: ")]
    assert done.returncode == code and len(lines) == 1 and lines[0].startswith("slipway: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_a_model_of_the_hub_is_imported_under_a_nemo_name(slipway, hub, env, mxfp4_model, tmp_path):
    done = slipway("import", f"hf://{REPOSITORY}", "nemo://org/tiny", env=env)
    assert done.returncode == 0, done.stderr
    assert "download: " in done.stderr and " of 9 files" in done.stderr
    assert (tmp_path / "nemo" / "models" / "org" / "tiny" / "weights" / ".metadata").is_file()
    done = slipway("verify", "nemo://org/tiny", mxfp4_model, env=env)
    assert done.returncode == 0, done.stderr
    assert slipway("export", "nemo://org/tiny", tmp_path / "hf-again", env=env).returncode == 0


def test_only_what_a_command_needs_is_fetched(slipway, hub, env, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 200)
    words = ["--tokenizer", f"hf://{REPOSITORY}", "--seq-length", "64"]
    assert slipway("preprocess", tmp_path / "text.txt", tmp_path / "out.jsonl", *words, env=env).returncode == 0
    assert not any(path.endswith(".safetensors") for _, path, _ in hub.asked)
    assert slipway("inspect", f"hf://{REPOSITORY}", env=env).returncode == 0
    asked = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert "model-00001-of-00002.safetensors" in asked and "weights.safetensors" not in asked
    assert "README.md" in asked, "what people publish beside a model goes along"


def test_what_was_fetched_is_used_without_the_network(slipway, hub, env):
    assert slipway("inspect", f"hf://{REPOSITORY}@v1", env=env).returncode == 0
    asked = len(hub.asked)
    done = slipway("inspect", f"hf://{REPOSITORY}@v1", env=env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and len(hub.asked) == asked and "gpt_oss" in done.stdout
    unreachable = env | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    assert slipway("inspect", f"hf://{REPOSITORY}@v1", env=unreachable).returncode == 0
    done = slipway("inspect", f"hf://{REPOSITORY}@v2", env=env | {"HF_HUB_OFFLINE": "1"})
    refused(done, 78, "v2", "HF_HUB_OFFLINE")


def test_a_cut_connection_is_taken_up_where_it_was(slipway, hub, env):
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = 2
    done = slipway("inspect", f"hf://{REPOSITORY}", env=env)
    assert done.returncode == 0, done.stderr
    size = len(hub.files[name])
    assert hub.got(name) == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]


def test_a_connection_that_is_cut_for_good_says_so_and_the_next_run_goes_on(slipway, hub, env):
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = 1000
    refused(slipway("inspect", f"hf://{REPOSITORY}", env=env), 75, "was interrupted", "run the same command again")
    hub.cuts.clear()
    assert slipway("inspect", f"hf://{REPOSITORY}", env=env).returncode == 0
    assert hub.got(name)[-1] not in (None, "bytes=0-")


def test_a_page_of_somebody_else_is_not_the_hub(slipway, hub, env):
    hub.is_a_page = True
    refused(slipway("inspect", f"hf://{REPOSITORY}", env=env), 78, "does not answer as the hub does", "HF_ENDPOINT")


def test_each_refusal_has_its_line(slipway, hub, env):
    refused(slipway("inspect", "hf://org/none", env=env), 2, "hf://org/none@main", "no such model")
    refused(slipway("inspect", f"hf://{REPOSITORY}@v9", env=env), 2, "@v9", "no such revision")
    refused(slipway("inspect", "hf://a/b/c", env=env), 2, "is not the name of a model")
    refused(slipway("inspect", "hf://", env=env), 2, "is not the name of a model")
    unreachable = env | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    refused(slipway("import", f"hf://{REPOSITORY}", "x", env=unreachable), 78, "cannot reach")
    hub.status = 503
    refused(slipway("inspect", f"hf://{REPOSITORY}", env=env), 78, "status 503")


def test_a_gated_model_needs_the_token(slipway, hub, env):
    hub.token = "hf_secret"
    done = slipway("inspect", f"hf://{REPOSITORY}", env=env)
    refused(done, 78, "refuses access", "set HF_TOKEN")
    done = slipway("inspect", f"hf://{REPOSITORY}", env=env | {"HF_TOKEN": "hf_wrong"})
    refused(done, 78, "refuses access")
    assert "hf_wrong" not in done.stderr
    assert slipway("inspect", f"hf://{REPOSITORY}", env=env | {"HF_TOKEN": "hf_secret"}).returncode == 0


def test_a_cache_that_is_full_or_closed(slipway, hub, env, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=True)
    try:
        own = env | {"HF_HOME": str(disk)}
        refused(slipway("inspect", f"hf://{REPOSITORY}", env=own), 73, "the disk is full")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(slipway("inspect", f"hf://{REPOSITORY}", env=own), 73, "cannot write")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_nemo_checkpoint_is_not_taken_from_the_hub(slipway, env):
    done = slipway("export", f"hf://{REPOSITORY}@v1", "x", env=env)
    refused(done, 2, f"slipway import hf://{REPOSITORY}@v1 nemo://{REPOSITORY}")
    done = slipway("train", "--model", f"hf://{REPOSITORY}", "--data", "x", "--out", "y", env=env)
    refused(done, 2, "a NeMo checkpoint is needed")


def test_names_become_paths_as_nemo_has_it(monkeypatch, tmp_path):
    for name in ("NEMO_HOME", "NEMO_MODELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nemo_path("nemo://a/b") == tmp_path / ".cache" / "nemo" / "models" / "a" / "b"
    monkeypatch.setenv("NEMO_HOME", "/n")
    assert output("nemo://a") == Path("/n/models/a")
    monkeypatch.setenv("NEMO_MODELS_CACHE", "/m")
    assert locate("nemo://a") == Path("/m/a")
    assert locate("hf:///data/model") == nemo_path("hf:///data/model") == Path("/data/model")
    assert locate("plain/path") == Path("plain/path")
    assert nemo_path("nemo:///absolute/path") == output("nemo:///absolute/path") == Path("/absolute/path")
    for path in ("nemo://", "nemo://../x"):
        with pytest.raises(UsageError, match="does not name a model"):
            nemo_path(path)
    with pytest.raises(UsageError, match="cannot write to hf"):
        output("hf://org/name")


def test_a_folder_by_its_hf_name(slipway, mxfp4_model, tmp_path):
    model = Path(shutil.copytree(mxfp4_model, tmp_path / "model"))
    assert slipway("dequant", f"hf://{model}", tmp_path / "bf16").returncode == 0
    done = slipway("dequant", f"hf://{tmp_path}/modle", tmp_path / "other")
    assert done.returncode == 2 and "did you mean" in done.stderr
