"""Strangers at the port on which the nodes of a run meet.

What they do: hold node 0 by a byte now and then, or by a line without an end; send a hundred thousand brackets, or
numbers that are none; pretend to be a node; say nothing; come by the thousand; repeat what others have sent.

What must happen: the run begins and ends as without them, in the same time and memory. They learn nothing but a random
number. What a member of the run says is checked as well, and a member that nobody understands has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import free_port
from forked import LIMIT
from slipway.errors import DataError, PreflightError, SlipwayError, UsageError
from slipway.launch import link as meeting
from slipway.launch.channel import LARGEST, Broken, Channel
from slipway.launch.failure import FAILED, KILLED, Failure
from slipway.launch.link import Link, meet
from slipway.launch.token import NAME, Token
from slipway.launch.topology import Topology

OF_EACH_KIND = 3
OLD_HELLO = {"number": 1, "host": "stranger", "claims": {}}


def trickle(door: socket.socket, stop: threading.Event) -> None:
    while not stop.wait(0.5):
        door.sendall(b"{")


def endless(door: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        door.sendall(b"a" * 65536)


def says(content: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def attack(door: socket.socket, stop: threading.Event) -> None:
        door.sendall(content)
        stop.wait(0.2)

    return attack


def says_json(value: object) -> Callable[[socket.socket, threading.Event], None]:
    return says(json.dumps(value).encode() + b"\n")


def silent(door: socket.socket, stop: threading.Event) -> None:
    stop.wait(30)


def gone(door: socket.socket, stop: threading.Event) -> None:
    """At once; and the next one comes at once."""


def echoes(door: socket.socket, stop: threading.Event) -> None:
    """Sends the random number back, as its own and as its proof."""
    nonce = json.loads(door.recv(1000))["nonce"]
    door.sendall(json.dumps({"nonce": nonce, "proof": nonce}).encode() + b"\n")
    door.recv(1000)


def guesses(door: socket.socket, stop: threading.Event) -> None:
    """Goes through the greeting with a secret of its own."""
    Channel(door).prove_to_host(b"guess", time.monotonic() + 5)


KINDS: dict[str, Callable[[socket.socket, threading.Event], None]] = {
    "a byte now and then": trickle,
    "a line without an end": endless,
    "brackets": says(b"[" * 100_000 + b"\n"),
    "braces": says(b'{"a":' * 80 + b"\n"),
    "no number": says(b'{"number": 1e999, "host": "x", "claims": {}}\n'),
    "a number of 4,000 digits": says(b'{"number": ' + b"9" * 400 + b"}\n"),
    "the protocol of before": says_json(OLD_HELLO),
    "a wrong number": says_json(OLD_HELLO | {"number": 99}),
    "wrong claims": says_json(OLD_HELLO | {"claims": {"--lr": "1"}}),
    "control characters": says_json(OLD_HELLO | {"host": "\x1b]0;pwned\x07\x1b[2J"}),
    "a nonce that is no text": says_json({"nonce": 1, "proof": ["x"]}),
    "a proof that is no hexadecimal": says_json({"nonce": "\ud800", "proof": "é\x00"}),
    "bytes": says(bytes(range(256)) * 4 + b"\n"),
    "http": says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "tls": says(bytes.fromhex("16030100c8010000c40303") + bytes(200)),
    "nothing": silent,
    "come and gone": gone,
    "the random number again": echoes,
    "another secret": guesses,
}


class Strangers:
    """Three of each kind at a port for as long as the block runs; `heard` is what they were told."""

    def __init__(self, port: int, kinds: dict[str, Callable] = KINDS) -> None:
        self.port, self.heard, self.stop = port, list[bytes](), threading.Event()
        self.threads = [
            threading.Thread(target=self._attack, args=(kind,), daemon=True)
            for kind in kinds.values()
            for _ in range(OF_EACH_KIND)
        ]

    def __enter__(self) -> Strangers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _attack(self, kind: Callable) -> None:
        while not self.stop.wait(0.02):
            with contextlib.suppress(OSError, Broken, ValueError, KeyError), self._door() as door:
                kind(door, self.stop)
                door.settimeout(0.2)
                self.heard.append(door.recv(10_000))

    def _door(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=2)


def node(rank: int, port: int, count: int = 4, *words: object) -> subprocess.Popen:
    """A real node: `doctor` meets the others as `train` does, and then adds up with them."""
    command = [sys.executable, "-m", "slipway.cli", "doctor", "--json", f"--nodes={count}", f"--node-rank={rank}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1", f"--timeout={LIMIT}"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str, int]:
    """(exit code, stdout, stderr, bytes of memory at its most)."""
    out, err = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, out, err, used.ru_maxrss << 10


def test_four_nodes_meet_among_strangers(tmp_path):
    """Before node 0 listens, while it waits for the last one, and until they have all been told."""
    port = free_port()
    with Strangers(port + 1) as strangers:
        nodes = [node(rank, port, 4, "--out", tmp_path) for rank in (0, 1, 2)]
        time.sleep(1)
        nodes.append(node(3, port, 4, "--out", tmp_path))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(finished, nodes))
    for code, out, err, memory in found:
        checks = {check["what"]: check["state"] for check in json.loads(out)["checks"]}
        assert code == 0 and checks["nodes meet"] == checks["shared output"] == checks["all-reduce"] == "ok", out
        assert err == "" and memory < 1 << 30, (err, memory >> 20)  # torch, which adds up, takes 600 MB
    heard = {re.sub(rb"[0-9a-f]{32}", b"R", said) for said in strangers.heard}
    assert heard <= {b"", b'{"nonce": "R"}\n'} and b'{"nonce": "R"}\n' in heard
    assert not list(tmp_path.iterdir()), "the secret is gone too"


# ---------------------------------------------------------------------------- without processes


def place(rank: int, port: int, count: int = 2) -> Topology:
    return Topology(count, 1, rank, "127.0.0.1", port, "flags")


def meeting_of(port: int, claims: list[dict[str, str]], tokens: list[Token], seconds: float = LIMIT) -> list[object]:
    """What becomes of nodes that meet: a Link or an error each."""

    def come(rank: int) -> object:
        try:
            return meet(place(rank, port, len(claims)), claims[rank], seconds, tokens[rank])
        except SlipwayError as error:
            return error

    with ThreadPoolExecutor(len(claims)) as pool:
        return list(pool.map(come, range(len(claims))))


def test_a_node_that_does_not_come_is_missed_in_time_among_strangers(tmp_path):
    port, started = free_port(), time.monotonic()
    with Strangers(port + 1) as strangers:
        with pytest.raises(PreflightError, match=r"node 1 did not connect .* within 3 s"):
            meet(place(0, port), {"secret": "claim"}, 3, Token(tmp_path))
        seconds = time.monotonic() - started
    assert 3 <= seconds < 60 and not any(b"claim" in said for said in strangers.heard)


def test_a_false_master_is_told_nothing(tmp_path):
    """It listens before node 0 does, and greets with random numbers of its own, or with all kinds of nonsense."""
    port, heard = free_port(), list[bytes]()
    (tmp_path / NAME).write_text("secret of the run")
    answers = [b'{"nonce": "00"}\n', b'{"nonce": "00"}\n{"proof": "00"}\n', b"[" * 100_000, b"\xff\n", b"a" * 1000]

    def pretend(server: socket.socket) -> None:
        for answer in answers * 2:
            with server.accept()[0] as door, contextlib.suppress(OSError):
                door.settimeout(1)
                door.sendall(answer)
                heard.append(door.recv(10_000))

    with socket.create_server(("127.0.0.1", port + 1)) as server:
        threading.Thread(target=pretend, args=(server,), daemon=True).start()
        with pytest.raises(PreflightError, match="not Slipway, or it ended"):
            meet(place(1, port), {"--lr": "secret claim"}, 4, Token(tmp_path))
    assert heard and not any(b"claim" in said or b"secret" in said for said in heard)


def test_members_that_disagree_are_told(tmp_path):
    found = meeting_of(free_port(), [{"--lr": "1"}, {"--lr": "\x1b[2J2"}], [Token(tmp_path)] * 2)
    for error in found:
        assert isinstance(error, DataError) and "--lr is 1 on node 0 and \\x1b[2J2 on node 1" in str(error)


def test_nodes_with_files_of_their_own(tmp_path):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text("the same secret of both\n")
        file.chmod(0o600)
    one, other = meeting_of(free_port(), [{}, {}], [Token.of(None, str(file)) for file in files])
    assert isinstance(one, Link) and isinstance(other, Link)
    files[1].write_text("another secret than that")
    found = meeting_of(free_port(), [{}, {}], [Token.of(None, str(file)) for file in files], 2)
    assert "did not connect" in str(found[0]) and "not Slipway, or it ended" in str(found[1])


@pytest.mark.parametrize(
    "content, mode, said", [("x" * 20, 0o644, "can be read by others"), ("short", 0o600, "5 bytes")]
)
def test_a_file_that_is_no_secret(tmp_path, content, mode, said):
    (tmp_path / "token").write_text(content)
    (tmp_path / "token").chmod(mode)
    with pytest.raises(UsageError, match=said):
        Token.of(None, str(tmp_path / "token"))
    with pytest.raises(UsageError, match="cannot be read"):
        Token.of(None, str(tmp_path / "none"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        Token.of(None, str(tmp_path / "pipe"))


def test_the_secret_of_a_folder(tmp_path):
    """Only its user can read it, it is new each time, and a planted link is not followed."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / NAME).symlink_to(victim)
    token = Token(tmp_path / "out")
    assert token.read() is None, "of a link"
    first = token.make()
    about = (tmp_path / "out" / NAME).lstat()
    assert stat.S_IMODE(about.st_mode) == 0o600 and stat.S_ISREG(about.st_mode) and victim.read_text() == "mine"
    assert token.read() == first != token.make() and len(first) >= 32
    token.remove()
    assert token.read() is None and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "master, bound", [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("192.0.2.1", ""), ("a.invalid", ""), ("", "")]
)
def test_the_port_is_open_at_the_masters_address_alone(master, bound):
    assert meeting.narrowest(master) == bound
    if bound:
        with meeting.listen(free_port(), bound) as server:
            assert server.getsockname()[0] == bound


