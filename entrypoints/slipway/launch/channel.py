"""Messages between the commands of one run: lines of JSON over TCP, each proven to come from a member of the run.

Whoever connects proves first that it knows the run's secret, without sending it, and so does the other side:

    host → guest    {"nonce": S}                   S and G are random
    guest → host    {"nonce": G, "proof": HMAC(secret, "guest S G")}
    host → guest    {"proof": HMAC(secret, "host S G")}

Nothing else is told before. Each later line is a code of its own, a space and the message: HMAC(key, side number text),
where key = HMAC(secret, "key S G"), side is who sends it and number counts its messages. So nobody in between can
add, change, repeat or leave out a message.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import secrets
import select
import socket
import threading
import time
from typing import Any

from slipway.untrusted import NotJson, parse_json

LARGEST = 64_000  # bytes of a message
LARGEST_GREETING = 512  # bytes of a message from somebody who has not proven anything
SEND_SECONDS = 30.0  # for the other side to read a message
HOST, GUEST = "host", "guest"


class Broken(Exception):
    """The other side has closed, was silent for too long, sent too much, or is not of this run."""


class Channel:
    """A connection. A machine that is down is noticed within a minute."""

    def __init__(self, made: socket.socket) -> None:
        # A machine that loses power closes no connection. Nothing is sent during a run, so without keep-alive packets
        # it would not be noticed: the first after 20 s of silence, then every 10 s, at most 3 without an answer.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket, self._lock, self._held = made, threading.Lock(), b""
        self._key = b""
        self._side, self._sent, self._received = "", 0, 0

    # ------------------------------------------------------------------------ who is there

    def prove_to_guest(self, secret: bytes, deadline: float) -> None:
        """On node 0: find out whether the guest belongs to the run, then show it that this side does; else Broken."""
        own = secrets.token_hex(16)
        self._send_line(json.dumps({"nonce": own}), deadline)
        answer = self._greeting(deadline, "nonce", "proof")
        if not _same(answer["proof"], _code(secret, GUEST, own, answer["nonce"])):
            raise Broken("it does not know the secret of the run")
        self._send_line(json.dumps({"proof": _code(secret, HOST, own, answer["nonce"])}), deadline)
        self._agree(secret, HOST, own, answer["nonce"])

    def prove_to_host(self, secret: bytes, deadline: float) -> None:
        """On every other node: the same, from the other side."""
        theirs = self._greeting(deadline, "nonce")["nonce"]
        own = secrets.token_hex(16)
        self._send_line(json.dumps({"nonce": own, "proof": _code(secret, GUEST, theirs, own)}), deadline)
        if not _same(self._greeting(deadline, "proof")["proof"], _code(secret, HOST, theirs, own)):
            raise Broken("it does not know the secret of the run")
        self._agree(secret, GUEST, theirs, own)

    def _greeting(self, deadline: float, *names: str) -> dict[str, str]:
        try:
            message = parse_json(self._line(LARGEST_GREETING, deadline))
        except NotJson:
            raise Broken("it is not Slipway") from None
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in names):
            raise Broken("it is not Slipway")
        return message

    def _agree(self, secret: bytes, side: str, *nonces: str) -> None:
        self._key, self._side = bytes.fromhex(_code(secret, "key", *nonces)), side

    # ------------------------------------------------------------------------ messages

    def send(self, **message: Any) -> None:
        """Send one message. A broken connection is no error here: the thread that reads from it notices."""
        text = json.dumps(message, ensure_ascii=False)
        # Threads send too, and two half lines in one another would be no message.
        with self._lock, contextlib.suppress(OSError, Broken):
            code = _code(self._key, self._side, str(self._sent), text)
            self._sent += 1
            self._send_line(f"{code} {text}", time.monotonic() + SEND_SECONDS)

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        """The next message; Broken if there will be none.

        Args:
            deadline: time.monotonic() at which to give up, however much has come until then.
        """
        line = self._line(LARGEST, deadline)
        code, _, text = line.decode(errors="replace").partition(" ")
        other = HOST if self._side == GUEST else GUEST
        if not self._key or not _same(code, _code(self._key, other, str(self._received), text)):
            raise Broken("a message is not of this run")
        self._received += 1
        try:
            message = parse_json(text)
        except NotJson as error:
            raise Broken(f"a message is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise Broken("a message is not an object")
        return message

    def is_open(self) -> bool:
        """The other side has not closed it."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        # close() alone does not wake a thread that reads from the socket.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # ------------------------------------------------------------------------ lines

    def _line(self, most: int, deadline: float | None) -> bytes:
        """The next line without its end; no more than `most` bytes are ever held."""
        while b"\n" not in self._held:
            if len(self._held) > most:
                raise Broken("a message is too long")
            try:
                self._wait(select.POLLIN, deadline)
                more = self._socket.recv(most, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                raise Broken("no answer") from None
            if not more:  # what came before is half a message
                raise Broken("it has closed")
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        if len(line) > most:
            raise Broken("a message is too long")
        return line

    def _send_line(self, text: str, deadline: float) -> None:
        line = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
        assert len(line) <= LARGEST, "what is told is bounded by whoever tells it"
        try:
            while line:  # its receiver may not read: then the system's buffers fill up
                self._wait(select.POLLOUT, deadline)
                with contextlib.suppress(BlockingIOError):
                    line = line[self._socket.send(line, socket.MSG_DONTWAIT) :]
        except OSError:
            raise Broken("it does not read") from None

    def _wait(self, event: int, deadline: float | None) -> None:
        """Until it can be read from or written to. Not by the socket's own timeout, which its threads would share."""
        left = None if deadline is None else deadline - time.monotonic()
        if (descriptor := self._socket.fileno()) < 0:  # this side has closed it
            raise Broken("it is closed")
        poll = select.poll()
        poll.register(descriptor, event)
        if (left is not None and left <= 0) or not poll.poll(None if left is None else math.ceil(left * 1000)):
            raise Broken("no answer")


def _code(key: bytes, *parts: str) -> str:
    return hmac.new(key, " ".join(parts).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode())
