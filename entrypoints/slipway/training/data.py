"""The samples in the form that NeMo needs: a data module that resumes at the right sample."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch import Tensor
from torch.utils.data import DataLoader

from slipway.training.samples import Samples


class Ahead(DataLoader):
    """Makes the next micro batch in another thread while this one is computed; a GPU waited 10 to 20 ms for it."""

    def __iter__(self) -> Iterator[Any]:
        # Now, and not with the first batch: torch draws a random number here, which would be one of the first step's.
        return _ahead(super().__iter__())


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(1, initializer=_use, initargs=(device,)) as thread:
        coming = thread.submit(_next, batches)
        while (batch := coming.result()) is not None:
            coming = thread.submit(_next, batches)
            yield batch


def _use(device: int | None) -> None:
    """Pin memory for this GPU, not for the first one of the machine."""
    if device is not None:
        torch.cuda.set_device(device)


def _next(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """The next micro batch, in memory that a GPU reads while the processor goes on; None after the last."""
    batch = next(batches, None)
    if batch is None or not torch.cuda.is_available():
        return batch
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


class Sampler(MegatronDataSampler):
    """Megatron's, over `Ahead`."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The micro batches of this rank."""
        found = super().transform_dataloader(dataloader, consumed_samples)
        return Ahead(found.dataset, batch_sampler=found.batch_sampler, collate_fn=found.collate_fn)


class TokenData(LightningDataModule):
    """NeMo's data module over `Samples`. It keeps the number of consumed samples in the checkpoint.

    Args:
        samples: for training.
        held_out: for evaluations, whole global batches; None = there are no evaluations.
        micro_batch_size: sequences; where samples join as many in one item, an item is a micro batch.
        global_batch_size: sequences.
    """

    def __init__(
        self, samples: Samples, held_out: Samples | None, micro_batch_size: int, global_batch_size: int
    ) -> None:
        super().__init__()
        self.samples, self.held_out, self.seq_length = samples, held_out, samples.joined * samples.seq_length
        self.micro_batch_size = micro_batch_size // samples.joined
        self.global_batch_size = global_batch_size // samples.joined
        self.data_sampler = Sampler(
            seq_len=self.seq_length, micro_batch_size=self.micro_batch_size, global_batch_size=self.global_batch_size
        )

    def train_dataloader(self) -> WrappedDataLoader:
        # Samples are counted from this step on. The checkpoint has the number of those before it.
        self.data_sampler.init_global_step = self.trainer.global_step
        return WrappedDataLoader(mode="train", dataset=self.samples, num_workers=0)

    def val_dataloader(self) -> WrappedDataLoader | list:
        if self.held_out is None:
            return []
        return WrappedDataLoader(mode="validation", dataset=self.held_out, num_workers=0)

    def state_dict(self) -> dict[str, int]:
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        # Sequences, so that a run can go on with another micro batch.
        return {"consumed_samples": self.samples.joined * self.data_sampler.compute_consumed_samples(steps)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        consumed = state["consumed_samples"] // self.samples.joined
        # What NeMo's own data modules do here; without it the sampler would start at the first sample again.
        self.data_sampler.init_consumed_samples = self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)
