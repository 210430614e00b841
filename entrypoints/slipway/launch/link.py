"""The commands of one run are connected: they meet before the first process starts, and learn when one of them fails.

Each node runs `slipway train`. Node 0 listens on the port after the master's port. The others connect and say what they
are about to compute. Nothing starts before all nodes are there and agree. The connections stay open during the run, so
that a dead rank, or a lost node, ends the run on all nodes at once: torchrun's static rendezvous tells other nodes
nothing, and NCCL waits for minutes. Messages are lines of JSON.
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

# Seconds for the other nodes to report before the first failure is chosen. When a rank dies, the ranks that were
# waiting for it fail within milliseconds, and their reports can be the first to arrive. As long as only such ranks are
# known, it takes longer: torchrun waits up to 30 s for the other processes of its node before it reports the dead one.
SETTLE, SETTLE_WITHOUT_A_CAUSE = 3.0, 40.0
# Seconds for a new connection to say who it is. Port scanners and health checks connect and say nothing.
GREETING = 5.0
# Seconds for which a node that has finished waits for the others: the last checkpoint takes longer on some nodes.
GOODBYE = 120.0


class Connection:
    """Lines of JSON over TCP. A machine that is down is noticed within a minute."""

    def __init__(self, made: socket.socket) -> None:
        made.settimeout(None)
        # A machine that loses power closes no connection. Nothing is sent during a run, so without keep-alive packets
        # it would not be noticed: the first after 20 s of silence, then every 10 s, at most 3 without an answer.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket, self._reader, self._lock = made, made.makefile("r", encoding="utf-8"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one message. A broken connection is no error here: the thread that reads from it notices."""
        # Threads send too (see _decide), and two half lines in one another would be no JSON.
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None if the other side has closed, is silent for `timeout` seconds, or is not Slipway."""
        self._socket.settimeout(timeout)
        try:
            line = self._reader.readline()
            # A line without an end is what was sent before the other side died: half a message.
            message = json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None
        finally:
            self._socket.settimeout(None)
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        # close() alone does not wake a thread that reads from the socket.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Link:
    """The connections of this command to the others of the run; none if it runs alone.

    Every node reports its failures to node 0. Node 0 chooses the one that caused the others and tells all nodes. So all
    of them end with the same message.
    """

    def __init__(self, peers: dict[int, tuple[str, Connection]]) -> None:
        """`peers`: number of a member → (its name, its connection). Node 0 has all others, the others have node 0."""
        self._peers = peers
        self._gathers = 0 not in peers  # this is node 0
        self._done: set[int] = set()
        self._failures: list[Failure] = []
        self._settled, self._changed = threading.Event(), threading.Condition()
        self.verdict: Failure | None = None  # why the run failed, once node 0 has chosen
        for number in peers:
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def fail(self, failures: list[Failure]) -> Failure:
        """Report what happened here; returns the failure that ended the whole run."""
        if not self._peers:
            return first_to_blame(failures)
        if self._gathers:
            self._note(failures)
        else:
            self._tell(failed=[failure.as_dict() for failure in failures])
        # With a limit, because node 0 can be the one that is lost. Then this node's own failure is all that is known.
        self._settled.wait(SETTLE + SETTLE_WITHOUT_A_CAUSE)
        return self.verdict or first_to_blame(failures)

    def finish(self) -> None:
        """This node has finished: wait until all nodes have, or one has failed."""
        if not self._gathers:
            self._tell(done=True)
        with self._changed:
            self._changed.wait_for(lambda: self.verdict or len(self._done) == len(self._peers), GOODBYE)
        if self._gathers:
            # Only now, so that no node closes its connection while another one still trains: it would look lost.
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
        # The connection has ended. That is normal after "done" or after the end of a run that failed.
        if number not in self._done and not self._settled.is_set():
            self._note([Failure(name, "was lost: its command or its machine stopped, or the network failed", GONE)])

    def _note(self, failures: list[Failure]) -> None:
        if not self._gathers:
            return self._settle(first_to_blame(failures))
        self._failures += failures
        # Not decided at once: the cause may be reported by another node a moment later. A later timer changes nothing.
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
    """Wait until the commands of all nodes are connected and have shown that they are about to compute the same.

    Args:
        topology: the place of this command in the run.
        claims: what must be the same on all nodes, name → value. The error shows the names.
        timeout: seconds to wait for the other nodes.

    Errors: PreflightError if the master does not answer, a node is missing or a port is in use, DataError if claims
    differ.
    """
    # With one process per node torchrun starts the ranks, and nodes meet. Else the launcher has started every rank.
    count = topology.nodes if topology.local_rank is None else topology.world_size
    number = topology.node_rank if topology.local_rank is None else topology.rank
    if topology.rank == 0 and topology.world_size > 1:
        check_port(topology.master_port)  # torchrun's: it would fail later, and with a traceback
    if count == 1:
        return Link({})
    if number == 0:
        return _gather(topology, count, claims, timeout)
    return _join(topology, number, claims, timeout)


def listen(port: int) -> socket.socket:
    """A listening socket on all addresses; PreflightError if the port is in use."""
    # The master's name may resolve to an IPv6 address on one node and to an IPv4 address on another.
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise PreflightError(
            f"port {port} cannot be opened on this machine ({getattr(error, 'strerror', error)}); choose another "
            "--master-port, the same on all nodes"
        ) from None


def check_port(port: int) -> None:
    """PreflightError unless this process can listen on the port, which is then free for torchrun."""
    listen(port).close()


def _name(topology: Topology, number: int) -> str:
    return f"node {number}" if topology.local_rank is None else f"rank {number}"


@dataclass(frozen=True)
class _Guest:
    """Another member of the run, as it presents itself to node 0."""

    number: int
    name: str
    claims: dict[str, str]
    connection: Connection


def _gather(topology: Topology, count: int, claims: dict[str, str], timeout: float) -> Link:
    """On node 0: accept the others, compare, and tell all of them the same."""
    guests: dict[int, _Guest] = {}
    stranger = _let_in(guests, topology, count, timeout)
    problem = (
        _not_a_member(stranger, count)
        or _missing(guests, topology, count, timeout)
        or _difference(claims, guests, topology)
    )
    for guest in [*guests.values(), *([stranger] if stranger else [])]:
        guest.connection.send(refused=str(problem or ""), code=problem.exit_code if problem else 0)
    if problem:
        raise problem
    return Link({number: (guest.name, guest.connection) for number, guest in guests.items()})


def _let_in(guests: dict[int, _Guest], topology: Topology, count: int, timeout: float) -> _Guest | None:
    """Fill `guests` until all are there or the time is over; returns the first one with a wrong number."""
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
                connection.close()  # a port scanner, or a health check; the next one may be a node
            elif guest.number in guests or not 0 < guest.number < count:
                return guest
            else:
                guests[guest.number] = guest
    return None


def _greet(topology: Topology, connection: Connection) -> _Guest | None:
    """Who has connected; None for a program that is not Slipway."""
    hello = connection.receive(GREETING) or {}
    try:
        number, host, claims = int(hello["number"]), hello["host"], dict(hello["claims"])
    except (KeyError, TypeError, ValueError):
        return None
    return _Guest(number, f"{_name(topology, number)} ({host})", claims, connection)


def _not_a_member(guest: _Guest | None, count: int) -> PreflightError | None:
    if guest is None:
        return None
    return PreflightError(
        f"duplicate or out-of-range --node-rank: {guest.name} joined, but the numbers are 0 to {count - 1} and each is "
        "used once; give every node its own"
    )


def _missing(guests: dict[int, _Guest], topology: Topology, count: int, timeout: float) -> PreflightError | None:
    missing = [_name(topology, number) for number in range(1, count) if number not in guests]
    if not missing:
        return None
    return PreflightError(
        f"{', '.join(missing)} did not connect to port {topology.master_port + 1} of this machine within "
        f"{timeout:.0f} s; start the same command there, with the address of this machine as --master-addr"
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
    """On every other node: connect to node 0, say what will be computed here, and wait for its answer."""
    address, port = topology.master_addr, topology.master_port + 1
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = Connection(socket.create_connection((address, port), timeout=min(left, 10.0)))
        except OSError as error:
            # Normal at the start: node 0 is not listening yet, or its name is not in the DNS yet.
            reason = error.strerror or str(error)
            time.sleep(min(0.5, left))
            continue
        connection.send(number=number, host=socket.gethostname(), claims=claims)
        # Node 0 answers when all nodes are there. It began to wait before this node connected, so its time ends first.
        answer = connection.receive(timeout)
        if answer is None:
            connection.close()
            reason = "the service on that port is not Slipway, or it ended"
            time.sleep(0.5)
        elif answer.get("refused"):
            raise (DataError if answer["code"] == DataError.exit_code else PreflightError)(answer["refused"])
        else:
            return Link({0: (f"{_name(topology, 0)} ({address})", connection)})
    raise PreflightError(
        f"the master does not answer at {address}:{port} within {timeout:.0f} s ({reason}); check that the same "
        f"command runs on node 0, that {address} is its address, and that no firewall blocks its ports {port - 1} and "
        f"{port}"
    )
