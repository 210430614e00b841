"""The heads' loss over a sequence, with gradients of the heads alone.

The base never sees a gradient: it runs forward only, and the loss takes its logits a chunk of tokens at a time, so that
no [tokens, vocabulary] tensor of the whole sequence exists in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from slipway.training.heads import DecodingHeads, Rows

CHUNK_TOKENS = 4096


def rows_of(logits: Tensor, labels: Tensor) -> Any:
    """`Rows`, or the same from counts where that is possible and much faster."""
    if logits.is_cuda and logits.dtype == torch.bfloat16:
        from slipway.training.counted import CountedRows

        return CountedRows(logits, labels)
    return Rows(logits, labels)


def heads_loss(
    heads: DecodingHeads,
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    labels: Tensor,
    counted: Tensor,
    drop_if_easy: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of the token losses, number of tokens counted); the sum carries gradients of the heads alone.

    Under tensor parallelism every rank of `group` gets the same of both, and the same gradients.

    Args:
        heads: the module to train.
        hidden: [tokens, H] last hidden states, no gradient.
        logits_of: [n, H] → [n, V] logits of the frozen base, or this rank's part of the vocabulary.
        labels: [tokens] int64.
        counted: [tokens] bool, the tokens that have a label to learn.
        drop_if_easy: [tokens] bool; such a token does not count where the base already ranks its label first.
        chunk_tokens: how many tokens' logits exist at once.
        group: the ranks that share the vocabulary, in its order; hidden and labels are the same on all of them.
    """
    parameters = tuple(heads.parameters())
    rows = counted.nonzero().squeeze(-1)
    chunks = rows.split(chunk_tokens)
    return _ChunkedLoss.apply(heads, hidden, logits_of, labels, drop_if_easy, chunks, group, *parameters)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist; the backward pass only scales them.

    With plain autograd the logits of all chunks would have to be kept, or made a second time.
    """

    @staticmethod
    def forward(ctx, heads, hidden, logits_of, labels, drop_if_easy, chunks, group, *parameters):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        count = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        names = [name for name, _ in heads.named_parameters()]
        for rows in chunks:
            logits, mine = _whole_vocabulary(logits_of(hidden[rows]), group)
            rows = rows[mine]  # each rank computes its share, and the sums are added up below
            tokens = rows_of(logits, labels[rows])
            keep = ~(drop_if_easy[rows] & tokens.is_easy)
            inputs = hidden[rows].float(), tokens.features
            with torch.enable_grad():  # autograd turns it off inside a Function
                leaves = [parameter.detach().float().requires_grad_() for parameter in parameters]
                outputs = torch.func.functional_call(heads, dict(zip(names, leaves, strict=True)), inputs)
                loss = (tokens.losses(*outputs) * keep).sum()
                parts = torch.autograd.grad(loss, leaves)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient += part
            total += loss.detach()
            count += keep.sum()
        if group is not None and group.size() > 1:
            for part in (total, count, *gradients):
                torch.distributed.all_reduce(part, group=group)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx, scale, _):
        gradients = [(scale * g).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (None,) * 7 + tuple(gradients)  # the arguments before the parameters have no gradient


def _whole_vocabulary(logits: Tensor, group: ProcessGroup | None) -> tuple[Tensor, slice]:
    """(logits over the whole vocabulary of this rank's share of the tokens, which share that is).

    Args:
        logits: [n, V / ranks], this rank's part of the vocabulary for all n tokens.
    """
    if group is None or group.size() == 1:
        return logits, slice(None)
    ranks, part = group.size(), logits.shape[1]
    shares = [len(share) for share in torch.arange(len(logits)).tensor_split(ranks)]
    mine, start = shares[group.rank()], sum(shares[: group.rank()])
    received = logits.new_empty(ranks * mine, part)
    torch.distributed.all_to_all_single(received, logits.contiguous(), [mine] * ranks, shares, group=group)
    return received.view(ranks, mine, part).transpose(0, 1).reshape(mine, ranks * part), slice(start, start + mine)
