"""Why a run ended: which rank or node, how, and its last lines."""

from __future__ import annotations

import json
import re
import signal
import socket
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slipway.errors import SlipwayError
from slipway.launch.topology import Topology
from slipway.untrusted import harmless

LAST_LINES = 20
MOST_LINES, LONGEST_LINE, LONGEST_WORDS = 20, 300, 2000  # of a report: lines, characters of one, of a field

# From the most to the least likely cause: a rank that was killed or lost makes the others fail, not the reverse.
KILLED, GONE, FAILED, LOST_A_PEER = range(4)

# What gloo, NCCL and torch's store say in the ranks that lost a peer.
PEER_IS_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Timed out waiting|"
    r"Connection was likely closed|collective operation timeout|failed to recv, got 0 bytes"
)

# A row of the table that torchrun prints at its end. There is no other way to learn which rank had which exit code.
TORCHRUN_ROW = re.compile(r"rank\s+: (\d+) \(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+)")


@dataclass(frozen=True)
class Failure:
    """One line for people (`str()`), its place in the order of causes (`blame`), and the last lines of the log."""

    who: str
    how: str
    blame: int
    code: int = 1
    log: str = ""
    lines: list[str] = field(default_factory=list)
    said: str = ""  # the worker's own message, if it knew what was wrong

    def __str__(self) -> str:
        return f"{self.who} {self.how}" + (f"; its log: {self.log}" if self.log else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def bounded(self) -> Failure:
        """The same without what makes it too long for a message, and without what a terminal obeys."""
        who, how, log, said = (harmless(each, LONGEST_WORDS) for each in (self.who, self.how, self.log, self.said))
        lines = [harmless(line, LONGEST_LINE) for line in self.lines[-MOST_LINES:]]
        return replace(self, who=who, how=how, log=log, said=said, lines=lines)

    @classmethod
    def of(cls, said: Any) -> Failure:
        """What another node reports; TypeError or ValueError for anything else."""
        failure = cls(**said)
        texts = [failure.who, failure.how, failure.log, failure.said, *list(failure.lines)]
        if not all(isinstance(text, str) for text in texts) or failure.blame not in range(LOST_A_PEER + 1):
            raise ValueError("not a failure")
        if type(failure.blame) is not int or type(failure.code) is not int or not -256 < failure.code < 256:
            raise ValueError("not a failure")
        return failure.bounded()


def first_to_blame(failures: list[Failure]) -> Failure:
    """The failure that most likely caused the others."""
    return min(failures, key=lambda failure: failure.blame)


def failures_of_node(topology: Topology, logs: Path, scratch: Path, code: int) -> list[Failure]:
    """What happened to the ranks of this node.

    Args:
        topology: the place of this node in the run.
        logs: the folder with the logs of this start.
        scratch: the folder where workers leave their messages. It is not beside the logs, whose disk may be full.
        code: exit code of torchrun, or of the worker if there is no torchrun.
    """
    if topology.local_rank is not None:
        codes = {topology.local_rank: code}
    else:
        table = TORCHRUN_ROW.findall(_read(logs / "torchrun.log"))
        codes = {int(local_rank): int(code) for _, local_rank, code in table}
    # A worker that knew its error left a message, even where torchrun was ended before it could print its table.
    said = {int(file.suffix[1:]): json.loads(file.read_text()) for file in scratch.glob("error.*")}
    codes |= {local_rank: error["code"] for local_rank, error in said.items()}
    if not codes:
        log = logs / "torchrun.log"
        return [Failure(f"torchrun on {_node(topology)}", _how(code), FAILED, 1, str(log), _last_lines([log]))]
    return [
        _failure(local_rank, topology, logs, code, said.get(local_rank, {}).get("message", ""))
        for local_rank, code in codes.items()
    ]


def leave_word(scratch: Path, local_rank: int, error: SlipwayError) -> None:
    """In a worker: leave the message of an error that it understands for the command that started it."""
    word = {"message": str(error), "code": error.exit_code}
    (scratch / f"error.{local_rank}").write_text(json.dumps(word))


def rank_logs(logs: Path, local_rank: int) -> list[Path]:
    """stdout.log and stderr.log of one process of this node, where torchrun puts them."""
    return sorted(logs.glob(f"*/attempt_0/{local_rank}/std*.log"))


def _failure(local_rank: int, topology: Topology, logs: Path, code: int, said: str) -> Failure:
    files = rank_logs(logs, local_rank)
    lines = [] if said else _last_lines(files)
    # Torchrun ends the other ranks by SIGTERM once one has failed, so that signal is no cause.
    blame = KILLED if code < 0 and -code != signal.SIGTERM else FAILED
    if blame == FAILED and (code == -signal.SIGTERM or PEER_IS_LOST.search("\n".join(lines))):
        blame = LOST_A_PEER
    rank = topology.node_rank * topology.processes_per_node + local_rank
    log = str(files[0].parent) if files else str(logs)
    return Failure(f"rank {rank} on {_node(topology)}", _how(code), blame, code, log, lines, said)


def _node(topology: Topology) -> str:
    return f"node {topology.node_rank} ({socket.gethostname()})"


def _how(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


def _last_lines(logs: list[Path]) -> list[str]:
    return [line for log in logs for line in _read(log).splitlines()[-LAST_LINES:]]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
