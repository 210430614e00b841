"""`slipway bench`: a model of the true shape that nobody has to have, and what it says of a run."""

from __future__ import annotations

import json

import pytest
import torch
from slipway import cli
from slipway.checkpoint import handover
from slipway.checkpoint.hollow import write_hollow
from slipway.checkpoint.torch_dist import Reader
from slipway.errors import UsageError
from slipway.families import FAMILIES
from slipway.training import bench, memory, preflight, profile, recipes
from slipway.training.recipe import Recipe
from torch.autograd import DeviceType


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_checkpoint_is_a_whole_one_without_weights(family, tmp_path):
    config = FAMILIES[family].tiny_config()
    write_hollow(tmp_path / "nemo", config)
    preflight.check_checkpoint(tmp_path / "nemo")
    handover.check(tmp_path / "nemo")
    assert Reader(tmp_path / "nemo").tensors == FAMILIES[family].rules(config).megatron


def test_a_large_one_takes_no_room(tmp_path):
    write_hollow(tmp_path / "nemo", recipes.config_of("llama31_8b"))
    taken = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*"))
    sizes = sum(file.stat().st_size for file in tmp_path.rglob("*"))
    assert sizes > 16e9 and taken < 1e6


def test_it_trains_and_says_how_fast(tmp_path, warm):
    model = tmp_path / "here" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(FAMILIES["qwen3"].tiny_config()))
    words = ["--mode", "lora", "--lengths", "chat", "--nproc-per-node", "1"]
    few = ["--set", "seq_length=256", "--set", "global_batch_size=4", "--steps", "1", "--layers", "1"]
    words = ["bench", "--config", "tiny/config.json", *words, *few, "--json"]
    code, printed = warm.start(words, tmp_path / "printed", folder=model.parent).finish()
    assert code == 0, printed
    found = json.loads(printed.splitlines()[-1])
    assert found["tokens_per_second"] > 0 and found["seconds_per_step"] > 0 and found["mode"] == "lora"
    assert found["name"] == "tiny with 1 layers" and found["gpus"] == 1
    assert [path.name for path in model.parent.iterdir()] == ["tiny"]  # nothing is left behind


@pytest.mark.parametrize(
    "words, said",
    [
        (["no_recipe"], "bench needs a model"),
        ([], "bench needs a model"),
        (["qwen25_500m", "--layers", "25"], "--layers is 25, and the model has 24"),
        (["qwen25_500m", "--nodes", "2", "--node-rank", "0", "--master-addr", "a"], "bench measures one machine"),
        (["qwen25_500m", "--set", "lrr=1"], "did you mean lr?"),
        (["qwen25_500m", "--epochs", "2"], "bench measures steps, not epochs"),
        (["qwen25_500m", "--set", "steps=50"], "--set steps is not for bench, which measures --steps steps"),
        (["qwen25_500m", "--set", "eval_data=x"], "--set eval_data is not for bench"),
        (["qwen25_500m", "--set", "lr=1", "--set", "lr=2"], "--set lr is given twice"),
        (["qwen25_500m", "--nodes", "2"], "bench measures one machine; leave out --nodes"),
    ],
)
def test_what_it_cannot_measure_is_said_at_once(words, said, capsys):
    assert cli.main(["bench", *words]) == UsageError.exit_code
    assert said in capsys.readouterr().err


def test_the_model_may_be_said_as_to_every_command(tmp_path):
    """Its config.json, or the folder of it."""
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["qwen3"].tiny_config()))
    by_file, by_folder = (bench.config_for("", str(said), None) for said in (tmp_path / "config.json", tmp_path))
    assert by_file == by_folder and by_file[0] == tmp_path.name
    with pytest.raises(UsageError, match=r"has no config\.json; give the file, its folder"):
        bench.config_for("", str(tmp_path.parent), None)


def test_a_profile_comes_to_shares_of_the_time():
    kernels = [
        ("nvjet_gemm", 0.0, 60.0),
        ("cudnn_sdpa_flash", 50.0, 70.0),  # at the same time in another stream
        ("vectorized_elementwise_kernel", 80.0, 100.0),
    ]
    found = profile.summary(kernels)
    assert found["busy"] == 0.9 and found["launches"] == 3
    assert found["kinds"] == {"products": 0.6, "attention": 0.2, "others": 0.2}
    assert found["largest"][0] == ["nvjet_gemm", 0.6, 1]
    assert profile.summary([])["busy"] == 0.0


def test_a_profiles_events_are_torchs_own():
    """Those of the CPU here; a GPU's are recorded in the same list."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        torch.ones(8, 8) @ torch.ones(8, 8)
    found = profile.events_of(recorded, DeviceType.CPU)
    theirs = recorded.events()
    assert [name for name, _, _ in found] == [event.name for event in theirs] and "aten::mm" in str(found)
    first = found[0][1] - theirs[0].time_range.start
    for (_, start, end), event in zip(found, theirs, strict=True):
        assert (start - first, end - first) == pytest.approx((event.time_range.start, event.time_range.end), abs=0.5)
    assert profile.events_of(recorded, DeviceType.CUDA) == []


def test_it_advises_what_the_memory_allows(monkeypatch):
    monkeypatch.setattr(recipes, "gpu_memory", lambda: 80)
    config = recipes.config_of("llama31_8b")
    values = {"mode": "lora", "seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 8}
    recipe = Recipe("m", "d", "o", **values, pack=False)
    about = {"name": "n", "mode": "lora", "gpu": "g", "gpus": 1, "seconds_to_first_step": 1.0, "memory_gb": 37.0}
    rates = {"tokens_per_second": 1.0, "tokens_per_second_per_gpu": 1.0, "seconds_per_step": 1.0, "tflops_per_gpu": 1.0}
    found = bench.Measured(**about, **rates, estimated_gb=39.0, reachable_tflops=700.0, busy=0.5)
    assert "--micro-batch-size 2" in bench.advice(found, recipe, config)[0]
    found.busy = 0.97
    assert bench.advice(found, recipe, config) == []
    full = Recipe("m", "d", "o", **values, pack=False, recompute="full")
    assert "--recompute none" in bench.advice(found, full, config)[0]
    assert memory.estimate(recipe, config, 1).total < 0.92 * 80e9
    large = recipes.config_of("qwen3_30b_a3b")
    found.busy, found.gpus = 0.4, 4
    in_parts = Recipe(
        "m", "d", "o", **{**values, "global_batch_size": 32, "micro_batch_size": 2}, pack=True, expert_parallel_size=4
    )
    assert "--micro-batch-size 8 --recompute full" in bench.advice(found, in_parts, large)[0]
