"""Parallel layouts, by megatron-core itself: it loads what `import` wrote, and Slipway reads what it saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tensor_of

from entrypoints.checkpoint import torch_dist

SCRIPT = Path(__file__).parent / "save_in_parallel.py"


@pytest.mark.parametrize(
    "tensor, pipeline, expert, virtual",
    [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1)],
    ids=["TP2", "PP2", "EP2", "TP2-EP2"],
)
def test_megatron_loads_and_saves_in_any_layout(nemo_model, tmp_path, tensor, pipeline, expert, virtual):
    target = tmp_path / "saved" / "weights"
    processes = max(tensor * pipeline, expert)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", SCRIPT]
    sizes = map(str, (tensor, pipeline, expert, virtual))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*words, nemo_model, target, *sizes], capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(nemo_model / "context", tmp_path / "saved" / "context")
    ours, theirs = torch_dist.Reader(nemo_model), torch_dist.Reader(target)
    assert theirs.tensors.keys() == ours.tensors.keys()
    for key, info in ours.tensors.items():
        assert torch.equal(tensor_of(theirs, key).to(torch.bfloat16), tensor_of(ours, key)), (key, info)
