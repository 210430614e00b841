"""`train --adapter`: a run that goes on from an adapter which peft made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model
from slipway import cli
from slipway.training.run_folder import RunFolder
from test_parallel import write_data
from test_train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base in hf/, an adapter of peft's in peft/, both as NeMo checkpoints in nemo/base and nemo/."""
    import peft
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapter")
    make_model(root / "hf", "llama31", quantized=False)
    write_data(root)
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted = peft.get_peft_model(model, settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(root / "peft")
    assert cli.main(["import", str(root / "hf"), str(root / "nemo"), "--adapter", str(root / "peft")]) == 0
    return root


def words(folder: Path, out: Path, **flags: object) -> list[str]:
    chosen = {
        "model": folder / "nemo" / "base", "adapter": folder / "nemo", "data": folder / "data.jsonl", "out": out,
        "mode": "lora", "seq_length": 32, "steps": 2, "global_batch_size": 4,
    }  # fmt: skip
    return ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in (chosen | flags).items())]


def test_training_begins_with_the_adapters_weights(folder, tmp_path, warm):
    """At a learning rate of next to nothing it ends with them too; at a usual one it does not."""
    for name, rate, code in (("still", 1e-12, 0), ("moved", 1e-2, 1)):
        run = RunFolder(tmp_path / name)
        ended, output = train(words(folder, run.path, lr=rate, min_lr=0), commands=warm)
        assert ended == 0, output
        assert cli.main(["verify", str(folder / "nemo"), str(run.latest_checkpoint()[1])]) == code


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"lora_rank": 8}, "--lora-rank is 8, but --adapter"),
        ({"adapter": "nowhere"}, "--adapter nowhere is not a NeMo checkpoint"),
    ],
)
def test_what_does_not_go_with_the_adapter_is_refused(folder, tmp_path, capsys, flags, said):
    assert cli.main(words(folder, tmp_path / "run", **flags)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
