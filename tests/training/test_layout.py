"""The recipe that a checkpoint gets without --recipe, and how it fits the GPUs that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model
from slipway import cli
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import PreflightError, UsageError
from slipway.tokens.lines import as_line
from slipway.training import layout, memory, recipes
from slipway.training.recipe import Recipe
from test_recipes import MODELS

GIVEN = {"model": "m", "data": "d", "out": "o"}


def checkpoint(folder: Path, name: str) -> Path:
    """The context of a NeMo checkpoint of a published shape: all that is read before a run."""
    config = recipes.config_of(name)
    changes: dict[str, Any] = {"num_experts_per_tok": 8, "topk_group": 4, "n_group": 8} if "deepseek" in name else {}
    config.pop("experts_per_token", None)
    (folder / "context").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "weights" / "metadata.json").write_text("{}")
    (folder / "context" / "hf_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_each_published_size_gets_its_own_recipe(name):
    family = {"gpt": "gpt_oss", "dee": "deepseek_v3"}.get(name[:3], name.split("_")[0])
    config = recipes.config_of(name)
    assert layout.recipe_for(family, config, MODELS[name] * 1e9) == name
    assert layout.recipe_for(family, config, MODELS[name] * 1e9 * 1.15) == name
    assert layout.recipe_for(family, config, 3e6) is None


@pytest.mark.parametrize(
    "billions, name", [(8.19, "llama31_8b"), (7.6, "qwen25_7b"), (0.596, "qwen25_500m"), (1.7, None), (32.8, None)]
)
def test_a_model_without_experts_gets_no_recipe_of_a_mixture_but_one_of_another_family(billions, name):
    """Qwen3's dense models: 8B is near Llama's; 32B is near the mixture's 30.5 billion, which is another matter."""
    dense = {**recipes.config_of("qwen3_30b_a3b"), "model_type": "qwen3"}
    assert layout.recipe_for("qwen3", dense, billions * 1e9) == name


