"""Checkpoints that NeMo itself made, which have no config.json inside: exported, and trained from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port, make_model
from families.test_forward import assert_close, reference_logits
from parallel_logits import tokens_of
from slipway import cli

SCRIPT = Path(__file__).parent / "save_by_nemo.py"
# A length that NeMo's importer takes for granted.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
# Name → kind, changes of its config.json; tensor, pipeline and expert parallel size.
MADE = {
    "dense, TP2 PP2": ("llama31", {"rope_scaling": LLAMA3}, 2, 2, 1),
    "tied, TP2": ("qwen25_tied", {}, 2, 1, 1),
    "experts, PP2 EP2": ("qwen3_moe", {}, 1, 2, 2),
    "experts with biases, EP2": ("gpt_oss", {}, 1, 1, 2),
    "latent attention, TP2 PP2 EP2": ("deepseek_v3", {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}, 2, 2, 2),
}
# Name → NeMo's module, kind.
IMPORTED = {"llama": ("llama31", {"rope_scaling": LLAMA3}), "qwen2": ("qwen25_untied", {})}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder with what NeMo has made, by the number of the job or by the name of its module.

    In a process of its own, which imports the whole of NeMo.
    """
    root = tmp_path_factory.mktemp("made")
    jobs: list[dict] = []
    for number, (kind, changes, tensor, pipeline, expert) in enumerate(MADE.values()):
        sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
        jobs.append({"kind": kind, "changes": changes, "name": str(number), "port": free_port(), **sizes})
    for module, (kind, changes) in IMPORTED.items():
        source = make_model(root / f"{module}-source", kind, changes, quantized=False)
        jobs.append({"import": module, "source": str(source), "name": module, "port": free_port()})
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT, root / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for metadata in root.glob("*/weights/.metadata"):  # as Megatron writes it beside NVIDIA's client for object stores
        assert b"MCoreSavePlan" in metadata.read_bytes(), logs(metadata.parents[1])
    return root


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in sorted(Path(f"{folder}.logs").glob("rank*.log")))


def run(capsys, *words: object) -> str:
    capsys.readouterr()
    code = cli.main([*map(str, words)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.parametrize("name", MADE)
def test_what_nemo_makes_is_exported(name, made, tmp_path, capsys):
    """transformers' logits of the export are those of NeMo's own model, which ranks had shared."""
    folder = made / str(list(MADE).index(name))
    wanted = Path(f"{folder}.logits.pt")
    assert wanted.exists() and not (folder / "context" / "hf_config.json").exists(), logs(folder)
    run(capsys, "export", folder, tmp_path / "hf")
    assert_close(name, torch.load(wanted), reference_logits(tmp_path / "hf", tokens_of()))
    said = json.loads(run(capsys, "inspect", folder, "--json"))
    assert said["whole"] and said["checked"] == "io.json" and "made by NeMo 2" in said["notes"]


@pytest.mark.parametrize("module", IMPORTED)
def test_what_nemos_importer_makes_is_the_source(module, made, tmp_path, capsys):
    """And NeMo's own exporter makes the same of it as ours."""
    source, theirs = made / f"{module}-source", made / f"{module}.hf"
    assert theirs.is_dir(), logs(made / module)
    run(capsys, "export", made / module, tmp_path / "hf")
    run(capsys, "verify", source, tmp_path / "hf")
    run(capsys, "verify", theirs, tmp_path / "hf")
    assert torch.equal(reference_logits(tmp_path / "hf", tokens_of()), reference_logits(source, tokens_of()))


@pytest.mark.parametrize("name, mode", [("dense, TP2 PP2", "sft"), ("tied, TP2", "lora"), ("experts, PP2 EP2", "sft")])
def test_training_from_what_nemo_made(name, mode, made, warm, tmp_path, capsys):
    """A few steps, and the export: the model has learned a little, and what was left alone is as before."""
    folder = made / str(list(MADE).index(name))
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"inputs": {"p_ids": [5, 6, 7], "r_ids": [8, 9, 10, 11]}}) + "\n") * 8)
    words = ["train", "--mode", mode, "--model", folder, "--data", data, "--out", tmp_path / "run", "--steps", 3]
    words += ["--seq-length", 16, "--warmup-steps", 0, "--constant-steps", 0, "--global-batch-size", 2]
    words += ["--micro-batch-size", 1, "--lr", 0.01]
    code, printed = warm.start([*map(str, words)], tmp_path / "printed").finish()
    assert code == 0, printed
    assert "NeMo's own context is not run" in printed
    run(capsys, "export", folder, tmp_path / "before")
    run(capsys, "export", tmp_path / "run", tmp_path / "after")
    sequence = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    losses = [
        torch.nn.functional.cross_entropy(reference_logits(model, sequence)[0, 2:-1], sequence[0, 3:])
        for model in (tmp_path / "before", tmp_path / "after")
    ]
    assert losses[1] < losses[0] - 0.1, losses
    configs = [json.loads((tmp_path / model / "config.json").read_text()) for model in ("before", "after")]
    assert configs[0] == configs[1]
