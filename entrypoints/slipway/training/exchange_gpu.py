"""Tokens between GPUs of one node, each of which reads and writes the others' memory itself: see dispatch.py.

NCCL first brings every token here and then it is copied for each of its experts; back, what the experts made of a token
is added up and then sent. Here the copy for the experts reads the other GPU's memory, and the sum is written into it:
the way between the GPUs is gone while memory here is read and written, which takes longer. NCCL's exchange can be
hidden in no such way: beside it the products of the experts take longer by as much (docs/performance.md).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from slipway.untrusted import tell

COLUMNS = 1024  # of a token at once: 16 bytes for each of 128 threads
WAITS_MS = 30 * 60 * 1000  # for the others, after which a GPU gives up with an error: what Megatron gives NCCL


class Shared:
    """Memory of the GPUs of a group that each of them can read and write.

    A collective call. Errors: RuntimeError where a GPU cannot reach another one's memory.

    Args:
        tokens, width: of hidden states at most.
    """

    def __init__(self, group: ProcessGroup, tokens: int, width: int, dtype: torch.dtype) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        self.size, self.ranks, self.rank = tokens * width, group.size(), group.rank()
        # Before all, what this rank sends; then what each rank has made for this one.
        self._own = symmetric.empty((1 + self.ranks) * self.size, dtype=dtype, device=device)
        self._handle = symmetric.rendezvous(self._own, group)
        starts = self._handle.buffer_ptrs
        step = self.size * self._own.element_size()
        self.sent = torch.tensor(starts, dtype=torch.int64, device=device)
        self.made = torch.tensor([start + (1 + self.rank) * step for start in starts], device=device)
        # Since all have last waited for each other: others may read what was sent, this rank what was made for it.
        self._is_read = self._is_summed = False

    def holds(self, hidden: Tensor) -> bool:
        """Whether there is room for such hidden states of each rank."""
        return hidden.numel() <= self.size and hidden.dtype == self._own.dtype

    def send(self, hidden: Tensor) -> None:
        """Let all ranks read [tokens, width], until the next call of anything here."""
        if self._is_read:
            self.wait()
        self._own[: hidden.numel()].view(hidden.shape).copy_(hidden)
        self.wait()
        self._is_read = True

    def wait(self) -> None:
        """Until all ranks of the group are here, as far as the GPU is concerned."""
        self._handle.barrier(0, WAITS_MS)
        self._is_read = self._is_summed = False

    def begin_to_make(self) -> None:
        """Wait where others may still add up what this rank has made before."""
        if self._is_summed:
            self.wait()

    def summed(self, tokens: int, width: int) -> Tensor:
        """[tokens, width]: of what all ranks have made, once they have waited."""
        total = self._own.new_empty(tokens, width)
        _sum_kernel[(triton.cdiv(total.numel(), COLUMNS),)](
            self._own[self.size :], total, self.size, total.numel(), self.ranks, COLUMNS
        )
        self._is_summed = True
        return total


def share(group: ProcessGroup, hidden: Tensor, instead: Shared | None = None) -> Shared | None:
    """Memory for hidden states [tokens, H], as many on each rank; None, on all ranks, where they cannot share any.

    A collective call.

    Args:
        instead: what is not needed any more, which no rank may still read.
    """
    if not is_on_one_node(group):
        return None
    if instead is not None:
        instead.wait()
        torch.cuda.synchronize()
    why = ""
    try:
        shared = Shared(group, len(hidden), hidden.shape[1], hidden.dtype)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise  # of this rank alone: the others wait for it, and only its end ends them
        why = str(error).partition("\n")[0]
    failed = torch.tensor([bool(why)], dtype=torch.int32, device=hidden.device)
    torch.distributed.all_reduce(failed, group=group)
    if why:
        tell(f"worker: the GPUs do not reach each other's memory ({why}): NCCL brings the tokens to the experts")
    return None if failed.item() else shared


def is_on_one_node(group: ProcessGroup) -> bool:
    """Whether all ranks of the group were started by one launcher."""
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return len({rank // of_node for rank in torch.distributed.get_process_group_ranks(group)}) == 1


class Places:
    """Where the rows of the tokens of all ranks stand among those of this rank's experts.

    Args:
        rows: int32 [tokens of all ranks, 2 x experts + 1], as Transformer Engine's `make_row_id_map` makes it: of each
            token the rows, then their experts, and last the number of them.
        count: of all rows.
        tokens: of one rank.
    """

    def __init__(self, shared: Shared, rows: Tensor, count: int, tokens: int) -> None:
        self._shared, self._rows, self._count, self._tokens = shared, rows, count, tokens
        self._experts = rows.shape[1] // 2

    def spread(self, hidden: Tensor, probs: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(rows [count, H], the first expert's first, of the hidden states [tokens, H] of all ranks; of probabilities
        [tokens of all ranks, experts] those of the rows, [count])."""
        self._shared.send(hidden)
        width = hidden.shape[1]
        found = hidden.new_empty(self._count, width)
        of_rows = None if probs is None else probs.new_empty(self._count)
        _spread_kernel[self._grid(width)](
            *(self._shared.sent, found, self._rows, probs, of_rows, self._tokens, self._shared.rank),
            *(self._shared.ranks, width, self._experts, COLUMNS, probs is not None),
        )
        return found, of_rows

    def collect(self, rows: Tensor) -> Tensor:
        """[tokens, H]: of each token the sum of its rows [count, H] on all ranks."""
        width = rows.shape[1]
        self._shared.begin_to_make()
        _collect_kernel[self._grid(width)](
            *(rows.contiguous(), self._shared.made, self._rows, self._tokens, self._shared.rank),
            *(self._shared.ranks, width, self._experts, COLUMNS),
        )
        self._shared.wait()
        return self._shared.summed(self._tokens, width)

    def of_tokens(self, of_rows: Tensor) -> Tensor:
        """[tokens of all ranks, experts]: values of rows [count], else 0."""
        found = of_rows.new_zeros(len(self._rows), self._experts)
        _put_kernel[(len(self._rows),)](
            of_rows.contiguous(), found, self._rows, self._experts, triton.next_power_of_2(self._experts)
        )
        return found

    def _grid(self, width: int) -> tuple[int, int]:
        return len(self._rows), triton.cdiv(width, COLUMNS)


