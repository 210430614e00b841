"""Training samples, in an order that depends only on the seed.

Sample i of a run, and which of its easy tokens are dropped, is the same on every rank and in every layout. So a resumed
run continues exactly where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from slipway.tokens.blend import order
from slipway.tokens.scan import Sample, Units
from slipway.training.heads import EASY_TOKEN_DROP_RATE

PAD_ID = 0
ALIGNED = 128  # positions: kernels work on blocks, and each length is another plan for some of them


def share_of_samples(bounds: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """bool [T]: of each packed sample part `rank` and the one as far from its end, of 2 · ranks equal parts.

    Args:
        bounds: int32 [samples + 1], where each sample begins, and T; the samples are multiples of 2 · ranks long.
    """
    return ranks_of_positions(bounds, ranks) == rank


def ranks_of_positions(bounds: torch.Tensor, ranks: int) -> torch.Tensor:
    """int [T]: the rank that has each position of packed samples, see share_of_samples."""
    lengths = bounds.diff()
    total = int(bounds[-1])
    begins, sizes = (torch.repeat_interleave(of_each, lengths, output_size=total) for of_each in (bounds[:-1], lengths))
    part = (torch.arange(total, device=bounds.device) - begins) * (2 * ranks) // sizes
    return torch.minimum(part, 2 * ranks - 1 - part)


def computed_positions(longest: int, seq_length: int, ranks: int) -> int:
    """How many positions of its sequences a micro batch computes: its longest sample's, and what makes them even.

    Args:
        longest: positions of the longest sample.
        ranks: how many equal parts the positions are shared in.
    """
    step = math.lcm(ALIGNED, ranks)
    return min(seq_length, -(-longest // step) * step)


class Samples(Dataset):
    """`count` sequences from the units of files, of each file epoch by epoch, each epoch in a new order.

    Args:
        parts: the units of each file; a unit is the content of one sequence: one sample, or several that are packed.
        shares: the part of the sequences that is from each file; None = there is one.
        packed: also give `cu_seqlens`, the positions where the samples begin.
        joined: so many packed sequences, one behind the other, are one item. They are a micro batch, which packed
            samples can only be as one row.
        multiple: each packed sample takes a multiple of so many positions, the last of them padding, so that it can be
            shared in equal parts.
        learn_prompts: the loss counts the tokens of p_ids too.
        shuffled: False keeps the order of the file.
    """

    def __init__(
        self,
        parts: Sequence[Units],
        count: int,
        seq_length: int,
        seed: int,
        *,
        shares: list[float] | None = None,
        packed: bool = False,
        joined: int = 1,
        multiple: int = 1,
        learn_prompts: bool = False,
        shuffled: bool = True,
    ) -> None:
        self.parts, self.count, self.seq_length, self.seed = parts, count, seq_length, seed
        self.packed, self.multiple, self.learn_prompts, self.shuffled = packed, multiple, learn_prompts, shuffled
        self.joined = joined
        self._blend = order(shares, count) if shares and len(parts) > 1 else None
        self._epochs = [(-1, np.arange(len(units))) for units in parts]  # of each file: which one, and its order

    def __len__(self) -> int:
        return self.count // self.joined

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """tokens, labels, position_ids int64 [S]; loss_mask float32 [S]; drop_if_easy, is_real (no padding) bool [S];
        for packed samples also cu_seqlens int32 [samples + 1, and one more if there is padding], and S is joined ·
        seq_length."""
        sequences = [self._sequence(item * self.joined + place) for place in range(self.joined)]
        if self.joined == 1:
            return sequences[0]
        found = {key: torch.cat([one[key] for one in sequences]) for key in sequences[0] if key != "cu_seqlens"}
        bounds = [one["cu_seqlens"][:-1] + place * self.seq_length for place, one in enumerate(sequences)]
        end = torch.tensor([self.joined * self.seq_length], dtype=torch.int32)
        return found | {"cu_seqlens": torch.cat([*bounds, end])}

    def _sequence(self, number: int) -> dict[str, torch.Tensor]:
        part, unit = self.unit_of(number)
        found = self._join(self.parts[part][unit])
        # A generator that counts (Philox) has no state: sample `number` gets the same numbers without those before it.
        random = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        return found | {"drop_if_easy": torch.from_numpy(random.random(self.seq_length) < EASY_TOKEN_DROP_RATE)}

    def positions(self, number: int) -> int:
        """How many positions of sequence `number` of the run are no padding."""
        part, unit = self.unit_of(number)
        return self.parts[part].positions(unit)

    def unit_of(self, number: int) -> tuple[int, int]:
        """(file, unit in it) of sequence `number` of the run."""
        part = int(self._blend[0][number]) if self._blend else 0
        own = int(self._blend[1][number]) if self._blend else number
        size = len(self.parts[part])
        epoch, place = divmod(own, size)
        if not self.shuffled:
            return part, place
        known = self._epochs[part]  # another thread, which makes the next micro batch, can be in another epoch
        if epoch != known[0]:
            # The counter begins elsewhere than in __getitem__, whose keys can be the same, and for each file elsewhere.
            shuffle = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=(part + 1) << 64))
            known = self._epochs[part] = epoch, shuffle.permutation(size)
        return part, int(known[1][place])

    def _join(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        tokens = torch.full((self.seq_length,), PAD_ID, dtype=torch.int64)
        labels, positions, mask = tokens.clone(), torch.arange(self.seq_length), torch.zeros(self.seq_length)
        is_real = torch.zeros(self.seq_length, dtype=torch.bool)
        lengths = [len(prompt) + len(response) - 1 for prompt, response, _ in samples]
        bounds = [0, *accumulate(length + -length % self.multiple for length in lengths)]
        for (prompt, response, context), start, length in zip(samples, bounds[:-1], lengths, strict=True):
            end = start + length
            is_real[start:end] = True
            ids = torch.tensor(prompt + response, dtype=torch.int64)
            tokens[start:end], labels[start:end] = ids[:-1], ids[1:]
            # Position i predicts token i + 1: the last token of the prompt predicts the first one of the response.
            learned = 0 if self.learn_prompts else max(len(prompt) - 1, 0)
            mask[start + learned : end] = 1
            for first, last in () if self.learn_prompts else context:
                # A label stands one place before its token; a token at the very beginning is no label.
                mask[max(start, start + len(prompt) + first - 1) : start + len(prompt) + last - 1] = 0
            positions[start:end] = torch.arange(end - start)
        found = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "is_real": is_real}
        if self.packed:
            # Padding is a sample of its own, so that no token attends to it.
            rest = [self.seq_length] if bounds[-1] < self.seq_length else []
            found["cu_seqlens"] = torch.tensor(bounds + rest, dtype=torch.int32)
        return found
