"""The temperature and top-p heads, and the definition of their loss.

After "The End of Manual Decoding" (AutoDeco). With `h` the last hidden state after the final norm and `l` the
frozen model's logits, per token:

    T = 2·sigmoid(mlp(h))                         temperature, in (0, 2)
    P = sigmoid(mlp([h, T, features(l / T)]))     top-p, in (0, 1)

`Rows` is the definition, and what runs on the CPU. counted.py computes the same on a GPU without sorting, heads_loss.py
takes either of them over a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN_UNITS = 256
EASY_TOKEN_DROP_RATE = 0.6
TOP_P_SHARPNESS = 30.0
EPSILON_TEMPERATURE = 1e-8
EPSILON_MASS = 1e-9
DISTRIBUTION_FEATURES = 4


class Head(nn.Module):
    """Linear, ReLU, Linear, sigmoid: [..., inputs] → [...] in (0, 1)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, HIDDEN_UNITS), nn.ReLU(), nn.Linear(HIDDEN_UNITS, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sigmoid(self.mlp(inputs)).squeeze(-1)


class DecodingHeads(nn.Module):
    """Both heads for a model of `hidden_size`. Their parameters have the names of the Hugging Face form.

    Args:
        hidden_size: width of the base model's last hidden state.
        use_enhanced_features: the top-p head also gets maximum, entropy, variance and top-5 mass of softmax(l / T).
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
        temperature, top_p: [tokens] float32, from the heads.
        logits: [tokens, V] float32, from the frozen base.
        labels: [tokens] int64, the next token.
    """
    labels = labels.unsqueeze(-1)
    log_p = F.log_softmax(logits / temperature.unsqueeze(-1), dim=-1)
    log_p_label = log_p.gather(-1, labels).squeeze(-1)
    # The probability is a weight: tokens that the base finds unlikely teach little. It must not have a gradient, or a
    # smaller weight would be an easy way to a smaller loss.
    temperature_loss = -log_p_label.exp().detach() * log_p_label

    # Top-p keeps the first tokens in this order until their mass is P, which has no derivative. Here the tokens beyond
    # P fade out instead, the faster the larger TOP_P_SHARPNESS is.
    sorted_p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    beyond = torch.relu(sorted_p.cumsum(-1) - top_p.unsqueeze(-1))
    kept = sorted_p * torch.exp(-TOP_P_SHARPNESS * beyond)
    q_label = (kept * (order == labels)).sum(-1) / (kept.sum(-1) + EPSILON_MASS)
    confidence = F.log_softmax(logits, dim=-1).gather(-1, labels).squeeze(-1).exp()
    return temperature_loss - confidence * torch.log(q_label + EPSILON_MASS)


class Rows:
    """The logits of some tokens, and all that the heads and their loss need of them, by the definition.

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
