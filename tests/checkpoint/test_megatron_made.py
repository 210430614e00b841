"""Checkpoints that Megatron itself saved, by its own code, are read, exported and give the source's bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port, make_model
from parallel_logits import tokens_of
from slipway import cli
from slipway.commands.import_checkpoint import import_checkpoint

SCRIPT = Path(__file__).parent / "save_by_megatron.py"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    # Megatron-LM has a field for the factor of Llama's scaling alone; the others are those of Llama 3.1.
    "llama31": {"num_hidden_layers": 4, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}},
    "qwen3_moe": {},
    "gpt_oss": {},
    "qwen25_tied": {},
    "deepseek_v3": {"num_nextn_predict_layers": 0, "num_hidden_layers": 4},
}
# Name → kind, form, sizes: tensor, pipeline, expert, virtual stages; one key for each layer.
JOBS = {
    "classic, dense, TP2 PP2": ("llama31", "classic", 2, 2, 1, 1, False),
    "classic, dense, PP2 in virtual stages": ("llama31", "classic", 1, 2, 1, 2, False),
    "classic, experts, TP2 EP2": ("qwen3_moe", "classic", 2, 1, 2, 1, False),
    "classic, experts with biases, EP2": ("gpt_oss", "classic", 1, 1, 2, 1, False),
    "classic, tied, TP2": ("qwen25_tied", "classic", 2, 1, 1, 1, False),
    "classic, latent attention, TP2 PP2 EP2": ("deepseek_v3", "classic", 2, 2, 2, 1, False),
    "torch_dist, dense, TP2 PP2": ("llama31", "torch_dist", 2, 2, 1, 1, False),
    "torch_dist, experts, EP2, layers apart": ("qwen3_moe", "torch_dist", 1, 1, 2, 1, True),
    "torch_dist, experts with biases, PP2, layers apart": ("gpt_oss", "torch_dist", 1, 2, 1, 1, True),
    "torch_dist, latent attention, TP2 PP2 EP2": ("deepseek_v3", "torch_dist", 2, 2, 2, 1, False),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for kind, changes in KINDS.items():
        source = make_model(root / kind, kind, changes, quantized=False)
        import_checkpoint(str(source), str(root / f"{kind}-nemo"))
    return root


@pytest.fixture(scope="module")
def saved(sources, tmp_path_factory) -> Path:
    """The folder with what Megatron saved, by the number of the job, in a process that imports all it wants."""
    root = tmp_path_factory.mktemp("saved")
    jobs = []
    for number, (kind, form, tensor, pipeline, expert, virtual, apart) in enumerate(JOBS.values()):
        sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "virtual": virtual}
        source = str(sources / f"{kind}-nemo")
        jobs.append({"source": source, "name": str(number), "port": free_port(), "form": form, "apart": apart, **sizes})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, root / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("name", JOBS)
def test_what_megatron_saves_is_exported(name, sources, saved, tmp_path, capsys):
    folder = saved / str(list(JOBS).index(name))
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("rank*.log")))
    assert (folder / "latest_checkpointed_iteration.txt").exists(), logs
    source = sources / JOBS[name][0]
    assert cli.main(["export", str(folder), str(tmp_path / "hf")]) == 0, capsys.readouterr().err
    assert cli.main(["verify", str(source), str(tmp_path / "hf")]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["whole"] and said["checked"] in ("common.pt", "model_optim_rng.pt"), said
    assert any(note.startswith("made by Megatron-LM") for note in said["notes"])
    assert_same_logits(folder, tmp_path / "hf")


def assert_same_logits(saved: Path, exported: Path) -> None:
    """transformers' logits of what was exported are those of Megatron's own model, which ranks had shared."""
    from families.test_forward import assert_close, reference_logits

    assert_close(saved.name, torch.load(saved / "logits.pt"), reference_logits(exported, tokens_of()))


def test_a_checkpoint_that_says_nothing_needs_the_model_by_name(sources, saved, tmp_path, capsys):
    """Without args, and with those of a field that is not there."""
    folder = tmp_path / "dist"
    shutil.copytree(saved / str(list(JOBS).index("torch_dist, dense, TP2 PP2")), folder)
    (folder / "iter_0000007" / "common.pt").unlink()
    assert cli.main(["export", str(folder), str(tmp_path / "hf")]) == 65
    assert "give the model's config.json with --config" in capsys.readouterr().err
    words = ["export", str(folder), str(tmp_path / "hf"), "--config", str(sources / "llama31")]
    assert cli.main(words) == 0
    assert cli.main(["verify", str(sources / "llama31"), str(tmp_path / "hf")]) == 0


def test_megatron_loads_what_import_writes(sources, saved, tmp_path):
    """The keys and shapes of the classic layout are those that Megatron's own model of these sizes has."""
    from slipway.checkpoint import classic, classic_files

    name = "classic, latent attention, TP2 PP2 EP2"
    kind, _, tensor, pipeline, expert, *_ = JOBS[name]
    out = tmp_path / "ours"
    words = [f"--tensor-parallel-size={tensor}", f"--pipeline-parallel-size={pipeline}"]
    words += [f"--expert-parallel-size={expert}", "--format=classic", "--expert-tensor-parallel-size=1"]
    assert cli.main(["import", str(sources / kind), str(out), *words]) == 0
    ours = classic_files.Ranks(out / classic.ITERATION)
    theirs = classic_files.Ranks(saved / str(list(JOBS).index(name)) / "iter_0000007")
    assert ours.saved.keys() == theirs.saved.keys()
    for rank, saved_by_us in ours.saved.items():
        assert saved_by_us.chunks.keys() == theirs.saved[rank].chunks.keys()
