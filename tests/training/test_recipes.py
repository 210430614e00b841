"""The recipes that ship: each resolves, fits its GPUs and goes with the model it is for."""

from __future__ import annotations

import itertools
import json

import pytest
from slipway.errors import UsageError
from slipway.families import FAMILIES
from slipway.training import memory, recipes
from slipway.training.recipe import MODES, Recipe


def sizes(hidden, width, layers, heads, groups, vocabulary, **others) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        **others,
    }


MLA = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 0,
}
# config.json as published, and the billions of parameters of the model's card.
MODELS = {
    "qwen25_500m": (sizes(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 0.49),
    "qwen25_7b": (sizes(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False), 7.6),
    "llama31_8b": (sizes(4096, 14336, 32, 32, 8, 128256, head_dim=128), 8.0),
    "gpt_oss_20b": (
        sizes(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4),
        20.9,
    ),
    "gpt_oss_120b": (
        sizes(2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128, num_experts_per_tok=4),
        116.8,
    ),
    "qwen3_30b_a3b": (
        sizes(2048, 6144, 48, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
              num_experts_per_tok=8),
        30.5,
    ),
    "qwen3_235b_a22b": (
        sizes(4096, 12288, 94, 64, 4, 151936, head_dim=128, moe_intermediate_size=1536, num_experts=128,
              num_experts_per_tok=8),
        235,
    ),
    "deepseek_v3": (
        sizes(7168, 18432, 61, 128, 128, 129280, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
              first_k_dense_replace=3, num_experts_per_tok=8, **MLA),
        671,
    ),
}  # fmt: skip


def config_of(name: str) -> dict:
    shipped = recipes.load(name, "heads", 80)
    config = {**FAMILIES[shipped.family].tiny_config(), **MODELS[name][0]}
    if shipped.family == "qwen3":
        config["model_type"] = "qwen3_moe"
    if "layer_types" in config:
        config["layer_types"] = ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2)
    return config


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"inputs": {"p_ids": [1, 2], "r_ids": [3, 4]}}\n')
    return file


def test_there_is_one_recipe_for_each_model():
    assert recipes.names() == sorted(MODELS)


@pytest.mark.parametrize("name, mode, gpu", itertools.product(MODELS, MODES, recipes.GPUS))
def test_every_layout_divides_the_model_and_fits_its_gpus(name, mode, gpu):
    shipped, config = recipes.load(name, mode, gpu), config_of(name)
    world = shipped.nodes * shipped.processes_per_node
    recipe = Recipe("m", "d", "o", mode=mode, **shipped.values)
    recipe.check(world)
    recipe.check_model(config)
    found = memory.estimate(recipe, config, world).total / 1e9
    assert round(found) == shipped.memory_gb and found < 0.95 * gpu


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_counted_from_config_alone(name):
    assert memory.parts_of(config_of(name)).total / 1e9 == pytest.approx(MODELS[name][1], rel=0.01)


def test_every_key_of_every_file_says_what_it_is():
    for file in recipes.FOLDER.glob("*.toml"):
        bare = [line for line in file.read_text().splitlines() if "=" in line and "#" not in line]
        assert bare == [], file.name


def test_lora_on_llama_8b_takes_what_was_measured():
    recipe = Recipe("m", "d", "o", mode="lora", seq_length=4096, micro_batch_size=2, global_batch_size=8)
    assert memory.estimate(recipe, config_of("llama31_8b"), 1).total / 1e9 == pytest.approx(64.7, rel=0.1)


def test_a_larger_gpu_takes_the_layout_of_the_next_smaller_and_a_small_one_none():
    assert recipes.load("llama31_8b", "sft", 192) == recipes.load("llama31_8b", "sft", 141)
    with pytest.raises(UsageError, match="no layout for GPUs of 40 GB"):
        recipes.load("llama31_8b", "sft", 40)


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
    ],
)
def test_what_does_not_fit_is_one_line_before_any_work(nemo_model, data, tmp_path, slipway, words, said):
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run")]
    done = slipway(*flags, "--global-batch-size", "6", *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


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


def test_a_dry_run_of_a_recipe_shows_its_nodes_its_memory_and_no_secret(
    nemo_model, data, tmp_path, slipway, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    flags = ["train", "--model", str(nemo_model), "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    done = slipway(*flags, "--recipe", "gpt_oss_20b", "--mode", "lora", "--gpu-memory", "80")
    assert "topology: 1 node × 4" in done.stdout and "from recipe gpt_oss_20b" in done.stdout
    assert "memory per GPU: about" in done.stdout and "--nproc-per-node=4" in done.stdout
    assert "WANDB_API_KEY=***" in done.stdout and "very-secret" not in done.stdout
