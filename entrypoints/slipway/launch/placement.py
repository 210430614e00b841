"""The flags for the place of a command in the cluster. What is not given comes from the launcher (topology.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slipway.errors import UsageError
from slipway.options import check_group, option

MOST = 10**6  # nodes, or processes on one
LAST_PORT = 65534  # the port after the master's is used too


@dataclass(frozen=True)
class Placement:
    """Nodes, processes and the master's address; None is not given."""

    nodes: int | None = option(None, "number of nodes", low=1, high=MOST, otherwise="from the launcher, else 1")
    node_rank: int | None = option(None, "number of this node, from 0", low=0, high=MOST, otherwise="from the launcher")
    master_addr: str | None = option(
        None, "host name or IP address of node 0, without a port", otherwise="from the launcher"
    )
    master_port: int | None = option(
        None, "port on node 0; the next one is used too", low=1, high=LAST_PORT, otherwise="29500"
    )
    nproc_per_node: int | None = option(None, "processes per node", low=1, high=MOST, otherwise="one per GPU")
    run_token_file: str | None = option(
        None,
        "file with the secret by which the nodes of a run know each other, the same on all of them; nobody else may be "
        "able to read it",
        otherwise="a file that node 0 makes in --out",
    )

    def check(self) -> None:
        """UsageError for values that are wrong under any launcher."""
        check_group(self)
        address = self.master_addr
        if address is not None and (not address or re.fullmatch(r"[^:]*:\d+|\[.*\]:\d+|.*[\s/].*", address)):
            raise UsageError(
                f"--master-addr is {address!r}; it must be a host name or an IP address, without a port: "
                "give the port with --master-port"
            )


@dataclass(frozen=True)
class Patience:
    """How long a run waits: for its nodes at the start, for its workers at the end."""

    grace: float = option(600.0, "time for saving after a request to stop", unit="seconds", low=0, high=10**7)
    rendezvous_timeout: float = option(
        300.0, "time to wait for all nodes at the start", unit="seconds", above=0, high=10**7
    )

    def check(self) -> None:
        """UsageError for values out of range."""
        check_group(self)
