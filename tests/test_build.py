"""build.py without an engine: the lock and the store; downloads come from a server of the test's own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import yaml

import build
from images import lock, store
from images.store import BuildError, LockedFile
from images.target import AARCH64, X86_64

ROOT = Path(__file__).parent.parent
WHEEL = b"the bytes of a wheel"
DIGEST = hashlib.sha256(WHEEL).hexdigest()
NAME = "thing-1.0-py3-none-any.whl"


@pytest.fixture(params=["html", "json"])
def index(request, monkeypatch):
    """The address of a package index with one wheel, needing a login, in either form of answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.headers.get("Authorization") != "Basic bWU6YSBi":  # me:a b
                self.send_error(401)
            elif self.path == "/simple/thing/":
                link = f"../../files/{NAME}#sha256={DIGEST}"
                if request.param == "json":
                    self.answer(json.dumps({"files": [{"url": link}]}), "application/vnd.pypi.simple.v1+json")
                else:
                    self.answer(f'<a href="{link}">x</a>', "text/html")
            elif self.path == f"/files/{NAME}":
                self.answer(WHEEL.decode(), "application/octet-stream")
            else:
                self.send_error(404)

        def answer(self, text: str, kind: str):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://me:a%20b@127.0.0.1:{server.server_port}/simple")
    yield
    server.shutdown()


def test_a_file_is_fetched_once(index, tmp_path, monkeypatch):
    file = LockedFile("Thing", NAME, DIGEST)
    assert store.fetch([file], tmp_path) == 1 and (tmp_path / NAME).read_bytes() == WHEEL
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    assert store.fetch([file], tmp_path) == 0


@pytest.mark.parametrize(
    "file, code, message",
    [
        (LockedFile("thing", NAME, "0" * 64), 65, "expected 0000.* from the lock"),
        (LockedFile("thing", "other.whl", DIGEST), 78, "the index has no file other.whl"),
        (LockedFile("nothing", NAME, DIGEST), 78, "the server answered 404"),
    ],
)
def test_what_is_not_as_locked_is_refused(index, tmp_path, file, code, message):
    with pytest.raises(BuildError, match=message) as error:
        store.fetch([file], tmp_path)
    assert error.value.exit_code == code and not list(tmp_path.iterdir())


def test_no_network_is_said_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(BuildError, match=r"cannot connect.*SLIPWAY_STORE"):
        store.fetch([LockedFile("thing", NAME, DIGEST)], tmp_path)


@pytest.mark.parametrize(
    "better, worse",
    [
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-py3-none-any.whl"),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "a-1-cp39-abi3-manylinux_2_17_x86_64.whl"),
        ("a-1-cp39-abi3-manylinux2014_x86_64.whl", "a-1-cp312-abi3-manylinux2014_x86_64.whl"),
        ("a-1-py2.py3-none-any.whl", "a-1-cp311-cp311-manylinux_2_39_x86_64.whl"),
        ("a-1-py3-none-linux_x86_64.whl", "a-1-cp311-cp311-win_amd64.whl"),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-cp311-cp311-musllinux_1_2_x86_64.whl"),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-cp311-cp311-manylinux_2_28_aarch64.whl"),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-cp310-cp310-manylinux_2_28_x86_64.whl"),
    ],
)
def test_the_wheel_that_suits_the_target_is_locked(better, worse):
    ranks = [lock.wheel_rank(name, X86_64) for name in (better, worse)]
    assert ranks[0] and (ranks[1] is None or ranks[0] > ranks[1])
    swapped = [re.sub("x86_64|aarch64", lambda found: OTHER[found[0]], name) for name in (better, worse)]
    assert [lock.wheel_rank(name, AARCH64) for name in swapped] == ranks


OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}