@triton.jit(do_not_specialize=["tokens", "rank"])
def _spread_kernel(
    sent,
    found,
    places,
    probs,
    of_rows,
    tokens,
    rank,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROBS: tl.constexpr,
):
    """A block of columns of one token, read once and written to the rows of all its experts."""
    # One rank's token after another's, so that reads from all of them are on their way all the time.
    source = (tl.program_id(0) + rank) % RANKS
    mine = (tl.program_id(0) // RANKS).to(tl.int64)
    token = source * tokens + mine
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    place = places + token * (2 * EXPERTS + 1)
    count = tl.load(place + 2 * EXPERTS)
    if count > 0:
        start = tl.load(sent + source).to(tl.pointer_type(found.dtype.element_ty))
        values = tl.load(start + mine * WIDTH + column, mask=inside)
        for number in range(count):
            row = tl.load(place + number).to(tl.int64)
            tl.store(found + row * WIDTH + column, values, mask=inside)
            if PROBS and tl.program_id(1) == 0:
                expert = tl.load(place + EXPERTS + number)
                tl.store(of_rows + row, tl.load(probs + token * EXPERTS + expert))


@triton.jit(do_not_specialize=["tokens", "rank"])
def _collect_kernel(
    rows,
    made,
    places,
    tokens,
    rank,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of columns of one token: the sum of its rows, written to the rank that the token belongs to."""
    target = (tl.program_id(0) + rank) % RANKS
    theirs = (tl.program_id(0) // RANKS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    place = places + (target * tokens + theirs) * (2 * EXPERTS + 1)
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for number in range(tl.load(place + 2 * EXPERTS)):
        row = tl.load(place + number).to(tl.int64)
        sums += tl.load(rows + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    start = tl.load(made + target).to(tl.pointer_type(rows.dtype.element_ty))
    tl.store(start + theirs * WIDTH + column, sums.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _put_kernel(of_rows, found, places, EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """The values of all rows of a token."""
    token = tl.program_id(0).to(tl.int64)
    place = places + token * (2 * EXPERTS + 1)
    number = tl.arange(0, WIDTH)
    there = number < tl.load(place + 2 * EXPERTS)
    row = tl.load(place + number, mask=there, other=0).to(tl.int64)
    expert = tl.load(place + EXPERTS + number, mask=there, other=0)
    tl.store(found + token * EXPERTS + expert, tl.load(of_rows + row, mask=there), mask=there)


@triton.jit
def _sum_kernel(parts, total, step, count, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each value its parts, which lie `step` apart."""
    number = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = number < count
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for _ in tl.static_range(RANKS):
        sums += tl.load(parts + number, mask=inside, other=0.0).to(tl.float32)
        parts += step
    tl.store(total + number, sums.to(total.dtype.element_ty), mask=inside)
