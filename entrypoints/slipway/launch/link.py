"""The commands of one run are connected: they meet before the first process starts, and learn when one of them fails.

Each node runs `slipway train`. Node 0 listens on the port after the master's port. The others connect, prove that they
belong to the run (channel.py) and say what they are about to compute. Nothing starts before all nodes are there and
agree. The connections stay open during the run, so that a dead rank, or a lost node, ends the run on all nodes at once:
torchrun's static rendezvous tells other nodes nothing, and NCCL waits for minutes.

Anybody may connect. Whoever cannot prove to belong to the run is told nothing, and is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import select
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from slipway.errors import DataError, PreflightError
from slipway.launch.channel import Broken, Channel
from slipway.launch.failure import FAILED, GONE, LOST_A_PEER, Failure, first_to_blame
from slipway.launch.token import Token
from slipway.launch.topology import Topology
from slipway.untrusted import harmless

# Seconds for the other nodes to report before the first failure is chosen. When a rank dies, the ranks that were
# waiting for it fail within milliseconds, and their reports can be the first to arrive. As long as only such ranks are
# known, it takes longer: torchrun waits up to 30 s for the other processes of its node before it reports the dead one.
SETTLE, SETTLE_WITHOUT_A_CAUSE = 3.0, 40.0
# Seconds for a new connection to prove that it belongs to the run. Port scanners and health checks say nothing.
GREETING = 10.0
# Connections that have not proven anything yet. Of more than these the oldest is dropped: a node proves it in a moment.
MOST_STRANGERS = 256
LOOK = 0.05  # seconds between two looks at whether all are there
AGAIN = 0.5  # seconds before a node tries again to reach node 0
# Seconds for which a node that has finished waits for the others: the last checkpoint takes longer on some nodes.
GOODBYE = 120.0
LONGEST_NAME, LONGEST_CLAIM = 255, 250  # characters
OPEN = Token()
LOOPBACK = ("127.0.0.1", "::1")


class Link:
    """The connections of this command to the others of the run; none if it runs alone.

    Every node reports its failures to node 0. Node 0 chooses the one that caused the others and tells all nodes. So all
    of them end with the same message.
    """

    def __init__(self, peers: dict[int, tuple[str, Channel]]) -> None:
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
            # One is enough: node 0 would choose it from these, and a node can have many processes.
            self._tell(failed=[first_to_blame(failures).bounded().as_dict()])
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
        with contextlib.suppress(Broken):
            while True:
                self._heed(number, connection.receive())
        # The connection has ended. That is normal after "done" or after the end of a run that failed.
        if number not in self._done and not self._settled.is_set():
            self._note([Failure(name, "was lost: its command or its machine stopped, or the network failed", GONE)])

    def _heed(self, number: int, message: dict[str, Any]) -> None:
        """What a member says; one that says it in a way that nobody understands has failed."""
        if "failed" in message:
            reports = message["failed"] if isinstance(message["failed"], list) else [None]
            self._note([self._report(number, report) for report in reports] or [self._report(number, None)])
        elif "ended" in message:
            self._settle(self._report(number, message["ended"]))
        elif "done" in message:
            with self._changed:
                self._done.add(number)
                self._changed.notify_all()

    def _report(self, number: int, said: Any) -> Failure:
        try:
            return Failure.of(said)
        except (TypeError, ValueError):
            return Failure(self._peers[number][0], "reported a failure that cannot be read", FAILED)

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
        self._tell(ended=verdict.bounded().as_dict())
        self._settle(verdict)

    def _settle(self, verdict: Failure) -> None:
        with self._changed:
            self.verdict = self.verdict or verdict
            self._settled.set()
            self._changed.notify_all()


def meet(topology: Topology, claims: dict[str, str], timeout: float, token: Token = OPEN) -> Link:
    """Wait until the commands of all nodes are connected and have shown that they are about to compute the same.

    Args:
        topology: the place of this command in the run.
        claims: what must be the same on all nodes, name → value. The error shows the names.
        timeout: seconds to wait for the other nodes.
        token: the secret of the run; OPEN lets everybody take part.

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
    claims = {name: _short(value) for name, value in claims.items()}
    if number == 0:
        return _Host(topology, count, claims, time.monotonic() + timeout, token).gather(timeout)
    return _join(topology, number, claims, timeout, token)


# ---------------------------------------------------------------------------- the port


def listen(port: int, address: str = "") -> socket.socket:
    """A listening socket; PreflightError if the port is in use.

    Args:
        address: of this machine; empty: all of them.
    """
    # The master's name may resolve to an IPv6 address on one node and to an IPv4 address on another.
    both = not address and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise PreflightError(
            f"port {port} cannot be opened on this machine ({getattr(error, 'strerror', error)}); choose another "
            "--master-port, the same on all nodes"
        ) from None


