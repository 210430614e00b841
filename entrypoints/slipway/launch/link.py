"""The commands of one run know each other: they meet before the first process starts, and hear when one of them fails.

Each node runs `slipway train`. Node 0 listens on the port after the master's, the others connect and say what they are
about to compute; only when all are there and agree does anything start. The connections stay open during the run, so
that a rank that dies, or a whole node that vanishes, ends the run everywhere at once: torchrun's static rendezvous
tells other nodes nothing, and NCCL waits for minutes. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from slipway.errors import DataError, PreflightError
from slipway.launch.failure import GONE, LOST_A_PEER, Failure, first_to_blame
from slipway.launch.topology import Topology

# Seconds in which other nodes can tell their side before the blame is laid. Longer while all that is known are ranks
# that lost a peer: torchrun gives the rest of the failing node 30 s before it says anything.
SETTLE, SETTLE_WITHOUT_A_CAUSE = 3.0, 40.0
# Seconds in which whoever connects must say who it is.
GREETING = 5.0
# Seconds in which nodes that did their part wait for the others.
GOODBYE = 120.0


class Connection:
    """Lines of JSON over TCP, with a dead machine noticed within a minute."""

    def __init__(self, made: socket.socket) -> None:
        made.settimeout(None)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket, self._reader, self._lock = made, made.makefile("r", encoding="utf-8"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one message; a connection that is broken is noticed by whoever reads from it."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other side is gone, silent for `timeout` seconds, or no Slipway."""
        self._socket.settimeout(timeout)
        try:
            line = self._reader.readline()
            message = json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None
        finally:
            self._socket.settimeout(None)
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Link:
    """This command's connections to the others of the run; none where it is alone."""

    def __init__(self, peers: dict[int, tuple[str, Connection]]) -> None:
        """`peers`: number of the member → (its name, its connection): all others on node 0, else only node 0."""
        self._peers = peers
        self._gathers = 0 not in peers
        self._done: set[int] = set()
        self._failures: list[Failure] = []
        self._settled, self._changed = threading.Event(), threading.Condition()
        self.verdict: Failure | None = None  # why the run ended, once it is known on all nodes
        for number in peers:
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def fail(self, failures: list[Failure]) -> Failure:
        """Tell the others what happened here; returns what the whole run died of."""
        if not self._peers:
            return first_to_blame(failures)
        if self._gathers:
            self._note(failures)
        else:
            self._tell(failed=[failure.as_dict() for failure in failures])
        self._settled.wait(SETTLE + SETTLE_WITHOUT_A_CAUSE)
        return self.verdict or first_to_blame(failures)

    def finish(self) -> None:
        """This node did its part: wait until all have, or one has failed."""
        if not self._gathers:
            self._tell(done=True)
        with self._changed:
            self._changed.wait_for(lambda: self.verdict or len(self._done) == len(self._peers), GOODBYE)
        if self._gathers:
            self._tell(done=True)

    def _tell(self, **message: Any) -> None:
        for _, connection in self._peers.values():
            connection.send(**message)

    def close(self) -> None:
        for _, connection in self._peers.values():
            connection.close()

    def _listen(self, number: int) -> None:
        name, connection = self._peers[number]
        while message := connection.receive():
            if "failed" in message:
                self._note([Failure(**failure) for failure in message["failed"]])
            elif "ended" in message:
                self._settle(Failure(**message["ended"]))
            elif "done" in message:
                with self._changed:
                    self._done.add(number)
                    self._changed.notify_all()
        if number not in self._done and not self._settled.is_set():
            self._note([Failure(name, "is gone: its command or its machine ended, or the network did", GONE)])

    def _note(self, failures: list[Failure]) -> None:
        if not self._gathers:
            return self._settle(first_to_blame(failures))
        self._failures += failures
        known = first_to_blame(self._failures).blame < LOST_A_PEER
        timer = threading.Timer(SETTLE if known else SETTLE_WITHOUT_A_CAUSE, self._decide)
        timer.daemon = True
        timer.start()

    def _decide(self) -> None:
        if self._settled.is_set():
            return
        verdict = first_to_blame(self._failures)
        self._tell(ended=verdict.as_dict())
        self._settle(verdict)

    def _settle(self, verdict: Failure) -> None:
        with self._changed:
            self.verdict = self.verdict or verdict
            self._settled.set()
            self._changed.notify_all()


