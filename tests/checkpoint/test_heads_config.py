"""Heads as AutoDeco's own class and merge script take them (github.com/Zacks917/AutoDeco, model/templlm_auto.py).

The class takes its sizes from `hidden_size`, makes its base by AutoModelForCausalLM.from_pretrained(
base_model_name_or_path), and reads the tensors that begin with temp_head and top_p_head from every safetensors file of
its folder. The merge script takes the heads' config.json for the merged model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import config_of, make_model, write_torch_dist
from safetensors.torch import load_file
from slipway.checkpoint import locate
from slipway.checkpoint.inspection import contents_of
from slipway.checkpoint.source import name_of
from slipway.commands.extract_heads import extract_heads
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.merge_heads import merge_heads
from slipway.errors import DataError

KINDS = ["gpt_oss", "qwen3_moe", "deepseek_v3", "qwen25_tied", "llama31"]
HUB = "hf://someone/a-model@v1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model's folder, which is also that of a name on the hub."""

    def make(kind: str) -> Path:
        folder = make_model(tmp_path / "hf", kind, quantized=False)
        monkeypatch.setattr(locate, "_fetch", lambda *_: folder)
        return folder

    return make


def trained_heads(kind: str, base: Path, folder: Path, *, context: bool = True) -> Path:
    """A checkpoint of heads as training leaves it, on a base that `import` wrote."""
    from slipway.training.heads import DecodingHeads

    heads = DecodingHeads(config_of(kind)["hidden_size"]).bfloat16().state_dict()
    write_torch_dist(folder / "weights", {f"adapter.{name}": tensor for name, tensor in heads.items()})
    (folder / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    (folder / "context").mkdir()
    if context:  # as training/callbacks.keep_source does
        shutil.copyfile(base / "context" / "hf_config.json", folder / "context" / "hf_config.json")
    return folder


@pytest.mark.parametrize("given", [HUB, "path"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_have_what_autodecos_class_wants(hub, tmp_path, kind, given):
    source = hub(kind)
    given, name = (HUB, "someone/a-model") if given == HUB else (str(source), str(source))
    import_checkpoint(given, str(tmp_path / "nemo"))
    extract_heads(str(trained_heads(kind, tmp_path / "nemo", tmp_path / "ckpt")), str(tmp_path / "heads"))
    merge_heads(str(tmp_path / "heads"), given, str(tmp_path / "merged"))
    base = json.loads((source / "config.json").read_text())
    for folder in (tmp_path / "heads", tmp_path / "merged"):
        config = json.loads((folder / "config.json").read_text())
        assert config["base_model_name_or_path"] == name and config["base_model_type"] == base["model_type"]
        assert (config["model_type"], config["architectures"]) == ("autodeco", ["AutoDecoModelForCausalLM"])
        assert config["hidden_size"] == config["temperature_hidden_size"] == config["top_p_hidden_size"]
        assert config["enable_temperature_head"] and config["enable_top_p_head"] and config["use_enhanced_features"]
        # As imported: without DeepSeek's MTP layer, and the scaling of rope as both majors of transformers read it.
        others = base.keys() - {"model_type", "architectures", "num_nextn_predict_layers", "rope_scaling"}
        assert {n: config[n] for n in others} == {n: base[n] for n in others}
        found = {n for file in folder.glob("*.safetensors") for n in load_file(file) if not n.startswith("llm.")}
        assert len(found) == 8 and all(n.startswith(("temp_head.mlp.", "top_p_head.mlp.")) for n in found)
        assert contents_of(folder).whole


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("llama31", {}, "model_type 'gpt_oss', but .* has 'llama'"),
        ("gpt_oss", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "num_hidden_layers 2, .* has 3"),
    ],
)
def test_heads_of_a_base_of_another_kind_are_refused(hub, tmp_path, kind, changes, said):
    """Both have the same hidden size."""
    import_checkpoint(str(hub("gpt_oss")), str(tmp_path / "nemo"))
    extract_heads(str(trained_heads("gpt_oss", tmp_path / "nemo", tmp_path / "ckpt")), str(tmp_path / "heads"))
    other = make_model(tmp_path / "other", kind, changes, quantized=False)
    with pytest.raises(DataError, match=f"were trained on a model with .*{said}; give the base that the heads were"):
        merge_heads(str(tmp_path / "heads"), str(other), str(tmp_path / "merged"))
    config = tmp_path / "heads" / "config.json"  # of a program that does not say it
    told = json.loads(config.read_text())
    config.write_text(json.dumps({n: v for n, v in told.items() if n not in ("base_model_type", "num_hidden_layers")}))
    merge_heads(str(tmp_path / "heads"), str(other), str(tmp_path / "merged"))


@pytest.mark.parametrize("context", [True, False], ids=["with its own context", "with the base's alone"])
def test_the_base_is_known_by_the_context(hub, tmp_path, context):
    source = hub("llama31")
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    heads = trained_heads("llama31", tmp_path / "nemo", tmp_path / "ckpt", context=context)
    if context:
        (tmp_path / "nemo").rename(tmp_path / "moved")
    extract_heads(str(heads), str(tmp_path / "heads"))
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(source) and "_name_or_path" not in config


def test_a_base_that_was_not_imported_is_named_by_its_checkpoint(tmp_path):
    (tmp_path / "theirs" / "context").mkdir(parents=True)
    heads = trained_heads("llama31", tmp_path / "theirs", tmp_path / "ckpt", context=False)
    extract_heads(str(heads), str(tmp_path / "heads"))
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "theirs") and config["hidden_size"] == 64


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of("hf://org/name") == name_of("hf://org/name@v1") == "org/name"
    assert name_of("model") == name_of(f"hf://{tmp_path}/model") == str(tmp_path / "model")
