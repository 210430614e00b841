"""The two passes of cross_entropy.py over the logits, as kernels for a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program reads at once
WARPS = 8


@triton.jit
def _sums_kernel(logits, labels, largest, totals, of_labels, columns, BLOCK: tl.constexpr):
    """Of one row: its maximum, the sum of exp(logit - maximum), and the label's logit (0 if it is not in the row)."""
    row = tl.program_id(0).to(tl.int64)  # row * columns can exceed 32 bits
    top = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(logits + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(part))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(part - higher))
        top = higher
    label = tl.load(labels + row)
    here = (label >= 0) & (label < columns)
    tl.store(largest + row, top)
    tl.store(totals + row, total)
    tl.store(of_labels + row, tl.load(logits + row * columns + label, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, labels, log_sums, columns, BLOCK: tl.constexpr):
    """A block of one row: softmax(logits), less 1 at the label, in the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * columns + at
    part = tl.load(place, mask=at < columns, other=0.0)
    found = tl.exp(part.to(tl.float32) - tl.load(log_sums + row))
    found = tl.where(at == tl.load(labels + row), found - 1.0, found)
    tl.store(place, found.to(part.dtype), mask=at < columns)


def sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See cross_entropy._sums. Logits are contiguous [n, V] of any float type, labels int64 [n]."""
    largest, totals, of_labels = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3))
    if len(logits):
        _sums_kernel[(len(logits),)](
            logits, labels, largest, totals, of_labels, logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return largest, totals, of_labels


def to_gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor) -> None:
    """See cross_entropy._to_gradient_."""
    rows, columns = logits.shape
    if rows:
        grid = (rows, triton.cdiv(columns, BLOCK))
        _gradient_kernel[grid](logits, labels, log_sum, columns, BLOCK=BLOCK, num_warps=WARPS)