LOCKED_BY_UV = """version = 1
requires-python = "==3.11.*"

[[package]]
name = "thing"
version = "1.0"
source = { registry = "https://index.example/simple" }
dependencies = [
    { name = "other" },
]
sdist = { url = "https://files.example/thing-1.0.tar.gz", hash = "sha256:aa", size = 10 }
wheels = [
    { url = "https://files.example/thing-1.0-py3-none-any.whl", hash = "sha256:bb", size = 11 },
    { url = "https://files.example/thing-1.0-cp311-cp311-win_amd64.whl", hash = "sha256:cc", size = 12 },
]

[package.metadata]
requires-dist = [{ name = "other" }]

[[package]]
name = "project"
source = { editable = "." }
"""


def test_uvs_lock_is_kept_but_for_the_addresses():
    found = lock.without_addresses(LOCKED_BY_UV)
    assert "example" not in found and "project" in found
    package = tomllib.loads(found)["package"][0]
    assert package["source"] == {"registry": "wheelhouse"} and package["dependencies"] == [{"name": "other"}]
    assert package["wheels"] == [{"path": "thing-1.0-py3-none-any.whl", "hash": "sha256:bb"}]
    assert "sdist" not in package and package["metadata"] == {"requires-dist": [{"name": "other"}]}


def test_the_repositorys_lock_names_no_address_and_fits_pyproject():
    lock.check()
    assert {p["name"] for p in lock.locked_packages()} >= {"torch", "nemo-toolkit", "megatron-core"}


def test_setup_is_instant_when_nothing_changed():
    words = [sys.executable, ROOT / "build.py", "setup"]
    subprocess.run(words, check=True)
    done = subprocess.run(words, capture_output=True, text=True, timeout=5)
    assert done.returncode == 0 and done.stderr == ""


def test_build_py_ends_with_a_line_and_the_exit_code():
    for words, start in (
        (["--variant", "tiny"], "build.py: unknown VARIANT 'tiny'; use one of full, index, cpu"),
        (["--model", "gpt_os"], "build.py: unknown model 'gpt_os' (did you mean gpt_oss?); use one of "),
        (["--source", "nemo"], "build.py: --source nemo: write it as NAME=PLACE"),
    ):
        command = [sys.executable, ROOT / "build.py", "image", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(start) and done.stderr.count("\n") == 1


def test_an_image_is_full_where_nothing_else_is_said_but_its_tests_need_no_git_host():
    for target, variant in (("image", "full"), ("images", "full"), ("test-image", "cpu"), ("test-image-slow", "cpu")):
        command = ["env", "-u", "MAKEFLAGS", "-u", "VARIANT", "make", "--dry-run", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(re.findall(r"--variant (\w+)", done.stdout)) == {variant}
    assert build.parser().parse_args(["image"]).variant == "full"


def test_the_commit_hook_runs_what_make_lint_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hook,) = repository["hooks"]
    # Nothing to download: the hook is local, and its command is one of this machine.
    assert (repository["repo"], hook["language"]) == ("local", "system")
    assert hook["always_run"] and not hook["pass_filenames"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}

    def commands_of(words: list[str]) -> str:
        done = subprocess.run(
            [*words, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    commands = commands_of(shlex.split(hook["entry"]))
    assert commands == commands_of(["make", "lint"])
    for program in ("ruff check", "ruff format", "mypy", "shellcheck", "hadolint"):
        assert f".venv/bin/{program}" in commands


def test_no_file_names_a_package_registry():
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "deb.debian" + ".org", "registry.npm" + "js"]
    done = subprocess.run(["git", "grep", "-lE", "|".join(hosts)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_a_store_that_is_no_folder_is_one_line(kind, tmp_path):
    place = tmp_path / "store"
    if kind == "a file":
        place.touch()
    else:
        place.symlink_to(tmp_path / "nowhere" / "store")
    words = [sys.executable, ROOT / "build.py", "fetch", "--variant", "cpu"]
    done = subprocess.run(words, env={**os.environ, "SLIPWAY_STORE": str(place)}, capture_output=True, text=True)
    assert done.returncode == 73 and "SLIPWAY_STORE" in done.stderr.splitlines()[-1], done.stderr
    assert str(place) in done.stderr and "Traceback" not in done.stderr