def check_port(port: int) -> None:
    """PreflightError unless this process can listen on the port, which is then free for torchrun."""
    listen(port).close()


def narrowest(master: str) -> str:
    """The one address of this machine at which the other nodes look for node 0; empty where that is not certain."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return ""
    # Many machines call themselves 127.0.1.1, and the others know them by their address.
    meant = master in LOOPBACK or master.startswith("127.")
    usable = [each for each in found if meant or not ipaddress.ip_address(each.partition("%")[0]).is_loopback]
    return usable[0] if len(usable) == len(found) == 1 and _is_here(usable[0]) else ""


def _is_here(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False  # of a load balancer, or of a translated network
    return True


def _short(claim: str) -> str:
    """A claim that fits into a message with all others; what is cut off still counts."""
    digest = hashlib.sha256(claim.encode("utf-8", "surrogatepass")).hexdigest()
    return claim if len(claim) <= LONGEST_CLAIM else f"{claim[:LONGEST_CLAIM]}… (digest {digest[:12]})"


def _name(topology: Topology, number: int) -> str:
    return f"node {number}" if topology.local_rank is None else f"rank {number}"


# ---------------------------------------------------------------------------- node 0


@dataclass(frozen=True)
class _Guest:
    """Another member of the run, as it presents itself to node 0; it has proven that it is one."""

    number: int
    name: str
    claims: dict[str, str]
    connection: Channel


@dataclass
class _Host:
    """On node 0: accept the others side by side, compare, and tell all of them the same.

    Args:
        deadline: time.monotonic() at which the meeting ends, whoever is there.
    """

    topology: Topology
    count: int
    claims: dict[str, str]
    deadline: float
    token: Token
    guests: dict[int, _Guest] = field(default_factory=dict)
    odd: _Guest | None = None  # a member with a number that is taken, or that there is not
    strangers: list[tuple[str, Channel]] = field(default_factory=list)  # where each is from, in order
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gather(self, timeout: float) -> Link:
        secret = self.token.make()
        try:
            self._let_in(secret)
        finally:
            self.token.remove()
        problem = self._not_a_member() or self._missing(timeout) or self._difference()
        guests = [*self.guests.values(), *([self.odd] if self.odd else [])]
        for guest in guests:
            guest.connection.send(refused=str(problem or "")[:8000], code=problem.exit_code if problem else 0)
        if problem:
            for guest in guests:
                guest.connection.close()
            raise problem
        return Link({number: (guest.name, guest.connection) for number, guest in self.guests.items()})

    def _let_in(self, secret: bytes) -> None:
        """Fill `guests` until all are there, one is odd, or the time is over."""
        with listen(self.topology.master_port + 1, narrowest(self.topology.master_addr)) as server:
            ready = select.poll()
            ready.register(server, select.POLLIN)
            while time.monotonic() < self.deadline:
                with self.lock:
                    if self._is_over():
                        break
                if ready.poll(LOOK * 1000):
                    self._accept(server, secret)
        with self.lock:
            for _, connection in self.strangers:
                connection.close()

    def _is_over(self) -> bool:
        """All are there, or one is odd; who has lost its connection meanwhile comes again."""
        if len(self.guests) == self.count - 1:
            self.guests = {number: guest for number, guest in self.guests.items() if guest.connection.is_open()}
        return self.odd is not None or len(self.guests) == self.count - 1

    def _accept(self, server: socket.socket, secret: bytes) -> None:
        """Give whoever has connected a thread of its own, so that nobody holds the others up."""
        try:
            made, (source, *_) = server.accept()
            connection = Channel(made)
        except OSError:  # it has gone already, or there are no more descriptors
            self._drop_the_oldest(MOST_STRANGERS // 2)
            time.sleep(LOOK)
            return
        with self.lock:
            self.strangers.append((source, connection))
        self._drop_the_oldest(MOST_STRANGERS)
        threading.Thread(target=self._welcome, args=(source, connection, secret), daemon=True).start()

    def _drop_the_oldest(self, most: int) -> None:
        """Of those who have proven nothing, from where most of them come: no machine shuts out the others."""
        with self.lock:
            while len(self.strangers) > most:
                (busiest, _), *_ = Counter(source for source, _ in self.strangers).most_common(1)
                place = next(n for n, (source, _) in enumerate(self.strangers) if source == busiest)
                self.strangers.pop(place)[1].close()

    def _welcome(self, source: str, connection: Channel, secret: bytes) -> None:
        """Take a member in; anybody else is dropped without a word."""
        by = min(self.deadline, time.monotonic() + GREETING)
        try:
            connection.prove_to_guest(secret, by)
            guest = self._presented(connection, connection.receive(by))
        except Broken:
            guest = None
        with self.lock:
            if (source, connection) in self.strangers:
                self.strangers.remove((source, connection))
            if guest is None or self._is_over():
                return connection.close()
            before = self.guests.get(guest.number)
            if before and not before.connection.is_open():  # it has lost its connection and comes again
                before = None
            if before or not 0 < guest.number < self.count:
                self.odd = guest
            else:
                self.guests[guest.number] = guest

    def _presented(self, connection: Channel, hello: dict[str, Any]) -> _Guest | None:
        """Who has connected; None for what no node of ours says."""
        number, host, claims = hello.get("number"), hello.get("host"), hello.get("claims")
        if type(number) is not int or not isinstance(host, str) or not isinstance(claims, dict):
            return None
        if not all(isinstance(value, str) for value in claims.values()):
            return None
        name = f"{_name(self.topology, number)} ({harmless(host, LONGEST_NAME)})"
        return _Guest(number, name, claims, connection)

    def _not_a_member(self) -> PreflightError | None:
        if self.odd is None:
            return None
        return PreflightError(
            f"duplicate or out-of-range --node-rank: {self.odd.name} joined, but the numbers are 0 to "
            f"{self.count - 1} and each is used once; give every node its own"
        )

    def _missing(self, timeout: float) -> PreflightError | None:
        missing = [_name(self.topology, number) for number in range(1, self.count) if number not in self.guests]
        if not missing:
            return None
        few = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        return PreflightError(
            f"{few} did not connect to port {self.topology.master_port + 1} of this machine within "
            f"{timeout:.0f} s; start the same command there, with the address of this machine as --master-addr and "
            "the same --out or --run-token-file"
        )

    def _difference(self) -> DataError | None:
        here = _name(self.topology, 0)
        for guest in self.guests.values():
            differing = [key for key in self.claims | guest.claims if self.claims.get(key) != guest.claims.get(key)]
            if differing:
                said = "; ".join(
                    f"{key} is {self.claims.get(key)} on {here} and {guest.claims.get(key)} on {guest.name}"
                    for key in differing
                )
                return DataError(f"{harmless(said)}; they must be the same on all nodes")
        return None


# ---------------------------------------------------------------------------- every other node


def _join(topology: Topology, number: int, claims: dict[str, str], timeout: float, token: Token) -> Link:
    """Connect to node 0, say what will be computed here, and wait for its answer."""
    address, port = topology.master_addr, topology.master_port + 1
    deadline, reason = time.monotonic() + timeout, "no answer"
    hello = {"number": number, "host": socket.gethostname()[:LONGEST_NAME], "claims": claims}
    while (left := deadline - time.monotonic()) > 0:
        try:
            made = socket.create_connection((address, port), timeout=min(left, 10.0))
        except (OSError, UnicodeError) as error:
            # Normal at the start: node 0 is not listening yet, or its name is not in the DNS yet.
            reason = getattr(error, "strerror", "") or str(error)
        else:
            joined = _joined(Channel(made), hello, timeout, token)
            if isinstance(joined, Channel):
                return Link({0: (f"{_name(topology, 0)} ({address})", joined)})
            reason = joined
        time.sleep(max(0.0, min(AGAIN, deadline - time.monotonic())))
    raise PreflightError(
        f"the master does not answer at {address}:{port} within {timeout:.0f} s ({reason}); check that the same "
        f"command runs on node 0, that {address} is its address, and that no firewall blocks its ports {port - 1} and "
        f"{port}"
    )


def _joined(connection: Channel, hello: dict[str, Any], timeout: float, token: Token) -> Channel | str:
    """The connection once node 0 has taken this node in; why it has not, in words. Its refusal is raised."""
    joined = False
    try:
        # Node 0 makes it before it listens: what is read now is of this start.
        if (secret := token.read()) is None:
            return f"there is no {token.place}: --out must be shared by all nodes, else give --run-token-file"
        connection.prove_to_host(secret, time.monotonic() + GREETING)
        connection.send(**hello)
        # Node 0 answers when all nodes are there. It began to wait before this node connected, so its time ends first.
        answer = connection.receive(time.monotonic() + timeout)
        if refused := answer.get("refused"):
            kind = DataError if answer.get("code") == DataError.exit_code else PreflightError
            raise kind(harmless(str(refused)))
        joined = True
        return connection
    except Broken as error:
        return f"the service on that port is not Slipway, or it ended: {error}"
    finally:
        if not joined:
            connection.close()
