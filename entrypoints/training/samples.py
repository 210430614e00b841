"""Training samples: JSON lines of tokens, read in place, in an order that depends on the seed alone.

Each line is `{"inputs": {"p_ids": [...], "r_ids": [...]}}`; the loss counts the tokens of r_ids. Only the
offsets of the lines are held, the file is mapped. Sample i of a run is the same on every rank and in every
layout, and which of its easy tokens are dropped as well, so a resumed run goes on exactly where it stopped.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from entrypoints.training.heads import EASY_TOKEN_DROP_RATE
from entrypoints.training.lines import Index, read_line

PAD_ID = 0


class Samples(Dataset):
    """`count` samples drawn from the file epoch by epoch, each epoch in a new order."""

    def __init__(self, path: Path, index: Index, count: int, seq_length: int, seed: int) -> None:
        self.path, self.index, self.count, self.seq_length, self.seed = path, index, count, seq_length, seed
        self._map: mmap.mmap | None = None
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, position_ids int64 [S]; loss_mask float32 [S]; drop_if_easy bool [S]."""
        line = self._line_of(number)
        prompt, response = read_line(self._read(line), f"{self.path} at byte {self.index.offsets[line]}")
        return self._pad(prompt, response, np.random.Generator(np.random.Philox(key=[self.seed, number])))

    def _line_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self.index.offsets))
        if epoch != self._epoch:
            shuffle = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=1 << 64))
            self._epoch, self._order = epoch, shuffle.permutation(len(self.index.offsets))
        return int(self._order[place])

    def _read(self, line: int) -> bytes:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.index.offsets[line])
        end = self._map.find(b"\n", start)
        return self._map[start : end if end >= 0 else len(self._map)]

    def _pad(self, prompt: list[int], response: list[int], random: np.random.Generator) -> dict[str, torch.Tensor]:
        ids = torch.tensor(prompt + response, dtype=torch.int64)
        length = len(ids) - 1
        tokens = torch.full((self.seq_length,), PAD_ID, dtype=torch.int64)
        labels, mask = tokens.clone(), torch.zeros(self.seq_length)
        tokens[:length], labels[:length] = ids[:-1], ids[1:]
        mask[max(len(prompt) - 1, 0) : length] = 1
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "position_ids": torch.arange(self.seq_length),
            "drop_if_easy": torch.from_numpy(random.random(self.seq_length) < EASY_TOKEN_DROP_RATE),
        }
