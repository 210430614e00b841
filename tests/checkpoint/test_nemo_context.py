"""The context of a NeMo checkpoint, as Fiddle itself writes and reads such calls; without NeMo."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import fiddle
import pytest
import torch
from fiddle._src.experimental import serialization
from slipway.checkpoint import nemo_context
from slipway.checkpoint.nemo_context import Call
from slipway.families.decoder import Symbol


@pytest.fixture
def known(monkeypatch):
    """Makes a class of this name, in a module of this name, and gives it."""

    def make(target: str) -> type:
        module, _, name = target.partition(":")
        kind = type(name, (), {"__init__": lambda self, **fields: None, "__module__": module})
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, kind)
        return kind

    return make


def expanded(whole: dict[str, Any]) -> Any:
    """The tree with every object in the place of the reference to it."""

    def at(value: Any) -> Any:
        if isinstance(value, list):
            return [at(each) for each in value]
        if isinstance(value, dict):
            if value.get("type") == "ref":
                return at(whole["objects"][value["key"]])
            return {key: at(each) for key, each in value.items()}
        return value

    return at(whole["root"])


def test_calls_are_written_as_fiddle_writes_them(known):
    outer, inner = known("some.outer:Outer"), known("some.inner:Inner")
    config = fiddle.Config(outer, x=1, y=fiddle.Config(inner, a=[1, None], b="s"), z=(True, 0.5))
    call = Call(
        "some.outer:Outer", {"x": 1, "y": Call("some.inner:Inner", {"a": [1, None], "b": "s"}), "z": (True, 0.5)}
    )
    graph = nemo_context._Graph()
    text = graph.json(graph.call(call, "<root>"))
    ours, theirs = json.loads(text), json.loads(serialization.dump_json(config))
    assert expanded(ours) == expanded(theirs)
    assert ours["version"] == theirs["version"] and set(ours) == set(theirs)
    assert set(ours["refcounts"]) == set(ours["objects"]) and set(ours["refcounts"].values()) == {1}
    assert text.startswith(b'{\n "root": {\n  "type"'), "a line for each value, so that versions can be compared"
    assert serialization.load_json(text.decode()) == config


MODEL, CONFIG = "nemo.of.model:Model", "nemo.of.model.config:Config"
TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer:AutoTokenizer"
FIELDS = {"num_layers": 2, "act": Symbol("torch.nn.functional:silu"), "window": [1, 2], "eps": 1e-6, "none": None}


@pytest.mark.parametrize("adapters", [False, True])
def test_the_three_files(known, adapters):
    context, model, config, tokenizer, lora = map(
        known, ("nemo.lightning.io.pl:TrainerContext", MODEL, CONFIG, TOKENIZER, "nemo.peft:LoRA")
    )
    transform = Call("nemo.peft:LoRA", {"target_modules": ["a", "b"], "dim": 8}) if adapters else None
    files = nemo_context.context_files(MODEL, CONFIG, FIELDS, {"model_type": "tiny", "x": "é"}, transform)
    assert list(files) == ["io.json", "model.yaml", "hf_config.json"]
    dtypes = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    fields = fiddle.Config(config, **{**FIELDS, "act": torch.nn.functional.silu, **dtypes})
    more = {"model_transform": fiddle.Config(lora, target_modules=["a", "b"], dim=8)} if adapters else {}
    words = fiddle.Config(tokenizer, pretrained_model_name="nemo_tokenizer")
    # NeMo's tools that load the whole context need the trainer's name in it.
    wanted = fiddle.Config(context, model=fiddle.Config(model, config=fields, tokenizer=words, **more), trainer=None)
    assert serialization.load_json(files["io.json"].decode()) == wanted
    yaml = (
        "_target_: nemo.of.model.Model\nconfig:\n  _target_: nemo.of.model.config.Config\n"
        "  act: torch.nn.functional.silu\n  bf16: true\n  eps: 1e-06\n  none: null\n  num_layers: 2\n"
        "  params_dtype: torch.bfloat16\n  pipeline_dtype: torch.bfloat16\n  window: [1, 2]\n"
    )
    if adapters:
        yaml += 'model_transform:\n  _target_: nemo.peft.LoRA\n  target_modules:\n  - "a"\n  - "b"\n  dim: 8\n'
    assert files["model.yaml"].decode() == yaml
    assert files["hf_config.json"].decode() == '{\n  "model_type": "tiny",\n  "x": "\\u00e9"\n}\n'
    assert (nemo_context.SOURCE_CONFIG, nemo_context.HF_FILES) == ("hf_config.json", "hf_files")
