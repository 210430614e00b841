"""Parallel layouts, by megatron-core itself: it loads what `import` wrote, and Slipway reads what it saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import free_port, make_model, tensor_of
from slipway.checkpoint import torch_dist
from slipway.commands.import_checkpoint import import_checkpoint

SCRIPT = Path(__file__).parent / "save_in_parallel.py"


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Path:
    """A NeMo checkpoint with a layer for each virtual stage of PP2-VPP2."""
    folder = tmp_path_factory.mktemp("layouts")
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    import_checkpoint(str(make_model(folder / "hf", "gpt_oss", layers)), str(folder / "nemo"))
    return folder / "nemo"


LAYOUTS = {
    "TP2": {"tensor": 2, "pipeline": 1, "expert": 1, "virtual": 1},
    "PP2-VPP2": {"tensor": 1, "pipeline": 2, "expert": 1, "virtual": 2},
    "EP2": {"tensor": 1, "pipeline": 1, "expert": 2, "virtual": 1},
    "TP2-EP2": {"tensor": 2, "pipeline": 1, "expert": 2, "virtual": 1},
}


@pytest.fixture(scope="module")
def saved(four_layers, tmp_path_factory, warm) -> Path:
    """The folder with what Megatron saved in each layout."""
    root = tmp_path_factory.mktemp("saved")
    jobs = [{"name": name, "port": free_port(), **sizes} for name, sizes in LAYOUTS.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    code, printed = warm.python([SCRIPT, four_layers, root / "jobs.json"], root / "output")
    assert code == 0, printed
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_and_saves_in_any_layout(four_layers, saved, layout):
    folder = saved / layout
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("rank*.log")))
    assert (folder / "weights" / "metadata.json").exists(), logs
    shutil.copytree(four_layers / "context", folder / "context")
    ours, theirs = torch_dist.Reader(four_layers), torch_dist.Reader(folder / "weights")
    assert theirs.tensors.keys() == ours.tensors.keys()
    for key, info in ours.tensors.items():
        assert torch.equal(tensor_of(theirs, key).to(torch.bfloat16), tensor_of(ours, key)), (key, info)
