"""The messages when a worker runs out of memory or disk: what is missing, and what can be done."""

from __future__ import annotations

import errno
import re
import shutil

from slipway.errors import PreflightError, SlipwayError, WriteError
from slipway.report import human_bytes
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, *CLOSED}
# The messages of torch: its CUDA allocator counts in GiB, its CPU allocator in bytes.
ON_GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU \d+ has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)"
)
ON_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes")


def explained(error: Exception, recipe: Recipe) -> SlipwayError | None:
    """The error to show if memory or disk ended the worker; None for any other error."""
    if said := out_of_memory(error):
        return PreflightError(f"out of memory: {said}. {memory_knobs(recipe)}")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return cannot_write(str(error.filename or recipe.out), error, recipe)
    return None


def out_of_memory(error: Exception) -> str | None:
    """How much memory was requested and how much there is; None if it is another error."""
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        wanted = ON_GPU.search(text)
        found = "{} more were requested, the GPU has {}, of which {} are free"
        return found.format(*wanted.groups()) if wanted else text[:200]
    if wanted := ON_CPU.search(text):
        return f"{human_bytes(int(wanted.group(1)))} more were requested than this machine has"
    return None


def memory_knobs(recipe: Recipe) -> str:
    """The flags that make a step smaller, each from its value to the one to try, the cheapest first."""
    tokens, tensor = recipe.micro_batch_size * recipe.seq_length, recipe.tensor_parallel_size
    knobs = []
    if recipe.micro_batch_size > 1:
        half = recipe.micro_batch_size // 2
        knobs.append(f"--micro-batch-size {recipe.micro_batch_size} → {half} (same results, fewer tokens at once)")
    if recipe.mode != "heads" and recipe.recompute == "none":
        knobs.append("--set recompute=full (same results; of a layer only the input is kept)")
    knobs.append(f"--seq-length {recipe.seq_length} → {recipe.seq_length // 2} (longer samples are dropped)")
    knobs.append(f"--tensor-parallel-size {tensor} → {2 * tensor} (the model is shared by twice as many GPUs)")
    if not recipe.is_frozen:
        knobs.append(f"--mode {recipe.mode} → lora (the base needs no gradients and no optimizer)")
    return f"A pass has {tokens} tokens. Try one after the other: {'; '.join(knobs)}"


def cannot_write(where: str, error: BaseException, recipe: Recipe) -> WriteError:
    """The error for a disk that is full or read-only. It names the newest checkpoint, where the run can continue."""
    latest = RunFolder.of(recipe).latest_checkpoint()
    kept = f"step={latest[0]} is complete" if latest else "none is complete yet"
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    free = human_bytes(shutil.disk_usage(recipe.out).free)
    is_closed = isinstance(error, OSError) and error.errno in CLOSED
    cure = "let the run write there" if is_closed else "free some space"
    return WriteError(
        f"{where} cannot be written, {free} are free there ({said}); checkpoints: {kept}; {cure} and run the same "
        "command again"
    )
