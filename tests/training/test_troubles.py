"""What a machine refuses, in words that can be acted on. The CPU's and a real full disk: test_train.py."""

from __future__ import annotations

import errno

import torch
from slipway.errors import PreflightError, WriteError
from slipway.training.recipe import Recipe
from slipway.training.troubles import explained

# Recorded on an H200 with torch 2.11: torch.empty(1 << 40, device="cuda").
ON_AN_H200 = (
    "CUDA out of memory. Tried to allocate 4096.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 139.29 GiB "
    "is free. Including non-PyTorch memory, this process has 518.00 MiB memory in use. Of the allocated memory 0 bytes "
    "is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
)


def test_a_gpu_without_memory_is_said_with_numbers_and_knobs(tmp_path):
    recipe = Recipe(model="", data="", out=str(tmp_path), mode="sft", micro_batch_size=4, seq_length=4096)
    error = explained(torch.OutOfMemoryError(ON_AN_H200), recipe)
    assert isinstance(error, PreflightError) and "\n" not in str(error)
    assert str(error).startswith(
        "out of memory: 4096.00 GiB more were requested, the GPU has 139.80 GiB, of which 139.29 GiB are free"
    )
    for knob in (
        "--micro-batch-size 4 → 2",
        "--set recompute=full",
        "--seq-length 4096 → 2048",
        "--tensor-parallel-size 1 → 2",
        "sft → lora",
    ):
        assert knob in str(error)


def test_a_frozen_base_with_one_sample_at_a_time_has_fewer_knobs(tmp_path):
    error = explained(torch.OutOfMemoryError(ON_AN_H200), Recipe(model="", data="", out=str(tmp_path)))
    assert "--micro-batch-size" not in str(error) and "lora" not in str(error)


def test_only_memory_and_disk_are_explained(tmp_path):
    recipe = Recipe(model="", data="", out=str(tmp_path))
    full = explained(OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), recipe)
    assert isinstance(full, WriteError) and "run/metrics.jsonl cannot be written" in str(full)
    assert "checkpoints: none is complete yet; free some space and run the same command again" in str(full)
    closed = explained(PermissionError(errno.EACCES, "Permission denied", "run/logs/x"), recipe)
    assert "run/logs/x cannot be written" in str(closed) and "free some space" not in str(closed)
    assert "none is complete yet; let the run write there and run the same command again" in str(closed)
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), recipe) is None
    assert explained(FileNotFoundError(errno.ENOENT, "No such file", "x"), recipe) is None
