"""The heads' loss on a GPU without a sort, and without a [tokens, vocabulary] tensor in float32.

Logits in bfloat16 take few values, and tokens with the same logit have the same probability. So it is enough to know
how often each value occurs in a row: the moments, the five largest probabilities and the sums in descending order
follow from that. Within a run of equal tokens a sum is a geometric series. One pass over the logits counts. The kernels
after it work on VALUES counts instead of the vocabulary, and compute the derivatives by T and P along with the values.

Logits smaller than 2^-18 in size count as 2^-18, which changes a probability by less than 1e-5 of it. Equal logits are
in the order of the vocabulary, as a stable sort would leave them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipway.training.counting import INFINITE, SMALLEST, VALUES, count
from slipway.training.heads import EPSILON_MASS, EPSILON_TEMPERATURE, TOP_P_SHARPNESS


@triton.jit
def _value(place, HALF: tl.constexpr, SMALLEST: tl.constexpr):
    """The float32 at a place."""
    size = tl.where(place < HALF, HALF - 1 - place, place - HALF) + SMALLEST
    # A bfloat16 is the upper half of a float32.
    value = (size << 16).to(tl.float32, bitcast=True)
    return tl.where(place < HALF, value, -value)


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation near zero."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1)


@triton.jit
def _softmax(counts, temperature, row, VALUES: tl.constexpr, SMALLEST: tl.constexpr):
    """Of one row, all [VALUES]: how often each value occurs, its log probability (0 where none), its probability."""
    place = tl.arange(0, VALUES)
    n = tl.load(counts + row * VALUES + place).to(tl.float32)
    z = _value(place, VALUES // 2, SMALLEST) / temperature
    # As in every softmax the largest exponent is made 0, so that exp() cannot overflow.
    z -= tl.max(tl.where(n > 0, z, float("-inf")))
    z = tl.where(n > 0, z, float("-inf"))
    log_p = z - tl.log(tl.sum(n * tl.exp(z)))
    p = tl.exp(log_p)
    log_p = tl.where(n > 0, log_p, 0.0)  # -inf times a count of 0 would be NaN in the sums
    return n, log_p, p


@triton.jit
def _features_kernel(
    counts, temperatures, features, slopes, vocabulary, EPSILON: tl.constexpr,
    VALUES: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Maximum, entropy, unbiased variance, top-5 mass; and each one's derivative by T."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row) + EPSILON
    n, log_p, p = _softmax(counts, temperature, row, VALUES, SMALLEST)
    mean = tl.sum(n * p * log_p)
    growth = (mean - log_p) / temperature  # d log p / d T, from log p = z / T - log(sum(exp(z / T)))
    rest = p - 1.0 / vocabulary  # the mean of all probabilities is 1 / vocabulary
    before = tl.cumsum(n) - n
    # How many of the tokens with this value are among the first five, and whether one is the first.
    in_top = tl.minimum(n, tl.maximum(5 - before, 0.0))
    is_top = tl.minimum(n, tl.maximum(1 - before, 0.0))
    at = row * 4
    tl.store(features + at, tl.sum(is_top * p))
    tl.store(features + at + 1, -mean)
    tl.store(features + at + 2, tl.sum(n * rest * rest) / (vocabulary - 1))
    tl.store(features + at + 3, tl.sum(in_top * p))
    tl.store(slopes + at, tl.sum(is_top * p * growth))
    # The entropy's derivative is the variance of log p, divided by T.
    tl.store(slopes + at + 1, tl.sum(n * p * (mean - log_p) * (mean - log_p)) / temperature)
    tl.store(slopes + at + 2, 2 * tl.sum(n * rest * p * growth) / (vocabulary - 1))
    tl.store(slopes + at + 3, tl.sum(in_top * p * growth))


@triton.jit
def _losses_kernel(
    counts, temperatures, top_ps, label_places, label_ranks, losses, by_temperature, by_top_p,
    SHARPNESS: tl.constexpr, EPSILON: tl.constexpr, VALUES: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """A token's loss and its derivatives by T and P."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_p = tl.load(top_ps + row)
    label = tl.load(label_places + row)
    rank = tl.load(label_ranks + row).to(tl.float32)
    place = tl.arange(0, VALUES)
    is_label = place == label

    # The weight of the top-p loss: how sure the base itself is of the label, at T = 1. It has no derivative by T or P.
    _, log_p_as_is, _ = _softmax(counts, 1.0, row, VALUES, SMALLEST)
    confidence = tl.exp(tl.sum(tl.where(is_label, log_p_as_is, 0.0)))

    n, log_p, p = _softmax(counts, temperature, row, VALUES, SMALLEST)
    mass = n * p
    growth = tl.where(n > 0, (tl.sum(mass * log_p) - log_p) / temperature, 0.0)  # d log p / d T
    before = tl.cumsum(mass) - mass
    before_growth = tl.cumsum(mass * growth) - mass * growth

    # token_losses gives each token of the sorted row the weight p * exp(-SHARPNESS * max(0, mass - P)), where `mass` is
    # summed up to the token. Of n equal tokens the first `whole` do not exceed P and are kept as they are. The `left`
    # others have weights that fall from one to the next by exp(-fall): `first` is the first of them, and their sum is
    # first * (1 + e + e^2 + ...) with e = exp(-fall).
    whole = tl.minimum(tl.maximum(tl.floor((top_p - before) / tl.maximum(p, 1e-37)), 0.0), n)
    left = n - whole
    fall = SHARPNESS * p
    first = p * tl.exp(tl.minimum(-SHARPNESS * (before + (whole + 1) * p - top_p), 0.0))
    # series = 1 + e + ... + e^(left - 1) and steps = 1 + 2e + ... + left * e^(left - 1). The closed forms are 0 / 0 for
    # small `fall`, so there the first terms of their power series are used.
    is_short = fall * left < 1e-2
    rate = tl.where(is_short, 1.0, -_expm1(-fall))
    series = tl.where(
        is_short,
        left - fall * left * (left - 1) / 2 + fall * fall * left * (left - 1) * (2 * left - 1) / 12,
        -_expm1(-fall * left) / rate,
    )
    steps = tl.where(
        is_short,
        left * (left + 1) / 2 - fall * (left - 1) * left * (left + 1) / 3,
        (series - left * tl.exp(-fall * left)) / rate,
    )
    cut = first * series
    kept = whole * p + cut
    total = tl.sum(kept) + EPSILON
    total_by_p = SHARPNESS * tl.sum(cut)
    # The k-th of the `left` tokens exceeds P by before + (whole + k) * p - P. `moved` sums what T changes of it, times
    # the weights: the mass before the run, and the tokens of the run itself.
    moved = before_growth * cut + growth * p * first * (whole * series + steps)
    total_by_t = tl.sum(growth * kept - SHARPNESS * moved)

    # The same for the label alone, whose place within its run is `rank`. A masked sum reads one element of a vector.
    log_p_label = tl.sum(tl.where(is_label, log_p, 0.0))
    p_label = tl.exp(log_p_label)
    growth_label = tl.sum(tl.where(is_label, growth, 0.0))
    beyond = tl.sum(tl.where(is_label, before, 0.0)) + rank * p_label - top_p
    beyond_growth = tl.sum(tl.where(is_label, before_growth, 0.0)) + rank * p_label * growth_label
    is_beyond = (beyond > 0).to(tl.float32)
    label_kept = p_label * tl.exp(-SHARPNESS * tl.maximum(beyond, 0.0))
    label_by_p = SHARPNESS * is_beyond * label_kept
    label_by_t = label_kept * (growth_label - SHARPNESS * is_beyond * beyond_growth)

    # loss = -p.detach() * log p - confidence * log(q + EPSILON), with q = label_kept / total.
    q = label_kept / total
    scale = confidence / (q + EPSILON) / total
    tl.store(losses + row, -p_label * log_p_label - confidence * tl.log(q + EPSILON))
    tl.store(by_temperature + row, -p_label * growth_label - scale * (label_by_t - q * total_by_t))
    tl.store(by_top_p + row, -scale * (label_by_p - q * total_by_p))