def meet(topology: Topology, claims: dict[str, str], timeout: float) -> Link:
    """Wait until the commands of all nodes are there and have shown that they are about to compute the same.

    Args:
        topology: where this one stands.
        claims: what must be the same everywhere, name → value; the names go into the error.
        timeout: seconds until it is an error that somebody is missing.

    Errors: PreflightError for a master that does not answer, a node that does not come or a port that is taken,
    DataError for claims that differ.
    """
    count = topology.nodes if topology.local_rank is None else topology.world_size
    number = topology.node_rank if topology.local_rank is None else topology.rank
    if topology.rank == 0 and topology.world_size > 1:
        check_port(topology.master_port)
    if count == 1:
        return Link({})
    if number == 0:
        return _gather(topology, count, claims, timeout)
    return _join(topology, number, claims, timeout)


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses; PreflightError when the port is taken."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise PreflightError(
            f"port {port} cannot be opened on this machine ({getattr(error, 'strerror', error)}); give all nodes "
            "another --master-port"
        ) from None


def check_port(port: int) -> None:
    """PreflightError unless torchrun will be able to listen here."""
    listen(port).close()


def _name(topology: Topology, number: int) -> str:
    return f"node {number}" if topology.local_rank is None else f"rank {number}"


@dataclass(frozen=True)
class _Guest:
    """Another member of the run, as node 0 sees it."""

    number: int
    name: str
    claims: dict[str, str]
    connection: Connection


def _gather(topology: Topology, count: int, claims: dict[str, str], timeout: float) -> Link:
    """Node 0's side: let everybody in, compare, and tell them all the same."""
    guests: dict[int, _Guest] = {}
    stranger = _let_in(guests, topology, count, timeout)
    problem = (
        _no_place(stranger, count)
        or _missing(guests, topology, count, timeout)
        or _difference(claims, guests, topology)
    )
    for guest in [*guests.values(), *([stranger] if stranger else [])]:
        guest.connection.send(refused=str(problem or ""), code=problem.exit_code if problem else 0)
    if problem:
        raise problem
    return Link({number: (guest.name, guest.connection) for number, guest in guests.items()})


def _let_in(guests: dict[int, _Guest], topology: Topology, count: int, timeout: float) -> _Guest | None:
    """Fill `guests` until all are there or the time is over; returns one for whom there is no place."""
    deadline = time.monotonic() + timeout
    with listen(topology.master_port + 1) as server:
        while len(guests) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = Connection(server.accept()[0])
            except OSError:
                break
            guest = _greet(topology, connection)
            if guest is None:
                connection.close()
            elif guest.number in guests or not 0 < guest.number < count:
                return guest
            else:
                guests[guest.number] = guest
    return None


def _greet(topology: Topology, connection: Connection) -> _Guest | None:
    """Who has come; None for what does not speak as a member does."""
    hello = connection.receive(GREETING) or {}
    try:
        number, host, claims = int(hello["number"]), hello["host"], dict(hello["claims"])
    except (KeyError, TypeError, ValueError):
        return None
    return _Guest(number, f"{_name(topology, number)} ({host})", claims, connection)


def _no_place(guest: _Guest | None, count: int) -> PreflightError | None:
    if guest is None:
        return None
    return PreflightError(f"{guest.name} came to a run of {count} that has no place for it; check --node-rank")


def _missing(guests: dict[int, _Guest], topology: Topology, count: int, timeout: float) -> PreflightError | None:
    missing = [_name(topology, number) for number in range(1, count) if number not in guests]
    if not missing:
        return None
    return PreflightError(
        f"{', '.join(missing)} did not come to port {topology.master_port + 1} of this machine within "
        f"{timeout:.0f} s; is the same command running there, with a --master-addr that leads here?"
    )


def _difference(claims: dict[str, str], guests: dict[int, _Guest], topology: Topology) -> DataError | None:
    here = _name(topology, 0)
    for guest in guests.values():
        differing = [key for key in claims | guest.claims if claims.get(key) != guest.claims.get(key)]
        if differing:
            said = "; ".join(
                f"{key} is {claims.get(key)} on {here} and {guest.claims.get(key)} on {guest.name}" for key in differing
            )
            return DataError(f"{said}; they must be the same on all nodes")
    return None


def _join(topology: Topology, number: int, claims: dict[str, str], timeout: float) -> Link:
    address, port = topology.master_addr, topology.master_port + 1
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = Connection(socket.create_connection((address, port), timeout=min(left, 10.0)))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.5, left))
            continue
        connection.send(number=number, host=socket.gethostname(), claims=claims)
        # Node 0 may wait as long for the others, and it started before this one could connect.
        answer = connection.receive(timeout)
        if answer is None:
            connection.close()
            reason = "connected, but what answers there is no `slipway train`, or it ended"
            time.sleep(0.5)
        elif answer.get("refused"):
            raise (DataError if answer["code"] == DataError.exit_code else PreflightError)(answer["refused"])
        else:
            return Link({0: (f"{_name(topology, 0)} ({address})", connection)})
    raise PreflightError(
        f"the master does not answer at {address}:{port} within {timeout:.0f} s ({reason}); check that the same "
        f"command runs on node 0, that {address} leads there and that nothing closes its ports {port - 1} and {port}"
    )
