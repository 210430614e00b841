"""A check on several GPUs, a process for each."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import torch
from torch import distributed, multiprocessing


def check(wrong_on: Callable[[int], int], ranks: int) -> None:
    """Run a function on every rank, with a group of NCCL, and end with 1 if one says that something is wrong.

    Args:
        wrong_on: rank → how much is not what it should be.
    """
    if (found := torch.cuda.device_count()) < max(2, ranks):
        print(f"not run: {max(2, ranks)} GPUs are needed, {found} found")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_one, (wrong_on, ranks, port), nprocs=ranks)


def _one(rank: int, wrong_on: Callable[[int], int], ranks: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    wrong = wrong_on(rank)
    distributed.destroy_process_group()
    sys.exit(int(wrong > 0))