class CountedRows:
    """The same as `heads.Rows`, computed from counts.

    Args:
        logits: [tokens, V] bfloat16.
        labels: [tokens] int64, the next token.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.vocabulary = logits.shape[1]
        found = count(logits, labels)
        self.counts, self.label_places, self.label_ranks = found.counts, found.places, found.ranks
        self.is_easy, self.is_finite = found.is_first, found.largest < INFINITE

    def features(self, temperature: Tensor) -> Tensor:
        """[tokens, 4]: see heads.distribution_features."""
        return _Features.apply(temperature, self)

    def losses(self, temperature: Tensor, top_p: Tensor) -> Tensor:
        """[tokens]: see heads.token_losses; NaN where a logit is infinite or NaN."""
        return _Losses.apply(temperature, top_p, self).where(self.is_finite, float("nan"))


class _Features(torch.autograd.Function):
    """The forward kernel computes the derivatives too, so the backward pass is one product."""

    @staticmethod
    def forward(ctx, temperature: Tensor, rows: CountedRows) -> Tensor:
        tokens = len(temperature)
        features, slopes = temperature.new_empty(2, tokens, 4).unbind()
        if tokens:
            _features_kernel[(tokens,)](
                rows.counts, temperature.contiguous(), features, slopes, rows.vocabulary, EPSILON_TEMPERATURE,
                VALUES, SMALLEST, num_warps=16,
            )  # fmt: skip
        ctx.save_for_backward(slopes)
        return features

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return (gradient * ctx.saved_tensors[0]).sum(-1), None


class _Losses(torch.autograd.Function):
    """As _Features. A token's loss depends on its own T and P only, so both derivatives are vectors."""

    @staticmethod
    def forward(ctx, temperature: Tensor, top_p: Tensor, rows: CountedRows) -> Tensor:
        tokens = len(temperature)
        losses, by_temperature, by_top_p = temperature.new_empty(3, tokens).unbind()
        if tokens:
            _losses_kernel[(tokens,)](
                rows.counts, temperature.contiguous(), top_p.contiguous(), rows.label_places, rows.label_ranks,
                losses, by_temperature, by_top_p, TOP_P_SHARPNESS, EPSILON_MASS, VALUES, SMALLEST, num_warps=16,
            )  # fmt: skip
        ctx.save_for_backward(by_temperature, by_top_p)
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor):
        by_temperature, by_top_p = ctx.saved_tensors
        return gradient * by_temperature, gradient * by_top_p, None
