"""The cross entropy of a language model, with the output layer inside it.

Logits exist for some tokens at a time and turn into their own gradient where they lie. So a frozen output layer needs
no [tokens, vocabulary] tensor, and no product is made of three dimensions: with one sequence in a micro batch
Megatron's gradient of the logits has strides that make torch multiply row by row, which takes 200 times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """The sum of the tokens' cross entropies in nats, float32, with gradients of `hidden` and `weight`.

    Under tensor parallelism every rank of `group` gets the same sum. The gradient of `hidden` is then this rank's part,
    which is to be added up over the group, as Megatron does where it hands `hidden` to the group.

    Args:
        hidden: [tokens, H], the inputs of the output layer.
        weight: [V, H], or this rank's rows of it: part `group.rank()` of the vocabulary.
        labels: int64 [tokens], the next token of each.
        group: the ranks that share the vocabulary, in its order; None = one has it all.
        chunk_tokens: how many tokens' logits exist at once. Where the weight is trained they all do, so that its
            gradient is rounded once.
    """
    learns = torch.is_grad_enabled()  # inside a Function it is always off
    return _LinearCrossEntropy.apply(hidden, weight, labels, group, chunk_tokens, learns)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, group, chunk_tokens, learns):
        needs_hidden, needs_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        at_once = max(len(hidden), 1) if needs_weight else chunk_tokens
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            logits = hidden[part] @ weight.t()
            total += _losses_(logits, labels[part], group, needs_hidden or needs_weight).sum()
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[part])
            if of_weight is not None:
                torch.mm(logits.t(), hidden[part], out=of_weight)
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx, scale):
        of_hidden, of_weight = (None if part is None else part * scale.to(part.dtype) for part in ctx.saved_tensors)
        return of_hidden, of_weight, None, None, None, None


def _losses_(logits: Tensor, labels: Tensor, group: ProcessGroup | None, gradient: bool) -> Tensor:
    """float32 [n]: the cross entropies; with `gradient` the logits become their derivatives by the logits.

    Args:
        logits: [n, V] or this rank's part of the vocabulary, contiguous.
        labels: int64 [n].
    """
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    labels = labels - rank * logits.shape[1]  # of a label on another rank this is no column here
    if logits.is_cuda:
        from slipway.training import cross_entropy_gpu as kernels

        largest, total, of_label = kernels.sums(logits, labels)
    else:
        largest, total, of_label = _sums(logits, labels)
    if ranks > 1:
        over_all = largest.clone()
        all_reduce(over_all, op=ReduceOp.MAX, group=group)
        both = torch.stack([total * (largest - over_all).exp(), of_label])
        all_reduce(both, group=group)
        largest, total, of_label = over_all, both[0], both[1]
    log_sum = largest + total.log()
    if gradient and logits.is_cuda:
        kernels.to_gradient_(logits, labels, log_sum)
    elif gradient:
        _to_gradient_(logits, labels, log_sum)
    return log_sum - of_label


def _sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n] each: the largest logit, the sum of exp(logit - largest), and the label's logit, 0 if not here."""
    logits = logits.float()
    largest = logits.max(-1).values
    total = (logits - largest[:, None]).exp().sum(-1)
    here = _is_here(logits, labels)
    of_label = logits.gather(1, labels.where(here, 0)[:, None])[:, 0]
    return largest, total, of_label.where(here, 0)


def _to_gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor) -> None:
    """Replace logits by softmax(logits), less 1 at the label."""
    here = _is_here(logits, labels)
    probabilities = (logits.float() - log_sum[:, None]).exp()
    probabilities.scatter_add_(1, labels.where(here, 0)[:, None], -here.float()[:, None])
    logits.copy_(probabilities)


def _is_here(logits: Tensor, labels: Tensor) -> Tensor:
    return (labels >= 0) & (labels < logits.shape[1])
