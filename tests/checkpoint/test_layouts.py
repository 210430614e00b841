"""Parallel layouts, by megatron-core itself: it loads what `import` wrote, and Slipway reads what it saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, tensor_of

from entrypoints.checkpoint import torch_dist
from entrypoints.import_ import import_

SCRIPT = Path(__file__).parent / "save_in_parallel.py"


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Path:
    """A NeMo checkpoint with a layer for each virtual stage of PP2-VPP2."""
    folder = tmp_path_factory.mktemp("layouts")
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    import_(str(make_model(folder / "hf", "gpt_oss", layers)), str(folder / "nemo"))
    return folder / "nemo"


@pytest.mark.parametrize(
    "tensor, pipeline, expert, virtual",
    [(2, 1, 1, 1), (1, 2, 1, 2), (1, 1, 2, 1), (2, 1, 2, 1)],
    ids=["TP2", "PP2-VPP2", "EP2", "TP2-EP2"],
)
def test_megatron_loads_and_saves_in_any_layout(four_layers, tmp_path, tensor, pipeline, expert, virtual):
    target = tmp_path / "saved" / "weights"
    processes = max(tensor * pipeline, expert)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", SCRIPT]
    sizes = map(str, (tensor, pipeline, expert, virtual))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*words, four_layers, target, *sizes], capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(four_layers / "context", tmp_path / "saved" / "context")
    ours, theirs = torch_dist.Reader(four_layers), torch_dist.Reader(target)
    assert theirs.tensors.keys() == ours.tensors.keys()
    for key, info in ours.tensors.items():
        assert torch.equal(tensor_of(theirs, key).to(torch.bfloat16), tensor_of(ours, key)), (key, info)
