"""The network that NCCL takes: the library for InfiniBand that it opens, and what its log says it chose."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

VERBS = "libibverbs.so.1"


def verbs_devices(library: str = VERBS) -> int | None:
    """The RDMA devices that libibverbs sees, as NCCL would; None where the library cannot be opened.

    A device counts only if the library has a driver for it.
    """
    try:
        verbs = ctypes.CDLL(library)
    except OSError:
        return None
    count = ctypes.c_int(0)
    verbs.ibv_get_device_list.restype = ctypes.c_void_p
    found = verbs.ibv_get_device_list(ctypes.byref(count))
    if found:
        verbs.ibv_free_device_list(ctypes.c_void_p(found))
    return count.value


def device_files(folder: Path = Path("/dev/infiniband")) -> int:
    """How many devices this process could open: each has a file uverbsN."""
    return sum(os.access(file, os.R_OK | os.W_OK) for file in folder.glob("uverbs*"))


def chosen_transport(log: str) -> str:
    """What NCCL says in its log (NCCL_DEBUG=INFO): the network between nodes, and how ranks of a node exchange data.

    For example "network IB, inside a node P2P". Empty if the log says neither.
    """
    networks = re.findall(r"(?m)Using network (.+?)\s*$", log)
    inside = sorted(set(re.findall(r" via (P2P|SHM)/", log)))
    words = [f"network {networks[-1]}"] if networks else []
    return ", ".join([*words, *([f"inside a node {' and '.join(inside)}"] if inside else [])])


def is_tcp(transport: str) -> bool:
    """Did NCCL take TCP between nodes?"""
    return "network Socket" in transport
