"""`slipway init`: a NeMo checkpoint with random weights, as transformers would begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from slipway import cli
from slipway.checkpoint.initialise import _normal


def run(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main([*map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def exported(folder: Path, capsys) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    assert run(capsys, "export", folder, f"{folder}-hf")[0] == 0
    return {name: t for file in Path(f"{folder}-hf").glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "deepseek_v3", "qwen25_tied", "llama31", "moonlight"])
def test_a_new_model_is_distributed_as_transformers_begins(kind, tmp_path, capsys):
    """The same mean and deviation, tensor by tensor, as the model's own class gives them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = make_model(tmp_path / "hf", kind, {"initializer_range": 0.05}, quantized=False)
    assert run(capsys, "init", source / "config.json", tmp_path / "nemo")[0] == 0
    found = exported(tmp_path / "nemo", capsys)
    torch.manual_seed(0)
    wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).state_dict()
    tied = KINDS[kind][0] == "qwen25"
    assert found.keys() == {name for name in wanted if not (tied and name == "lm_head.weight")}
    for name, tensor in found.items():
        ours, theirs = tensor.float(), wanted[name].float()
        if theirs.numel() > 1000:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15), name
        if theirs.unique().numel() == 1 and "sinks" not in name:  # norms, biases
            assert ours.unique().tolist() == pytest.approx(theirs.unique().tolist()), name


def test_the_seed_decides_and_nothing_else(tmp_path, capsys):
    source = make_model(tmp_path / "hf", "qwen25_tied", quantized=False)
    for name, words in {"one": ["--seed", 3], "again": ["--seed", 3, "--memory", "1MB"], "other": []}.items():
        assert run(capsys, "init", source, tmp_path / name, *words)[0] == 0
    one, again, other = ((tmp_path / n / "weights" / "__0_0.distcp").read_bytes() for n in ("one", "again", "other"))
    assert one == again != other


def test_fields_of_config_json_can_be_set(tmp_path, capsys):
    source = make_model(tmp_path / "hf", "gpt_oss", quantized=True)
    code, said = run(
        capsys, "init", source, tmp_path / "nemo", "--set", "num_hidden_layers=1", "--set", "vocab_size=520"
    )
    assert code == 0 and "note: layer_types is cut to the first 1 layers" in said
    config = json.loads((tmp_path / "nemo" / "context" / "hf_config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"], len(config["layer_types"])) == (1, 520, 1)
    assert "quantization_config" not in config
    code, said = run(capsys, "init", source, tmp_path / "none", "--set", "num_layers=1")
    assert code == 2 and "expected FIELD=VALUE with a field of config.json" in said and not (tmp_path / "none").exists()
    code, said = run(capsys, "init", source, tmp_path / "none", "--set", "hidden_size=0")
    assert code == 65 and "hidden_size is 0" in said


@settings(max_examples=60)
@given(start=st.integers(0, 3000), count=st.integers(1, 3000))
def test_any_part_of_a_tensor_is_that_part_of_the_whole(start, count):
    whole = _normal(7, "x", 0, 6000)
    assert np.array_equal(_normal(7, "x", start, count), whole[start : start + count])


def test_the_numbers_are_normal():
    values = np.sort(_normal(1, "a tensor", 0, 200_000).astype(np.float64))
    # Kolmogorov and Smirnov's distance to the normal distribution; a good sample of this size stays below 0.004.
    from math import erf, sqrt

    expected = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in values[::100]])
    assert np.abs(expected - np.arange(0, 200_000, 100) / 200_000).max() < 0.004
    other = _normal(1, "another", 0, 200_000)
    assert abs(np.corrcoef(_normal(1, "a tensor", 0, 200_000), other)[0, 1]) < 0.01


@pytest.mark.parametrize("value", ["0.02", None, True, -1, float("nan"), float("inf"), [0.02], 1e9])
def test_a_deviation_that_is_none(value, tmp_path, capsys):
    source = make_model(tmp_path / "hf", "qwen3_dense", {"initializer_range": value}, quantized=False)
    code, said = run(capsys, "init", source, tmp_path / "nemo")
    assert code == 65 and "field initializer_range is" in said and len(said.splitlines()) == 1
