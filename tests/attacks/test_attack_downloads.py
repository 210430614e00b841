"""Servers that lead elsewhere.

What they do: an index answers with an address on another host, which then gets the index's password; or with file://.

What must happen: the login stays with its host, only http and https are read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from images import store
from images.store import BuildError

LOGIN = "user:pa%40ss"


@pytest.fixture
def hosts() -> Iterator[tuple[str, str, list[tuple[int, str, str | None]]]]:
    """Two hosts, host:port each, and what they are asked: (which, path, Authorization)."""
    asked: list[tuple[int, str, str | None]] = []

    def handler(number: int) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((number, self.path, self.headers.get("Authorization")))
                targets = {"/other": f"http://{names[1]}/file", "/same": "/file", "/local": "file:///etc/passwd",
                           "/ftp": f"ftp://{names[1]}/file"}  # fmt: skip
                self.send_response(302 if self.path in targets else 200)
                if self.path in targets:
                    self.send_header("Location", targets[self.path])
                self.end_headers()
                self.wfile.write(b"content")

            def log_message(self, *_: object) -> None: ...

        return Handler

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(number)) for number in (0, 1)]
    names = [f"127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield names[0], names[1], asked
    for server in servers:
        server.shutdown()


def test_the_login_stays_with_its_host(hosts):
    first, _, asked = hosts
    for path, expected in (("/other", [(0, True), (1, False)]), ("/same", [(0, True), (0, True)])):
        asked.clear()
        with store.open_url(f"http://{LOGIN}@{first}{path}", "x") as response:
            assert response.read() == b"content"
        assert [(number, bool(login)) for number, _, login in asked] == expected


@pytest.mark.parametrize("path", ["/local", "/ftp"])
def test_a_server_cannot_lead_to_files(hosts, path):
    with pytest.raises(BuildError, match=r"only http and https|is not allowed"):
        store.open_url(f"http://{LOGIN}@{hosts[0]}{path}", "x")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "data:text/plain,x", "/etc/passwd", "jar:x"])
def test_other_kinds_of_addresses(url):
    with pytest.raises(BuildError, match="only http and https"):
        store.open_url(url, "x")


def test_the_login_is_not_given_to_another_scheme():
    assert "@" not in store._with_login("http://host/x", f"https://{LOGIN}@host/simple")
    assert store._with_login("https://host/x", f"https://{LOGIN}@host/simple") == f"https://{LOGIN}@host/x"
