"""What a machine can refuse a worker, memory and disk, said with what can be done about it."""

from __future__ import annotations

import errno
import re
import shutil

from slipway.errors import PreflightError, SlipwayError, WriteError
from slipway.report import human_bytes
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES}
# How torch says it: the CUDA allocator in sentences of GiB, the CPU's in bytes.
ON_GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU \d+ has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+)"
)
ON_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes")


def explained(error: Exception, recipe: Recipe) -> SlipwayError | None:
    """The error for people, where it is the machine's memory or disk that ended the worker; else None."""
    if said := out_of_memory(error):
        return PreflightError(f"out of memory: {said}. {memory_knobs(recipe)}")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return cannot_write(str(error.filename or recipe.out), error, recipe)
    return None


def out_of_memory(error: Exception) -> str | None:
    """How much was wanted, and of what; None where it is another error."""
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        wanted = ON_GPU.search(text)
        return "{} more wanted, {} of the GPU's memory, {} free".format(*wanted.groups()) if wanted else text[:200]
    if wanted := ON_CPU.search(text):
        return f"{human_bytes(int(wanted.group(1)))} more wanted than this machine gives"
    return None


def memory_knobs(recipe: Recipe) -> str:
    """What makes a step smaller, from what it is to what to try, the cheapest first."""
    tokens, tensor = recipe.micro_batch_size * recipe.seq_length, recipe.tensor_parallel_size
    knobs = []
    if recipe.micro_batch_size > 1:
        half = recipe.micro_batch_size // 2
        knobs.append(f"--micro-batch-size {recipe.micro_batch_size} → {half} (same results, fewer tokens at once)")
    if recipe.mode != "heads" and recipe.recompute == "none":
        knobs.append("--set recompute=full (same results, a layer's input kept instead of all that is in it)")
    knobs.append(f"--seq-length {recipe.seq_length} → {recipe.seq_length // 2} (longer samples are dropped)")
    knobs.append(f"--tensor-parallel-size {tensor} → {2 * tensor} (the model over twice as many GPUs)")
    if not recipe.is_frozen:
        knobs.append(f"--mode {recipe.mode} → lora (no gradients and no optimizer for the base)")
    return f"A pass holds {tokens} tokens. Try, one after the other: {'; '.join(knobs)}"


def cannot_write(where: str, error: BaseException, recipe: Recipe) -> WriteError:
    """A disk that is full or refuses; the newest complete checkpoint is named, for it is still there."""
    latest = RunFolder.of(recipe).latest_checkpoint()
    kept = f"step={latest[0]} is complete" if latest else "there is no complete one yet"
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    free = human_bytes(shutil.disk_usage(recipe.out).free)
    return WriteError(
        f"{where} cannot be written, {free} are free there ({said}); of the checkpoints, {kept}: make room and run the "
        "same again"
    )
