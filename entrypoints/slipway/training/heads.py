"""The temperature and top-p heads: what they compute, their loss, and how they sit on a frozen NeMo model.

After "The End of Manual Decoding" (AutoDeco). With `h` the last hidden state after the final norm and `l` the
frozen model's logits, per token:

    T = 2·sigmoid(mlp(h))                         temperature, in (0, 2)
    P = sigmoid(mlp([h, T, features(l / T)]))     top-p, in (0, 1)

The base never sees a gradient: it runs forward only, and the loss takes its logits a chunk of tokens at a time,
so that no [tokens, vocabulary] tensor of the whole sequence exists in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

HIDDEN_UNITS = 256
EASY_TOKEN_DROP_RATE = 0.6
TOP_P_SHARPNESS = 30.0
EPSILON_TEMPERATURE = 1e-8
EPSILON_MASS = 1e-9
CHUNK_TOKENS = 1024
DISTRIBUTION_FEATURES = 4


class Head(nn.Module):
    """Linear, ReLU, Linear, sigmoid: [..., inputs] → [...] in (0, 1)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, HIDDEN_UNITS), nn.ReLU(), nn.Linear(HIDDEN_UNITS, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sigmoid(self.mlp(inputs)).squeeze(-1)


class DecodingHeads(nn.Module):
    """Both heads for a model of `hidden_size`; their parameters carry the names of the Hugging Face form.

    Args:
        hidden_size: width of the base model's last hidden state.
        use_enhanced_features: give the top-p head maximum, entropy, variance and top-5 mass of softmax(l / T).
    """

    def __init__(self, hidden_size: int, use_enhanced_features: bool = True) -> None:
        super().__init__()
        self.use_enhanced_features = use_enhanced_features
        self.temp_head = Head(hidden_size)
        self.top_p_head = Head(hidden_size + 1 + (DISTRIBUTION_FEATURES if use_enhanced_features else 0))

    def forward(self, hidden: Tensor, features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Temperature and top-p, each [tokens], from hidden [tokens, H], all float32.

        Args:
            features: temperature → [tokens, 4], see distribution_features.
        """
        temperature = 2 * self.temp_head(hidden)
        inputs = [hidden, temperature.unsqueeze(-1)]
        if self.use_enhanced_features:
            inputs.append(features(temperature))
        return temperature, self.top_p_head(torch.cat(inputs, dim=-1))


def distribution_features(logits: Tensor, temperature: Tensor) -> Tensor:
    """[tokens, 4]: maximum, entropy (nats), unbiased variance and top-5 mass of softmax(logits / temperature)."""
    log_p = F.log_softmax(logits / (temperature.unsqueeze(-1) + EPSILON_TEMPERATURE), dim=-1)
    p = log_p.exp()
    top = p.topk(5, dim=-1).values
    return torch.stack([top[..., 0], -(p * log_p).sum(-1), p.var(dim=-1), top.sum(-1)], dim=-1)


def token_losses(temperature: Tensor, top_p: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Temperature loss plus top-p loss of each token, [tokens].

    Args:
        temperature, top_p: [tokens] float32, what the heads say.
        logits: [tokens, V] float32, from the frozen base.
        labels: [tokens] int64, the next token.
    """
    labels = labels.unsqueeze(-1)
    log_p = F.log_softmax(logits / temperature.unsqueeze(-1), dim=-1)
    log_p_label = log_p.gather(-1, labels).squeeze(-1)
    temperature_loss = -log_p_label.exp().detach() * log_p_label

    sorted_p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    beyond = torch.relu(sorted_p.cumsum(-1) - top_p.unsqueeze(-1))
    kept = sorted_p * torch.exp(-TOP_P_SHARPNESS * beyond)
    q_label = (kept * (order == labels)).sum(-1) / (kept.sum(-1) + EPSILON_MASS)
    confidence = F.log_softmax(logits, dim=-1).gather(-1, labels).squeeze(-1).exp()
    return temperature_loss - confidence * torch.log(q_label + EPSILON_MASS)


class Rows:
    """Some tokens' logits, and what the heads and their loss ask of them, as it is defined.

    Args:
        logits: [tokens, V] from the frozen base.
        labels: [tokens] int64, the next token.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits.float(), labels
        self.is_easy = self.logits.argmax(-1) == labels

    def features(self, temperature: Tensor) -> Tensor:
        """[tokens, 4]: see distribution_features."""
        return distribution_features(self.logits, temperature)

    def losses(self, temperature: Tensor, top_p: Tensor) -> Tensor:
        """[tokens]: see token_losses."""
        return token_losses(temperature, top_p, self.logits, self.labels)


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
    """Computes the gradients along with the loss, so that a chunk's logits are made once and dropped at once."""

    @staticmethod
    def forward(ctx, heads, hidden, logits_of, labels, drop_if_easy, chunks, group, *parameters):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        count = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        names = [name for name, _ in heads.named_parameters()]
        for rows in chunks:
            logits, mine = _whole_vocabulary(logits_of(hidden[rows]), group)
            rows = rows[mine]
            tokens = rows_of(logits, labels[rows])
            keep = ~(drop_if_easy[rows] & tokens.is_easy)
            inputs = hidden[rows].float(), tokens.features
            with torch.enable_grad():
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
        return (None,) * 7 + tuple(gradients)


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
