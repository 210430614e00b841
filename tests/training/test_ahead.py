"""The next micro batch is made while this one is computed, and is the one that would have been made later."""

from __future__ import annotations

import threading

import pytest
import torch
from slipway.training import cpu

cpu.enable()
from slipway.training.data import Ahead  # noqa: E402  Megatron needs it
from torch.utils.data import DataLoader, Dataset  # noqa: E402


class Numbers(Dataset):
    """Ten items; notes which thread made which, and can fail at one."""

    def __init__(self, failing: int = -1) -> None:
        self.failing = failing
        self.made: list[tuple[int, bool]] = []
        self.more = threading.Semaphore(0)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number == self.failing:
            raise ValueError(f"item {number}")
        self.made.append((number, threading.current_thread() is threading.main_thread()))
        self.more.release()
        return {"number": torch.tensor(number)}


BATCHES = [[3, 1], [4, 0], [5, 9]]


def test_the_batches_are_those_of_the_loader_in_its_order():
    found, wanted = (kind(Numbers(), batch_sampler=BATCHES) for kind in (Ahead, DataLoader))
    assert len(found) == len(wanted) == 3
    for _ in range(2):
        assert (
            [batch["number"].tolist() for batch in found] == [batch["number"].tolist() for batch in wanted] == BATCHES
        )


def test_the_next_batch_is_made_in_another_thread_before_it_is_asked_for():
    numbers = Numbers()
    batches = iter(Ahead(numbers, batch_sampler=BATCHES))
    assert next(batches)["number"].tolist() == [3, 1]
    for _ in range(4):
        assert numbers.more.acquire(timeout=60)
    assert numbers.made == [(3, False), (1, False), (4, False), (0, False)]
    batches.close()


def test_no_batch_draws_a_random_number():
    """A step seeds itself before its first batch is asked for, and draws what it drops afterwards."""
    batches = iter(Ahead(Numbers(), batch_sampler=BATCHES))
    before = torch.get_rng_state()
    assert len(list(batches)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_is_raised_where_its_batch_is_asked_for():
    batches = iter(Ahead(Numbers(failing=0), batch_sampler=BATCHES))
    assert next(batches)["number"].tolist() == [3, 1]
    with pytest.raises(ValueError, match="item 0"):
        next(batches)


def test_nothing_to_do_is_no_error():
    assert list(Ahead(Numbers(), batch_sampler=[])) == []
