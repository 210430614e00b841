"""A CUDA graph's behaviour on the CPU: what a block computes is noted, and done again in the same memory.

What Python does in the block is not done again, as with a graph. Unlike there, the block itself computes as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Tape(TorchDispatchMode):
    """The operations of a block, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        found = operation(*arguments, **(options or {}))
        # As memory: what is written there later is nothing to autograd.
        self._noted.append(
            (operation, *tree_map_only(torch.Tensor, lambda one: one.data, (arguments, options or {}, found)))
        )
        return found

    @torch.no_grad()
    def replay(self) -> None:
        """Compute again from what the arguments are now."""
        for operation, arguments, options, found in self._noted:
            again = operation(*arguments, **options)
            for one, other in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(one, torch.Tensor) and one.data_ptr() != other.data_ptr():
                    one.copy_(other)


@contextlib.contextmanager
def recording(pool: Any) -> Iterator[Tape]:
    """In the place of `slipway.training.recording.recording`."""
    with Tape() as tape:
        yield tape
