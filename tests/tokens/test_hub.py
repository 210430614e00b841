"""Data sets by name, from a stand-in for the hub on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from sets import PLAIN, marked, model_with, samples
from slipway.errors import UsageError
from slipway.tokens.hub import Name, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/set"
RESOLVE = re.compile(rf"/datasets/{REPOSITORY}/resolve/{COMMIT}/(.+)")
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: gold\n    path: data/train-*\n---\n"


class Hub(ThreadingHTTPServer):
    """Serves one data set under the endpoints that huggingface_hub asks; keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        names = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
        self.files = {name: table(name) for name in names} | {"README.md": b"# A card", "image.png": b"\x89PNG"}
        self.card: dict | None = None
        self.asked: list[str] = []
        self.is_a_page = False  # as of a proxy that wants a login


def table(name: str) -> bytes:
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist([{"prompt": name, "completion": "b"}]), sink)
    return sink.getvalue().to_pybytes()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(self.path.partition("?")[0])
        hub.asked.append(f"{self.command} {path}")
        if hub.is_a_page:
            self.answer(b"<html>who are you?</html>")
        elif path in (f"/api/datasets/{REPOSITORY}/revision/{name}" for name in ("main", COMMIT)):
            siblings = [{"rfilename": name} for name in hub.files]
            about = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "cardData": hub.card}
            self.answer(json.dumps(about).encode())
        elif path.startswith(f"/api/datasets/{REPOSITORY}/"):
            self.refuse(404, "RevisionNotFound")
        elif match := RESOLVE.fullmatch(path):
            self.answer(hub.files[match[1]])
        else:
            self.refuse(401, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(slipway, hub, mxfp4_model, tmp_path):
    """run(name, flags…) → (the finished command, the samples)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    model = model_with(mxfp4_model, tmp_path / "model", PLAIN)

    def preprocess(name: str, *flags: str, **env: str):
        out = tmp_path / f"out-{len(list(tmp_path.glob('out*')))}.jsonl"
        own = kept | endpoint | {"NO_PROXY": "127.0.0.1"} | env
        done = slipway("preprocess", name, out, "--tokenizer", model, *flags, env=own)
        return done, [marked(sample, model) for sample in samples(out)] if out.exists() else []

    return preprocess


def test_a_data_set_of_the_hub(run, hub):
    done, found = run(f"hf://datasets/{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert found == ["data/train-00000-of-00001.parquet⟦b<|end|>⟧"]
    got = {each.rpartition("/")[2] for each in hub.asked if each.startswith("GET /datasets")}
    assert got == {"README.md", "train-00000-of-00001.parquet"}, "nothing but the split"
    assert run(f"hf://datasets/{REPOSITORY}:test")[1] == ["data/test-00000-of-00001.parquet⟦b<|end|>⟧"]
    asked = len(hub.asked)
    assert run(f"hf://datasets/{REPOSITORY}", HF_HUB_OFFLINE="1")[1] == found and len(hub.asked) == asked
    assert run(f"hf://datasets/{REPOSITORY}", HF_ENDPOINT="http://127.0.0.1:1")[1] == found
    file = f"hf://datasets/{REPOSITORY}/data/train-00000-of-00001.parquet"
    assert run(file)[1] == found


def test_the_card_names_the_splits(run, hub):
    hub.files["README.md"] = CARD.encode()
    hub.card = {"configs": [{"config_name": "default", "data_files": [{"split": "gold", "path": "data/train-*"}]}]}
    assert run(f"hf://datasets/{REPOSITORY}:gold")[1] == ["data/train-00000-of-00001.parquet⟦b<|end|>⟧"]
    done, _ = run(f"hf://datasets/{REPOSITORY}")
    assert done.returncode == 2 and "no split train; it has gold" in done.stderr


@pytest.mark.parametrize("name, content, found", [
    ("train[1].jsonl", b'{"prompt": "p", "completion": "b"}\n', "p⟦b<|end|>⟧"), ("a.txt", b"words", "⟦words<|end|>⟧")
])  # fmt: skip
def test_files_with_odd_names_and_files_without_rows(run, hub, name, content, found):
    hub.files = {name: content}
    done, samples = run(f"hf://datasets/{REPOSITORY}")
    assert samples == [found], done.stderr


@pytest.mark.parametrize("name, code, said", [
    ("hf://datasets/org/none", 2, "no such data set"),
    (f"hf://datasets/{REPOSITORY}@v9", 2, "the data set has no such revision"),
    (f"hf://datasets/{REPOSITORY}:gold", 2, "no split gold; it has test, train"),
    ("hf://org/set", 2, "names a model; a data set is hf://datasets/org/set"),
])  # fmt: skip
def test_each_refusal_has_its_line(run, name, code, said):
    done, _ = run(name)
    assert done.returncode == code and said in done.stderr.splitlines()[-1], done.stderr


def test_a_page_of_somebody_else_is_not_the_hub(run, hub):
    hub.is_a_page = True
    done, _ = run(f"hf://datasets/{REPOSITORY}")
    assert done.returncode == 78, done.stderr
    assert "does not answer as the hub does" in done.stderr and done.stderr.count("\n") == 1


def test_what_cannot_be_reached(run):
    done, _ = run(f"hf://datasets/{REPOSITORY}", HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 78 and "cannot reach" in done.stderr


def test_names():
    assert parse("hf://datasets/a/b") == Name("a/b", "main", "", None)
    assert parse("hf://datasets/a/b@v1/c/d.json:x/y") == Name("a/b", "v1", "c/d.json", "x/y")
    assert parse("hf://datasets/squad:test") == Name("squad", "main", "", "test")
    for name in ("hf://datasets/", "hf://datasets/a/", "hf://datasets//b"):
        with pytest.raises(UsageError, match="not the name of a data set"):
            parse(name)
