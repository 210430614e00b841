"""What is looked for in the weights before a step and after the last: any other bit, and what is no number."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def callbacks():
    from slipway.training import cpu

    cpu.enable()
    from slipway.training import callbacks

    return callbacks


def _module(*weights: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for number, weight in enumerate(weights):
        module.register_buffer(f"w{number}", weight)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("count", [1, 7, 8, 13])
def test_every_bit_counts(callbacks, dtype, count):
    weight = torch.arange(1, 1 + count).to(dtype)
    before = callbacks.checksum(_module(weight))
    stored = weight.view(torch.uint8)
    for place in range(len(stored)):
        for bit in range(8):
            stored[place] ^= 1 << bit
            assert callbacks.checksum(_module(weight)) != before, (place, bit)
            stored[place] ^= 1 << bit
    assert callbacks.checksum(_module(weight)) == before


def test_the_place_in_memory_does_not_count_and_an_adapter_does_not(callbacks):
    larger = torch.randn(40, dtype=torch.bfloat16)
    part = larger[3:20]
    assert part.storage_offset() % 4, "the part begins where an integer of 64 bits does"
    alone = _module(part.clone())
    assert callbacks.checksum(_module(part)) == callbacks.checksum(alone)
    alone.adapter = _module(torch.ones(2))
    with_adapter = torch.nn.Module()
    with_adapter.inner = alone
    plain = torch.nn.Module()
    plain.inner = _module(part)
    assert callbacks.checksum(with_adapter) == callbacks.checksum(plain)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_the_first_weight_that_is_no_number_is_named(callbacks, wrong):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[0].weight.data[:] = torch.finfo(torch.float32).max  # whose sum is infinite
    assert callbacks.first_not_finite(module) == ""
    module[1].bias.data[2] = module[2].weight.data[0, 0] = wrong
    assert callbacks.first_not_finite(module) == "1.bias"
    assert callbacks.first_not_finite(torch.nn.Module()) == ""
