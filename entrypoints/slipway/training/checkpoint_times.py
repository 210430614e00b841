"""How long it took to read and to write a checkpoint, said once for all ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo.lightning.ckpt_utils import ckpt_to_dir

from slipway.checkpoint.torch_dist import Reader
from slipway.garbage import uncollected
from slipway.report import human_bytes
from slipway.untrusted import tell

Load = Callable[..., dict[str, Any]]


def say_saved(checkpoint: Path, size: int, seconds: float) -> None:
    """To be called on one rank, with the bytes that all ranks have written."""
    tell(f"worker: saved {checkpoint.name}, {rate(size, seconds)}")


def saying_loaded(load: Load) -> Load:
    """The same as `load`, which is `MegatronStrategy.load_checkpoint`: it fills the model of all ranks."""

    def timed(checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        begun = time.monotonic()
        with uncollected():
            found = load(checkpoint_path, selective_restore)
        seconds = time.monotonic() - begun
        # Adapters are few and come later: what is loaded here is the base that they were trained on.
        base = getattr(checkpoint_path, "base_model_path", None)
        weights_only = selective_restore or base is not None
        if int(os.environ.get("RANK", 0)) == 0:
            weights = ckpt_to_dir(base or checkpoint_path)
            source = weights.parent if weights.name == "weights" else weights
            tell(f"worker: loaded {source}, {rate(loaded_bytes(source, weights_only), seconds)}")
        return found

    return timed


def loaded_bytes(checkpoint: Path, weights_only: bool) -> int:
    """Bytes of a checkpoint's tensors, with or without those of the optimizer."""
    tensors = Reader(checkpoint).tensors.items()
    return sum(info.bytes for name, info in tensors if not (weights_only and name.startswith("optimizer.")))


def rate(size: int, seconds: float) -> str:
    """For 32e9 and 10 "32 GB in 10.0 s, 3.2 GB/s"."""
    return f"{human_bytes(size)} in {seconds:.1f} s, {human_bytes(size / seconds)}/s"
