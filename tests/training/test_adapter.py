"""`train --adapter`: a run that goes on from an adapter which peft made."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    """A base with latent attention, in the same places."""
    root = tmp_path_factory.mktemp("latent")
    make_model(root / "hf", "deepseek_v3", {"num_nextn_predict_layers": 0}, quantized=False)
    write_data(root)
    assert cli.main(["import", str(root / "hf"), str(root / "nemo" / "base")]) == 0
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
        ({"adapter": "nemo/base"}, "base has no low-rank adapters; give a checkpoint of a run of --mode lora"),
        ({"model": "nemo", "adapter": ""}, "--model nemo holds only what was trained on a base: give the base, "),
    ],
)
def test_what_does_not_go_with_the_adapter_is_refused(folder, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(folder)
    assert cli.main(words(folder, tmp_path / "run", **flags)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_adapters_on_weights_that_were_trained_do_not_name_the_model_before(folder, tmp_path, capsys, warm):
    """By its name peft would load that one, and compute something else."""
    trained, adapted = RunFolder(tmp_path / "trained"), RunFolder(tmp_path / "adapted")
    code, output = train(words(folder, trained.path, mode="sft", adapter=""), commands=warm)
    assert code == 0, output
    code, output = train(words(folder, adapted.path, model=trained.path, adapter=""), commands=warm)
    assert code == 0, output
    base = str(trained.checkpoint(2))
    for run, name in ((folder / "nemo", str(folder / "hf")), (adapted.path, base)):
        out = tmp_path / f"peft-of-{run.name}"
        capsys.readouterr()
        assert cli.main(["export", str(run), str(out), "--adapter"]) == 0
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == name
        assert ("export it too, and load the adapter on that" in capsys.readouterr().out) == (name == base)


def test_rank_stabilised_adapters_are_those_with_a_larger_alpha(folder, tmp_path, warm):
    """alpha / √4 is 2·alpha / 4."""
    ended = []
    for name, flags in (("rslora", {"rslora": "true", "lora_alpha": 8}), ("larger", {"lora_alpha": 16})):
        run = RunFolder(tmp_path / name)
        code, output = train(words(folder, run.path, adapter="", lora_rank=4, lr=1e-2, **flags), commands=warm)
        assert code == 0, output
        ended.append([entry["loss"] for entry in run.read_metrics()])
        assert cli.main(["export", str(run.latest_checkpoint()[1]), str(tmp_path / f"{name}-peft"), "--adapter"]) == 0
    assert ended[0] == ended[1]
    scales = [
        json.loads((tmp_path / f"{name}-peft" / "adapter_config.json").read_text()) for name in ("rslora", "larger")
    ]
    assert [config["lora_alpha"] / config["r"] for config in scales] == [4, 4]


@pytest.mark.parametrize("base", ["folder", "latent"])
def test_dora_is_trained_and_transformers_computes_the_same(base, request, tmp_path, warm):
    """The loss that peft finds for the exported adapter is the one that the next step begins with."""
    folder = request.getfixturevalue(base)
    run = RunFolder(tmp_path / "run")
    flags: dict[str, object] = {"adapter": "", "dora": "true", "lora_rank": 4, "lr": 1e-2, "min_lr": 1e-2}
    flags |= {"global_batch_size": 40, "pack": "false"}  # a step sees each sample once
    code, output = train(words(folder, run.path, **flags), commands=warm)
    assert code == 0, output
    assert cli.main(["export", str(run.latest_checkpoint()[1]), str(tmp_path / "peft"), "--adapter"]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"]
    code, output = train(
        words(folder, run.path, **flags | {"steps": 3}), commands=warm
    )  # the same run, one step longer
    assert (
        code == 0 and "--steps was 2 and is 3: from step 2 on the learning rate is that of a run of 3 steps" in output
    )
    first, _, last = (entry["loss"] for entry in run.read_metrics())
    assert loss_in_transformers(folder, tmp_path / "peft") == pytest.approx(last, rel=1e-4) and last < first - 0.1


def loss_in_transformers(folder: Path, adapter: Path) -> float:
    """Of all samples, by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter).eval()
    total, count = 0.0, 0
    for line in (folder / "data.jsonl").read_text().splitlines():
        inputs = json.loads(line)["inputs"]
        ids = torch.tensor([inputs["p_ids"] + inputs["r_ids"]])
        labels = ids.clone()
        labels[:, : len(inputs["p_ids"])] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        total, count = total + float(loss) * len(inputs["r_ids"]), count + len(inputs["r_ids"])
    return total / count


def test_an_adapter_of_another_base_is_refused_before_nemo_is_imported(folder, tmp_path, capsys):
    make_model(tmp_path / "hf", "llama31", {"hidden_size": 128}, quantized=False)
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "nemo")]) == 0
    assert cli.main(words(folder, tmp_path / "run", model=tmp_path / "nemo")) == 65
    error = capsys.readouterr().err.splitlines()[-1]
    assert "linear_qkv" in error and "nemo" in error, error
    assert not (tmp_path / "run").exists()