# ---------------------------------------------------------------------------- members


@pytest.fixture
def pair(tmp_path) -> Iterator[tuple[Link, Channel]]:
    """The link of node 0, and the connection of node 1 to it, which a test uses as it likes."""
    port, token = free_port(), Token(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(meet, place(0, port), {}, LIMIT, token)
        channel = None
        while channel is None:
            with contextlib.suppress(OSError, Broken):
                made = Channel(socket.create_connection(("127.0.0.1", port + 1)))
                made.prove_to_host(token.read() or b"", time.monotonic() + 5)
                channel = made
        channel.send(number=1, host="\x1b[31mred", claims={})
        assert channel.receive(time.monotonic() + LIMIT) == {"refused": "", "code": 0}
        yield host.result(), channel
        host.result().close()


GOOD = Failure("rank 1", "was killed", KILLED).as_dict()
REPORTS = [
    3, "x", None, {}, [3], [None], [{}], [[]], [GOOD | {"blame": "x"}], [GOOD | {"blame": True}], [GOOD | {"blame": 7}],
    [GOOD | {"code": 1e999}], [GOOD | {"lines": 5}], [GOOD | {"lines": [5]}], [GOOD | {"more": 1}],
    [GOOD | {"who": []}],
]  # fmt: skip


@pytest.mark.parametrize("report", REPORTS, ids=repr)
def test_a_report_that_nobody_understands_is_a_failure(pair, monkeypatch, report):
    monkeypatch.setattr(meeting, "SETTLE", 0.01)
    link, channel = pair
    channel.send(failed=report)
    assert link._settled.wait(LIMIT)
    assert link.verdict.who == "node 1 (\\x1b[31mred)" and link.verdict.blame == FAILED
    assert "cannot be read" in link.verdict.how


def test_a_report_is_harmless(pair, monkeypatch):
    monkeypatch.setattr(meeting, "SETTLE", 0.01)
    link, channel = pair
    lines = ["\x1b[2J" * 100] * 20
    channel.send(failed=[Failure("rank\r1", "was\x07 killed", KILLED, 1, "/a\nb", lines, "").as_dict()])
    assert link._settled.wait(LIMIT)
    printed = "".join([str(link.verdict), *link.verdict.lines])
    assert "was\\x07 killed" in printed and not re.search(r"[\x00-\x1f\x7f]", printed) and len(printed) < 10_000


@pytest.mark.parametrize("spoil", ["unsigned", "other code", "too long", "again", "closed"])
def test_a_connection_that_is_not_the_runs_any_more_is_a_lost_node(pair, monkeypatch, spoil):
    monkeypatch.setattr(meeting, "SETTLE", 0.01)
    link, channel = pair
    if spoil == "unsigned":
        channel._socket.sendall(b'{"done": true}\n')
    elif spoil == "other code":
        channel._socket.sendall(b"0" * 64 + b' {"done": true}\n')
    elif spoil == "too long":
        with contextlib.suppress(OSError):
            channel._socket.sendall(b"a" * (3 * LARGEST))
    elif spoil == "again":  # somebody repeats a message that was good
        channel.send(nothing=1)
        channel._sent -= 1
        channel.send(nothing=1)
    else:
        channel.close()
    assert link._settled.wait(LIMIT) and "was lost" in str(link.verdict)


def test_a_member_that_is_understood_after_all_that_is_not_a_message(pair):
    link, channel = pair
    channel.send(something="else")
    channel.send(done=True)
    link.finish()
    assert link.verdict is None and channel.receive(time.monotonic() + LIMIT) == {"done": True}


def test_a_node_that_comes_again_takes_its_own_place(tmp_path):
    """Its first connection broke before all were there."""
    port, token = free_port(), Token(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(meet, place(0, port, 3), {}, LIMIT, token)
        first = None
        while first is None:
            with contextlib.suppress(OSError, Broken):
                made = Channel(socket.create_connection(("127.0.0.1", port + 1)))
                made.prove_to_host(token.read() or b"", time.monotonic() + 5)
                made.send(number=1, host="x", claims={})
                first = made
        first.close()
        time.sleep(0.2)
        others = [pool.submit(meet, place(1, port, 3), {}, LIMIT, token)]
        threading.Thread(target=lambda: others.append(meet(place(2, port, 3), {}, LIMIT, token)), daemon=True).start()
        assert isinstance(host.result(), Link) and isinstance(others[0].result(), Link)


def test_nobody_waits_for_a_signal(tmp_path):
    """A request to stop ends a meeting that strangers attend."""
    port = free_port()
    process = node(0, port, 2, "--out", tmp_path)
    with Strangers(port + 1, {"nothing": silent, "a line": endless}):
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port + 1)):
                break
        process.send_signal(signal.SIGINT)
        assert finished(process)[0] == 130
