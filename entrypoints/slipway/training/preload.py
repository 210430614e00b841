"""CUDA's libraries, loaded while the main thread imports NeMo.

Each is loaded from disk at its first use, without Python's lock. That would be in the first step, which would take some
three seconds more.
"""

from __future__ import annotations

import os
import threading

import torch

from slipway.untrusted import tell


def start() -> threading.Thread:
    """Begin; join the thread before the model is built."""
    thread = threading.Thread(target=_load, name="preload", daemon=True)
    thread.start()
    return thread


def _load() -> None:
    try:
        with torch.cuda.device(int(os.environ["LOCAL_RANK"])):
            factor = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
            factor @ factor  # cuBLAS
            queries = factor.expand(1, 1, 64, 64).clone()
            torch.ops.aten._scaled_dot_product_cudnn_attention(queries, queries, queries, None, True)  # cuDNN
            torch.cuda.synchronize()
    except (RuntimeError, NotImplementedError) as error:  # as on a GPU for which cuDNN has no attention
        said = str(error).partition("\n")[0]
        tell(f"worker: some of CUDA's libraries will be loaded in the first step, which takes longer: {said}")
