"""The recipes that ship: each resolves, fits its GPUs and goes with the model it is for."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from conftest import KINDS, config_of
from slipway.errors import UsageError
from slipway.families import by_model_type, understood
from slipway.training import memory, recipes, weights
from slipway.training.recipe import MODES, Recipe

# The billions of parameters on each model's card.
MODELS = {
    "qwen25_500m": 0.49,
    "qwen25_7b": 7.6,
    "llama31_8b": 8.0,
    "gpt_oss_20b": 20.9,
    "gpt_oss_120b": 116.8,
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235,
    "deepseek_v3": 671,
}


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"inputs": {"p_ids": [1, 2], "r_ids": [3, 4]}}\n')
    return file


def test_there_is_one_recipe_for_each_model():
    assert recipes.names() == sorted(MODELS)


@pytest.mark.parametrize("name, mode, gpu", itertools.product(MODELS, MODES, recipes.GPUS))
def test_every_layout_divides_the_model_and_fits_its_gpus(name, mode, gpu):
    shipped, config = recipes.load(name, mode, gpu), recipes.config_of(name)
    world = shipped.nodes * shipped.processes_per_node
    recipe = Recipe("m", "d", "o", mode=mode, **shipped.values)
    recipe.check(world)
    recipe.check_model(config)
    found = memory.estimate(recipe, config, world).total / 1e9
    assert round(found) == shipped.memory_gb and found < 0.95 * gpu


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_counted_from_config_alone(name):
    assert weights.parts_of(recipes.config_of(name)).total / 1e9 == pytest.approx(MODELS[name], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_counted(kind):
    """Those of layers for multi-token prediction too. A router is counted with two experts."""
    config = config_of(kind)
    _, config = understood(config, Path("config.json"))
    tensors = by_model_type()[config["model_type"]].rules(config).megatron.values()
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    assert weights.parts_of(config).total == pytest.approx(count, rel=0.02)


def test_the_last_stage_has_the_layer_for_multi_token_prediction():
    values = {"pipeline_parallel_size": 2, "last_stage_layers": 31, "expert_parallel_size": 8}
    recipe, plain = Recipe("m", "d", "o", **values), recipes.config_of("deepseek_v3")
    both = (memory.estimate(recipe, {**plain, "num_nextn_predict_layers": count}, 16) for count in (0, 1))
    without, with_one = (found.weights for found in both)
    assert 2.8e9 < with_one - without < 6e9  # 11.6 billion weights, the experts' over 8 ranks, and the embedding


def test_every_key_of_every_file_says_what_it_is():
    for file in recipes.FOLDER.glob("*.toml"):
        bare = [line for line in file.read_text().splitlines() if "=" in line and "#" not in line]
        assert bare == [], file.name


LATENT = {"mode": "lora", "lora_targets": "linear_q_up_proj,linear_kv_up_proj,linear_proj"}
QLORA = {"mode": "lora", "base_precision": "nf4"}


@pytest.mark.parametrize(
    "name, layers, values, measured",
    [
        ("llama31_8b", 32, {"mode": "lora", "micro_batch_size": 2}, 48.0),
        ("llama31_8b", 32, {"mode": "lora", "micro_batch_size": 1, "precision": "fp8"}, 34.1),
        ("llama31_8b", 32, {"mode": "lora", "micro_batch_size": 2, "precision": "fp8"}, 50.2),
        ("llama31_8b", 32, {"mode": "lora", "micro_batch_size": 4, "precision": "fp8"}, 81.7),
        ("llama31_8b", 32, {"mode": "heads", "micro_batch_size": 1}, 17.7),
        ("qwen3_30b_a3b", 12, {"mode": "lora", "micro_batch_size": 2}, 28.0),
        ("qwen3_30b_a3b", 12, {"mode": "lora", "micro_batch_size": 2, "lora_targets": "linear_qkv,linear_proj"}, 24.7),
        ("qwen3_30b_a3b", 4, {"mode": "sft", "micro_batch_size": 2}, 61.0),
        ("gpt_oss_20b", 12, {"mode": "lora", "micro_batch_size": 1}, 30.6),
        ("deepseek_v3", 4, {**LATENT, "micro_batch_size": 1}, 36.6),
        ("deepseek_v3", 4, {**LATENT, "micro_batch_size": 1, "recompute": "full"}, 33.0),
        ("llama31_8b", 32, {**QLORA, "micro_batch_size": 2, "tensor_parallel_size": 2}, 27.1),
        ("llama31_8b", 32, {**QLORA, "micro_batch_size": 2}, 38.0),
        ("qwen3_30b_a3b", 12, {**QLORA, "micro_batch_size": 2}, 17.3),
        ("qwen3_30b_a3b", 12, {"mode": "lora", "micro_batch_size": 4}, 38.4),
        ("qwen3_30b_a3b", 12, {"mode": "lora", "micro_batch_size": 4, "expert_parallel_size": 2}, 32.1),
        ("qwen3_30b_a3b", 48, {"mode": "lora", "micro_batch_size": 1, "expert_parallel_size": 4}, 40.7),
        (
            "qwen3_30b_a3b",
            48,
            {"mode": "lora", "micro_batch_size": 4, "expert_parallel_size": 4, "recompute": "full"},
            25.6,
        ),
        ("gpt_oss_20b", 24, {"mode": "lora", "micro_batch_size": 1}, 58.0),
    ],
)
def test_a_gpu_takes_what_was_measured(name, layers, values, measured):
    """docs/performance.md, in GB."""
    config = {**recipes.config_of(name), "num_hidden_layers": layers}
    recipe = Recipe("m", "d", "o", **{"seq_length": 4096, "global_batch_size": 8, **values})
    gpus = recipe.tensor_parallel_size * recipe.expert_parallel_size
    assert memory.estimate(recipe, config, gpus).total / 1e9 == pytest.approx(measured, rel=0.1)


def test_a_larger_gpu_takes_the_layout_of_the_next_smaller_and_a_small_one_none():
    assert recipes.load("llama31_8b", "sft", 192) == recipes.load("llama31_8b", "sft", 141)
    with pytest.raises(UsageError, match="no layout for GPUs of 40 GB"):
        recipes.load("llama31_8b", "sft", 40)


TWO_SHARE = ("--tensor-parallel-size", "2", "--nproc-per-node", "2")
TWO_STAGES = ("--pipeline-parallel-size", "2", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    "sizes, layers, stages",
    [
        ({}, 8, [8]),
        ({"pipeline_parallel_size": 4}, 8, [2, 2, 2, 2]),
        ({"pipeline_parallel_size": 2, "first_stage_layers": 1}, 4, [1, 3]),
        ({"pipeline_parallel_size": 3, "last_stage_layers": 2}, 8, [3, 3, 2]),
        ({"pipeline_parallel_size": 4, "first_stage_layers": 3, "last_stage_layers": 1}, 8, [3, 2, 2, 1]),
    ],
)
def test_stages_are_those_of_megatron(sizes, layers, stages):
    assert Recipe("m", "d", "o", **sizes).stages(layers) == stages


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipe", "gpt_os_20b"], "did you mean gpt_oss_20b?"),
        (["--recipe", "llama31_8b"], "is for llama31"),
        (["--set", "lrr=3"], "did you mean lr?"),
        (["--set", "steps=many"], "takes a whole number; not 'many'"),
        (["--set", "recompute=some"], "must be one of none, full"),
        (["--tensor-parallel-size", "3", "--nproc-per-node", "3"], "does not divide the model's 4 attention heads"),
        (["--expert-parallel-size", "3", "--nproc-per-node", "3"], "does not divide the model's 4 experts"),
        ([*TWO_STAGES, "--first-stage-layers", "3"], "2 layers: 2 stages, of which the first has 3 leave -1 for 1"),
        ([*TWO_STAGES, "--first-stage-layers", "2"], "2 layers: 2 stages, of which the first has 2 leave 0 for 1"),
        ([*TWO_STAGES, "--last-stage-layers", "2"], "2 layers: 2 stages, of which the last has 2 leave 0 for 1"),
        ([*TWO_STAGES, "--first-stage-layers", "1", "--last-stage-layers", "2"], "leave -1 for 0 others"),
        (["--pipeline-parallel-size", "3", "--nproc-per-node", "3"], "2 layers: 3 stages leave 2 for 3 others"),
        (["--first-stage-layers", "1"], "are for --pipeline-parallel-size 2 or more; leave them out"),
        ([*TWO_SHARE, "--seq-length", "63"], "--seq-length 63 is not a multiple of 2, the equal parts"),
        ([*TWO_SHARE, "--mode", "lora", "--lora-targets", "q_proj", "--lora-rank", "3"], "--lora-rank 3 is not a mult"),
        (
            ["--context-parallel-size", "2", "--nproc-per-node", "2", "--seq-length", "66"],
            "is not a multiple of 4, the",
        ),
        (
            ["--context-parallel-size", "2", "--nproc-per-node", "2"],
            "with sinks takes --context-parallel-size 2 for packed samples only: use --pack",
        ),
        (
            ["--context-parallel-size", "4", "--nproc-per-node", "4", "--pack", "--mode", "lora"],
            "and 4 does not divide the model's 2 groups of keys and values",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(nemo_model, data, tmp_path, slipway, words, said):
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run")]
    for dry in ((), ("--dry-run",)):
        done = slipway(*flags, "--global-batch-size", "6", *words, *dry)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, changes, mode, said",
    [
        ("qwen25_tied", {"vocab_size": 511}, "heads", "511 tokens of the vocabulary"),
        ("llama31", {"intermediate_size": 113}, "sft", "113 values in a feed-forward layer"),
        ("deepseek_v3", {"intermediate_size": 113}, "sft", "113 values in a feed-forward layer"),
        ("deepseek_v3", {"moe_intermediate_size": 33, "n_shared_experts": 1}, "sft", "33 values in a feed-forward"),
        ("llama31", {"hidden_size": 65}, "lora", "65 hidden values"),
        # What no ranks share may have any size.
        ("llama31", {"hidden_size": 65}, "sft", ""),
        ("qwen3_moe", {"moe_intermediate_size": 47, "intermediate_size": 113}, "sft", ""),
        ("gpt_oss", {"intermediate_size": 113}, "sft", ""),
        # A number of experts does not make a mixture of a dense model.
        ("llama31", {"num_experts": 3, "intermediate_size": 113}, "sft", "113 values in a feed-forward layer"),
        ("llama31", {"num_experts": 3}, "lora", ""),
    ],
)
def test_tensor_parallel_ranks_share_what_they_divide(kind, changes, mode, said):
    """As Megatron would refuse it, a minute later and with a traceback."""
    recipe = Recipe("m", "d", "o", mode=mode, tensor_parallel_size=2, lora_targets="linear_qkv,linear_fc1")
    config = config_of(kind, **changes)
    if not said:
        return recipe.check_model(config)
    with pytest.raises(UsageError, match=f"--tensor-parallel-size 2 does not divide the model's {said}"):
        recipe.check_model(config)


def test_a_recipe_of_ones_own_is_checked_key_by_key(nemo_model, data, tmp_path, slipway):
    own = tmp_path / "own.toml"
    own.write_text('family = "gpt_oss"\n[heads]\nlr = 1e-3\n[heads.80GB]\nmicro_batch_sise = 2\n')
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    done = slipway(*flags, "--recipe", str(own))
    assert done.returncode == 2 and "did you mean micro_batch_size?" in done.stderr
    own.write_text(own.read_text().replace("sise", "size"))
    done = slipway(*flags, "--recipe", str(own), "--set", "lr=2e-3", "--steps", "7")
    shown = json.loads(done.stdout[: done.stdout.index("}") + 1])
    assert (shown["lr"], shown["micro_batch_size"], shown["steps"]) == (2e-3, 2, 7)


def test_a_recipe_of_ones_own_may_be_for_any_family(nemo_model, data, tmp_path, slipway):
    own = tmp_path / "own.toml"
    own.write_text("[sft]\nsteps = 7\n[sft.80GB]\n")
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    done = slipway(*flags, "--mode", "sft", "--recipe", str(own))
    assert done.returncode == 0 and '"steps": 7' in done.stdout, done.stderr


OF_GPT_OSS = 'family = "gpt_oss"\n'


@pytest.mark.parametrize(
    "text, said",
    [
        ('family = "gptoss"\n', "family is 'gptoss', did you mean gpt_oss?; it must be one of deepseek_v3, gpt_oss"),
        (OF_GPT_OSS + "[sft]\nlora_rank = 8\n", "--lora-rank is for --mode lora, and --mode is sft; leave it out"),
        (OF_GPT_OSS + "[sft]\ndora = true\n", "--dora is for --mode lora, and --mode is sft; leave it out"),
    ],
)
def test_a_recipe_of_ones_own_that_means_nothing_is_refused(nemo_model, data, tmp_path, slipway, text, said):
    own = tmp_path / "own.toml"
    own.write_text(text + "[sft.80GB]\n")
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    done = slipway(*flags, "--mode", "sft", "--recipe", str(own))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_dry_run_of_a_recipe_shows_its_nodes_its_memory_and_no_secret(
    nemo_model, data, tmp_path, slipway, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    done = slipway(*flags, "--recipe", "gpt_oss_20b", "--mode", "sft", "--gpu-memory", "80")
    assert "topology: 1 node × 8" in done.stdout and "from recipe gpt_oss_20b" in done.stdout
    assert "memory per GPU: about" in done.stdout and "--nproc-per-node=8" in done.stdout
    assert "WANDB_API_KEY=***" in done.stdout and "very-secret" not in done.stdout