def dry_run(capsys, folder: Path, name: str, *words: str) -> tuple[int, str, str]:
    data = folder / "data.jsonl"
    model = checkpoint(folder / "model", name)
    data.write_bytes(as_line([5, 6], [7, 8]))
    capsys.readouterr()
    flags = ["train", "--model", str(model), "--data", str(data), "--out", str(folder / "run"), "--dry-run"]
    code = cli.main([*flags, *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


EIGHT_NODES = ["--nodes", "8", "--nproc-per-node", "8", "--node-rank", "3", "--master-addr", "node0"]


@pytest.mark.parametrize("name", MODELS)
def test_the_cards_own_line_is_enough(name, tmp_path, capsys):
    """`train --nodes 8 --master-addr HOST --model M --data D --out O`, for every published size."""
    code, out, err = dry_run(capsys, tmp_path, name, *EIGHT_NODES)
    assert code == 0, err
    assert f"train: recipe {name}, since the model is" in err
    recipe = json.loads(out[: out.index("}") + 1])
    shared = recipe["tensor_parallel_size"] * recipe["pipeline_parallel_size"] * recipe["context_parallel_size"]
    assert 64 % shared == 0 and recipe["global_batch_size"] % (recipe["micro_batch_size"] * 64 // shared) == 0
    assert "memory per GPU: about" in out


def test_what_was_changed_for_the_gpus_is_said(tmp_path, capsys):
    code, _, err = dry_run(capsys, tmp_path, "llama31_8b", *EIGHT_NODES)
    assert code == 0 and "train: for 64 processes: --global-batch-size 32 → 64" in err


def test_what_a_person_chose_stays_and_the_rest_fits_it(tmp_path, capsys):
    code, out, err = dry_run(capsys, tmp_path, "llama31_8b", *EIGHT_NODES, "--global-batch-size", "32")
    recipe = json.loads(out[: out.index("}") + 1])
    assert code == 0 and recipe["global_batch_size"] == 32 and recipe["tensor_parallel_size"] == 2
    assert "for 64 processes: --tensor-parallel-size 1 → 2" in err


@pytest.mark.parametrize("mode, gpus, fits", [("sft", 8, True), ("sft", 1, False), ("lora", 1, True)])
def test_the_memory_of_the_gpus_decides(mode, gpus, fits):
    config = recipes.config_of("llama31_8b")
    values = {**GIVEN, "mode": mode, "seq_length": 4096, "global_batch_size": 32}
    if not fits:
        with pytest.raises(PreflightError, match="no layout of 1 GPUs with 80 GB fits: the smallest needs about"):
            layout.fitted(values, {"mode"}, config, gpus, 80)
        return
    found = layout.fitted(values, {"mode"}, config, gpus, 80).values
    recipe = Recipe(**found)
    recipe.check(gpus)
    recipe.check_model(config)
    assert memory.estimate(recipe, config, gpus).total / 1e9 <= layout.SHARE * 80


@pytest.mark.parametrize(
    "values, cures",
    [
        ({"mode": "sft"}, "use more GPUs, --mode lora or a lower --seq-length"),
        ({"mode": "lora"}, "use more GPUs, --base-precision nf4 or a lower --seq-length"),
        (
            {"mode": "lora", "base_precision": "nf4", "micro_batch_size": 2},
            "use more GPUs, a lower --micro-batch-size or",
        ),
        ({"mode": "heads"}, "use more GPUs or a lower --seq-length"),
    ],
)
def test_only_what_would_help_is_advised(values, cures):
    with pytest.raises(PreflightError, match=cures):
        layout.fitted({**GIVEN, **values}, {"mode"}, recipes.config_of("deepseek_v3"), 1, 80)


def test_less_sharing_comes_first():
    """A model that fits one GPU is not cut, however many there are."""
    found = layout.fitted({**GIVEN, "mode": "heads"}, {"mode"}, recipes.config_of("qwen25_500m"), 8, 80).values
    assert (found.get("tensor_parallel_size", 1), found.get("pipeline_parallel_size", 1)) == (1, 1)


def test_a_layout_that_divides_nothing_is_refused():
    with pytest.raises(UsageError, match="cannot be split into tensor 3"):
        layout.fitted(
            {**GIVEN, "tensor_parallel_size": 3}, {"tensor_parallel_size"}, recipes.config_of("llama31_8b"), 8, 80
        )


def test_what_is_refused_is_what_a_person_chose():
    """Not the recipe's stages, which would have been others; and what is advised can be done."""
    shipped, config = recipes.load("deepseek_v3", "lora", 141), recipes.config_of("deepseek_v3")
    values = {**GIVEN, **shipped.values, "mode": "lora", "tensor_parallel_size": 2}
    with pytest.raises(UsageError, match=r"adapters on experts cannot be shared .* such as linear_proj"):
        layout.fitted(values, {"mode", "tensor_parallel_size"}, config, 2, 1000)
    values |= {"lora_targets": "linear_proj"}
    assert layout.fitted(values, {"mode", "tensor_parallel_size", "lora_targets"}, config, 2, 1000).values


def test_a_large_model_without_a_gpu_is_refused_before_anything(tmp_path, capsys):
    model = checkpoint(tmp_path / "model", "llama31_8b")
    data = tmp_path / "data.jsonl"
    data.write_bytes(as_line([5, 6], [7, 8]))
    code = cli.main(["train", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 78 and "shows no GPU, and the model has 8.0 billion weights" in error and "--gpus all" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_sequences_are_not_shared_without_a_gpu(tmp_path, capsys):
    import_checkpoint(str(make_model(tmp_path / "hf", "llama31", quantized=False)), str(tmp_path / "nemo"))
    (tmp_path / "data.jsonl").write_bytes(as_line([5, 6], [7, 8]))
    words = ["--model", str(tmp_path / "nemo"), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
    words += ["--context-parallel-size", "2", "--nproc-per-node", "2"]
    assert cli.main(["train", *words, "--dry-run"]) == 0
    assert cli.main(["train", *words]) == 78
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--context-parallel-size 2 needs GPUs, and this machine shows none" in said
    assert not (tmp_path / "run").exists()


def test_a_size_that_no_recipe_is_for_is_said_with_those_there_are(nemo_model, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_bytes(as_line([5, 6], [7, 8]))
    words = ["--model", str(nemo_model), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "no shipped recipe is for gpt_oss with" in said and "gpt_oss_20b 20.9" in said
