"""Bits of tensors: the memory that pieces share, rounding, and parts of tensors, each against its definition."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from slipway.tensors import bits
from slipway.tensors.refs import DTYPE_BYTES, TORCH_NAMES, Ref, TensorInfo


def place(part: np.ndarray) -> int:
    return part.__array_interface__["data"][0]


def test_arrays_of_a_piece_lie_apart_in_memory_that_the_next_piece_uses_again():
    with bits.piece():
        first = [bits.empty((3,), np.uint8), bits.empty((5, 7), np.uint16), bits.empty((64,), np.uint8)]
        last = bits.empty((2,), np.uint64)
    start = place(first[0])
    assert [place(part) - start for part in (*first, last)] == [0, 64, 192, 256]
    assert [part.shape for part in first] == [(3,), (5, 7), (64,)] and first[1].dtype == np.uint16
    with bits.piece():
        assert place(bits.empty((9,), np.uint32)) == start
    assert place(bits.empty((3,), np.uint8)) != start, "outside a piece an array keeps its memory"


def test_what_does_not_fit_is_taken_elsewhere(monkeypatch):
    with bits.piece():
        start = place(bits.empty((1,), np.uint8))
    monkeypatch.setattr(bits, "REGION_BYTES", 256)
    with bits.piece():
        assert place(bits.empty((192,), np.uint8)) == start
        assert not start <= place(bits.empty((65,), np.uint8)) < start + bits.REGION_BYTES
        assert place(bits.empty((64,), np.uint8)) == start + 192
        assert not start <= place(bits.empty((1,), np.uint8)) < start + bits.REGION_BYTES


def test_an_address_is_where_the_memory_is():
    memory = ctypes.create_string_buffer(100)
    assert bits.address(memoryview(memory)[7:]) == ctypes.addressof(memory) + 7


@pytest.mark.parametrize("upper", range(0, 1 << 16, 1 << 12))
def test_rounding_to_bfloat16_is_torchs(upper):
    """Values just below, at and above the middle of two neighbours, of every size; NaN has one form."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    wide = ((np.arange(upper, upper + (1 << 12), dtype=np.uint32)[:, None] << 16) | low).reshape(-1)
    values = wide.view(np.float32)
    found = bits.to_bfloat16(values)
    wanted = torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
    is_nan = np.isnan(values)
    assert np.array_equal(found[~is_nan], wanted[~is_nan]) and (found[is_nan] == bits.NAN).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_values_as_float32_are_torchs(dtype):
    values = 100 * torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    tensor = values.to(getattr(torch, TORCH_NAMES[dtype]))
    part = bits.from_torch(tensor)
    assert part.dtype == bits.bits_type(dtype)
    assert np.array_equal(bits.to_float32(part, dtype), tensor.float().numpy())
    assert np.array_equal(bits.as_dtype(part, dtype, "F32").view(np.float32), tensor.float().numpy())
    assert torch.equal(bits.to_torch(bits.as_dtype(part, dtype, "BF16"), "BF16"), tensor.float().bfloat16())


def test_scales_of_eight_bits_are_powers_of_two():
    values = bits.e8m0()
    assert [values[at] for at in (0, 126, 127, 128, 254)] == [2.0**-127, 0.5, 1.0, 2.0, 2.0**127]
    assert len(values) == 256 and math.isnan(values[255])
    assert bits.to_float32(np.array([130], np.uint8), "F8_E8M0") == [8.0]


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_has_torchs_name_and_size(dtype):
    kind = getattr(torch, TORCH_NAMES[dtype])
    assert kind.itemsize == DTYPE_BYTES[dtype] and TensorInfo((2, 3), dtype).bytes == 6 * kind.itemsize
    assert bits.to_torch(np.zeros(3, bits.bits_type(dtype)), dtype).dtype == kind
    assert bits.from_torch(torch.zeros(3).to(kind)).dtype == bits.bits_type(dtype)


def test_a_part_is_where_numpy_has_it():
    whole = np.arange(3 * 4 * 5 * 6).reshape(3, 4, 5, 6)
    for index in ((), (1,), (1, 2), (0, 1, 3)):
        for rows in (None, (1, 3), (0, 2)):
            ref, part = Ref("x", index, rows), whole[index]
            part = part if rows is None else part[slice(*rows)]
            assert ref.shape(whole.shape) == part.shape and ref.start(whole.shape) == part.flat[0]
