"""Words of a server in what it answers: the hub's, and Weights & Biases'.

What they do: control characters that clear the screen stand in error messages, in the reason of a status, in the names
of files and in addresses to go on to; the client's own errors repeat the address with the user's password.

What must happen: one line that spells them out, without the password; no file outside of the cache; and a run whose log
goes to such a server prints, and keeps in its own files, nothing of it as it is.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from arena import Outcome

EVIL = "\x1b[2J\x1b]0;pwned\x07\x9b31m"
PLANTED = "plnt" + "9f3c"


class Server(ThreadingHTTPServer):
    """Answers everything in the same way."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.reason, self.body = 200, "OK", b""
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://user:{PLANTED}@127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        server = self.server
        server.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(server.status, server.reason)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(server.body)

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def assert_harmless(said: str) -> None:
    assert PLANTED not in said and "Traceback" not in said, said
    assert not set(said) & set("\x1b\x07\x9b"), repr(said)


def asked(server: Server, arena, tmp_path: Path, model: Path) -> list[Outcome]:
    """What commands say of this hub."""
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    data = ["--tokenizer", model, "--show", 0]
    return [
        arena.run(*words, environment=environment)
        for words in (
            ["import", "hf://org/name", tmp_path / "out"],
            ["preprocess", "hf://datasets/org/name", tmp_path / "o.jsonl", *data],
        )
    ]


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_errors_of_the_hub(server, arena, model, tmp_path, status):
    server.status, server.reason = status, f"no {EVIL}"
    server.headers = {"X-Error-Message": f"message {EVIL} {server.url}", "X-Error-Code": EVIL}
    server.body = json.dumps({"error": f"body {EVIL} {server.url}"}).encode()
    for found in asked(server, arena, tmp_path, model):
        assert found.code in (2, 75, 78), found.err
        assert_harmless(found.out + found.err)
    assert server.asked


@pytest.mark.parametrize("body", [b"\xff\x1b[2J", b"[" * 100_000, b"null", b'{"siblings": 3}', b"{}"])
def test_answers_of_the_hub_that_are_no_models(server, arena, model, tmp_path, body):
    server.body = body
    for found in asked(server, arena, tmp_path, model):
        assert_harmless(found.out + found.err)
        assert found.code in (2, 65, 75, 78), found.err


@pytest.mark.parametrize("name", [f"{EVIL}.safetensors", "../../../evil.json", "/evil.json", f"config{EVIL}.json"])
def test_names_of_files_of_the_hub(server, arena, model, tmp_path, name):
    siblings = [{"rfilename": name}, {"rfilename": "config.json"}]
    server.body = json.dumps({"id": "org/name", "sha": "0" * 40, "siblings": siblings}).encode()
    server.headers = {"ETag": '"x"', "X-Repo-Commit": "0" * 40}
    for found in asked(server, arena, tmp_path, model):
        assert_harmless(found.out + found.err)
        assert found.code in (2, 65, 75, 78), found.err
    outside = [path for path in tmp_path.rglob("*evil*") if tmp_path / "hf" not in path.parents]
    assert outside == []


def test_addresses_to_go_on_to(server, arena, model, tmp_path):
    for place in (f"http://127.0.0.1:9/{EVIL}", f"file:///etc/passwd?{EVIL}", server.url):
        server.status, server.headers = 302, {"Location": place}
        for found in asked(server, arena, tmp_path, model):
            assert_harmless(found.out + found.err)
            assert found.code in (2, 75, 78), found.err


def test_errors_of_weights_and_biases(server, slipway, warm, nemo, samples, tmp_path):
    """A real run, and the real client, which prints some of what the server says by itself."""
    server.status = 400
    server.body = json.dumps({"errors": [{"message": f"no {EVIL} {server.url}"}], "error": EVIL}).encode()
    words = ["--model", nemo, "--data", samples, "--out", tmp_path / "run", "--steps", 1, "--seq-length", 16]
    words += ["--warmup-steps", 0, "--constant-steps", 0, "--global-batch-size", 2, "--micro-batch-size", 1]
    words += ["--wandb-project", "x"]
    own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "127.0.0.1"}
    done = slipway("train", *words, env=os.environ | own)
    assert done.returncode == 2 and "WANDB_BASE_URL has a user or a password" in done.stderr, done.stderr
    assert_harmless(done.stdout + done.stderr)
    own["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    code, printed = warm.start(["train", *map(str, words)], tmp_path / "printed", env=own).finish()
    assert code == 78 and server.asked and "pwned" in printed, printed
    assert_harmless(printed)
