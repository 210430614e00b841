"""Adapters that peft made, on their way to NeMo and back: peft's own logits and weights are what must come out."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from slipway.checkpoint import torch_dist
from slipway.commands.export import export
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.inspect import inspect
from slipway.commands.verify import verify
from slipway.errors import DataError
from test_lora import attach, logits_of_nemo, transformers_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Case:
    """An adapter of peft, and the rank that NeMo's has."""

    kind: str
    rank: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


PATTERNS = {
    "target_modules": [*ATTENTION, *MLP],
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
    "alpha_pattern": {"q_proj": 5, "v_proj": 3},
}
CASES = {
    "q and v alone": Case("llama31", 8, {"target_modules": ["q_proj", "v_proj"]}),
    "every layer": Case("qwen25_tied", 12, {"target_modules": [*ATTENTION, *MLP]}, torch.bfloat16),
    "patterns": Case("llama31", 10, PATTERNS),
    "rslora": Case("llama31", 4, {"target_modules": ["o_proj", "down_proj"], "use_rslora": True}),
    "one layer": Case("llama31", 12, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "experts": Case("qwen3_moe", 12, {"target_modules": [*ATTENTION, *MLP]}),
    "latent attention": Case("deepseek_v3", 8, {"target_modules": [*LATENT, *MLP]}),
    "latent attention without q_a": Case("moonlight", 4, {"target_modules": ["q_proj", *LATENT[2:]]}),
    "attention of gpt-oss": Case("gpt_oss", 12, {"target_modules": ATTENTION}),
    "dora": Case("llama31", 12, {"target_modules": [*ATTENTION, *MLP], "use_dora": True}),
    "dora on q alone": Case("llama31", 4, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on latent attention": Case("deepseek_v3", 4, {"target_modules": LATENT, "use_dora": True}),
}


def save_adapter(base: Path, folder: Path, case: Case, change: Callable[[Any], None] = lambda _: None):
    """peft's model with a random adapter, which it saves into `folder`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **case.options})
    model = get_peft_model(transformers_model(base), config).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = values.to(case.dtype).float()
    change(model)
    model.save_pretrained(folder)
    if case.dtype == torch.bfloat16:
        tensors = load_file(folder / FILE)
        save_file({k: v.to(case.dtype) for k, v in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    return model


def nemo_with(folder: Path) -> torch.nn.Module:
    """NeMo's model with the adapters of a checkpoint, as its context describes them, loaded by megatron-core."""
    from slipway.training import forward

    module = forward.load(folder / "base")
    from megatron.core import dist_checkpointing
    from nemo.collections.llm.fn.base import walk
    from nemo.lightning.io import load_context

    method = load_context(folder / "context", subpath="model").model_transform
    module = walk(module, attach(method, module.config)).eval()
    state = {k: v for k, v in module.sharded_state_dict(prefix="module.").items() if ".adapter." in k}
    loaded = dist_checkpointing.load(state, str(folder / "weights"))
    module.load_state_dict({k.removeprefix("module."): v for k, v in loaded.items()}, strict=False)
    return module


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def imported(request, tmp_path_factory):
    """(case, folder with hf/, peft/ and nemo/, peft's model, tokens, its logits)."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("peft")
    make_model(folder / "hf", case.kind, quantized=False)
    model = save_adapter(folder / "hf", folder / "peft", case)
    summary = import_checkpoint(str(folder / "hf"), str(folder / "nemo"), adapter=str(folder / "peft"))
    assert summary.details["rank"] == case.rank
    assert (" --dora" in str(summary)) == case.options.get("use_dora", False), "as what `train` needs"
    tokens = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return case, folder, model, tokens, model(tokens).logits


def test_an_adapter_alone_is_named_as_one(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DataError, match="is an adapter of peft; give its model, and this folder with --adapter"):
        import_checkpoint(str(adapter), str(tmp_path / "out"))


def test_nemo_computes_what_peft_does(imported):
    case, folder, _, tokens, wanted = imported
    found = logits_of_nemo(nemo_with(folder / "nemo"), tokens)
    assert (found - wanted).abs().max() < 1e-4, case


def test_the_same_adapter_comes_back(imported, tmp_path):
    case, folder, _, tokens, wanted = imported
    export(str(folder / "nemo"), str(tmp_path / "back"), adapter=True)
    before, after = deltas(folder / "peft"), deltas(tmp_path / "back")
    zero = {name for name, delta in after.items() if not delta[0].any()}
    assert before.keys() == after.keys() - zero
    scaled = "alpha_pattern" in case.options
    for name, (product, scale, magnitude) in before.items():
        found, its_scale, its_magnitude = after[name]
        if scaled:
            assert torch.allclose(found * its_scale, product * scale, rtol=1e-6, atol=1e-8), name
        else:
            assert torch.equal(found, product) and math.isclose(scale, its_scale), name
        assert magnitude is None or torch.equal(magnitude, its_magnitude)
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_model(folder / "hf"), tmp_path / "back").eval()
    with torch.no_grad():
        assert (model(tokens).logits - wanted).abs().max() < 1e-5


def deltas(folder: Path) -> dict[str, tuple[torch.Tensor, float, torch.Tensor | None]]:
    """Module → (B·A, its scale, DoRA's magnitude) of a folder of peft's."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    tensors, config = load_file(folder / FILE), LoraConfig.from_pretrained(folder)
    found = {}
    for name in {key.partition(".lora_")[0] for key in tensors}:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        a, b = (tensors[f"{name}.lora_{part}.weight"].float() for part in "AB")
        assert len(a) == rank
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        found[name] = b @ a, scale, tensors.get(f"{name}.lora_magnitude_vector")
    return found


def test_merged_it_is_what_peft_merges(imported, tmp_path):
    """To one rounding: peft merges in float32, and ours is written in BF16. Where weight and adapter nearly cancel out,
    float32's own rounding is left."""
    case, folder, model, _, _ = imported
    export(str(folder / "nemo"), str(tmp_path / "merged"))
    from copy import deepcopy

    wanted = deepcopy(model).merge_and_unload().state_dict()
    found = transformers_model(tmp_path / "merged").state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        one_step = torch.nextafter(tensor.abs(), torch.tensor(math.inf)) * 2**-8 + 2**-24
        assert ((found[name] - tensor).abs() <= one_step).all(), (case, name)


# ---------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder with a tiny llama in hf/ and an adapter for it in peft/; not to be written to."""
    folder = tmp_path_factory.mktemp("adapter")
    make_model(folder / "hf", "llama31", quantized=False)
    save_adapter(folder / "hf", folder / "peft", Case("llama31", 4, {"target_modules": [*ATTENTION, *MLP]}))
    return folder


def refused(folder: Path, peft: Path, out: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        import_checkpoint(str(folder / "hf"), str(out), adapter=str(peft))
    assert "\n" not in str(caught.value) and not out.exists()


FIELDS = {
    "peft_type": ("ADALORA", "only 'LORA' is supported"),
    "task_type": ("SEQ_CLS", "only 'CAUSAL_LM' is supported"),
    "init_lora_weights": ("pissa", "changes the base's weights"),
    "bias": ("lora_only", "field bias"),
    "modules_to_save": (["lm_head"], "field modules_to_save"),
    "trainable_token_indices": ([3], "field trainable_token_indices"),
    "target_parameters": (["mlp.experts.down_proj"], "field target_parameters"),
    "layer_replication": ([[0, 2]], "field layer_replication"),
    "lora_bias": (True, "field lora_bias"),
    "use_qalora": (True, "field use_qalora"),
    "alora_invocation_tokens": ([1, 2], "field alora_invocation_tokens"),
    "arrow_config": ({"top_k": 2}, "field arrow_config"),
    "use_bdlora": ({"nblocks": 2}, "field use_bdlora"),
    "kasa_config": ({"beta": 1}, "field kasa_config"),
    "from_tomorrow": (1, "field from_tomorrow"),
    "use_dora": (True, "lora_magnitude_vector is missing"),
    "r": (8, "has shape .* but rank 8"),
    "lora_alpha": ("10", "lora_alpha is '10'"),
    "rank_pattern": ({"q_proj": 2}, "q_proj.lora_A.weight has shape .* but rank 2"),
    "alpha_pattern": ({"(a+)+": 2}, "alpha_pattern is"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_not_supported_is_named(adapter, tmp_path, name):
    value, said = FIELDS[name]
    shutil.copytree(adapter / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config | {name: value}))
    refused(adapter, tmp_path / "peft", tmp_path / "out", said)


def test_no_effect_has_what_has_none(adapter, tmp_path):
    """peft itself sets fan_in_fan_out to false; what is for the training does not change the weights."""
    shutil.copytree(adapter / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    config |= {"fan_in_fan_out": True, "lora_dropout": 0.5, "target_modules": "all-linear"}
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    for name, peft in (("a", adapter / "peft"), ("b", tmp_path / "peft")):
        import_checkpoint(str(adapter / "hf"), str(tmp_path / name), adapter=str(peft))
    files = [sorted((tmp_path / name / "weights").glob("*.distcp")) for name in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


STEM = "base_model.model.model.layers.1.self_attn."
TENSORS = {
    "B alone": (lambda t: t.pop(f"{STEM}q_proj.lora_A.weight"), r"layers.1.self_attn.q_proj.lora_A is missing"),
    "A alone": (lambda t: t.pop(f"{STEM}q_proj.lora_B.weight"), r"layers.1.self_attn.q_proj.lora_B is missing"),
    "a layer": (
        lambda t: [t.pop(f"{STEM}o_proj.lora_{part}.weight") for part in "AB"],
        r"layers.1.self_attn.o_proj.lora_A.weight is missing, although adapter_config.json has it",
    ),
    "an unknown one": (
        lambda t: t.update({f"{STEM}q_proj.scaling": torch.ones(1)}),
        r"q_proj.scaling is not supported",
    ),
    "a bias": (lambda t: t.update({f"{STEM}q_proj.bias": torch.ones(64)}), r"q_proj.bias .* it is a bias"),
    "a magnitude too many": (
        lambda t: t.update({f"{STEM}q_proj.lora_magnitude_vector": torch.ones(64)}),
        r"lora_magnitude_vector is there, although use_dora is false",
    ),
    "of another model": (
        lambda t: t.update({f"{STEM}qq.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}),
        r"self_attn.qq has an adapter, but .* has no such matrix; check the base",
    ),
    "integers": (
        lambda t: t.update({f"{STEM}q_proj.lora_A.weight": t[f"{STEM}q_proj.lora_A.weight"].to(torch.int8)}),
        r"q_proj.lora_A.weight is stored as I8",
    ),
    "none": (lambda t: t.clear(), "contains no tensors"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_is_accounted_for(adapter, tmp_path, name):
    change, said = TENSORS[name]
    shutil.copytree(adapter / "peft", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / FILE)
    change(tensors)
    save_file(tensors, tmp_path / "peft" / FILE)
    refused(adapter, tmp_path / "peft", tmp_path / "out", said)


# What peft itself saves of modules that NeMo's adapters are not for.
FOREIGN = {
    "embedding": ("llama31", {"target_modules": ["embed_tokens"]}, "embed_tokens.* changes the embedding"),
    "head": ("llama31", {"target_modules": ["lm_head"]}, "lm_head.* changes the embedding or the head"),
    "router": ("qwen3_moe", {"target_modules": ["gate"]}, "mlp.gate has an adapter, and NeMo attaches none there"),
    "trained head": ("llama31", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "experts of gpt-oss": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters",
    ),
    "dora with a bias": ("qwen25_tied", {"target_modules": ["q_proj"], "use_dora": True}, "q_proj has a bias"),
    "dora on experts": ("qwen3_moe", {"target_modules": MLP, "use_dora": True}, "cannot compute for experts"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_nemo_cannot_attach_is_named(tmp_path, name):
    kind, options, said = FOREIGN[name]
    make_model(tmp_path / "hf", kind, quantized=False)
    save_adapter(tmp_path / "hf", tmp_path / "peft", Case(kind, 4, options))
    refused(tmp_path, tmp_path / "peft", tmp_path / "out", said)


def test_another_base_and_other_files_are_refused(adapter, tmp_path):
    make_model(tmp_path / "hf", "llama31", {"intermediate_size": 128}, quantized=False)
    refused(tmp_path, adapter / "peft", tmp_path / "out", r"has shape .* and .* need .*; check the base")
    refused(adapter, adapter / "hf", tmp_path / "out", "adapter_config.json is missing")
    old = shutil.copytree(adapter / "peft", tmp_path / "old")
    (old / FILE).rename(old / "adapter_model.bin")
    refused(adapter, old, tmp_path / "out", "adapter_model.bin is a pickle")


def test_a_checkpoint_of_the_base_is_not_written_again(adapter, tmp_path):
    import_checkpoint(str(adapter / "hf"), str(tmp_path / "nemo"))
    import_checkpoint(str(tmp_path / "nemo"), str(tmp_path / "a"), adapter=str(adapter / "peft"))
    import_checkpoint(str(adapter / "hf"), str(tmp_path / "b"), adapter=str(adapter / "peft"))
    assert not (tmp_path / "a" / "base").exists() and (tmp_path / "b" / "base" / "weights").is_dir()
    for name in ("a", "b"):
        export(str(tmp_path / name), str(tmp_path / f"{name}-hf"))
    files = [sorted((tmp_path / f"{name}-hf").rglob("*")) for name in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    (tmp_path / "b").rename(tmp_path / "c")  # its base moves with it
    export(str(tmp_path / "c"), str(tmp_path / "c-hf"), adapter=True)
    config = json.loads((tmp_path / "c-hf" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(adapter / "hf")
    with pytest.raises(DataError, match="is a checkpoint of adapters; give its base"):
        import_checkpoint(str(tmp_path / "a"), str(tmp_path / "d"), adapter=str(adapter / "peft"))


def test_flags_that_an_adapter_has_no_use_for_are_refused(adapter, tmp_path, slipway):
    config = str(adapter / "hf")
    for flags in (["--format", "classic"], ["--format", "bridge"], ["--config", config], ["--num-layers", "1"]):
        done = slipway("import", adapter / "hf", tmp_path / "out", "--adapter", adapter / "peft", *flags)
        assert done.returncode == 2 and "--adapter writes NeMo's checkpoint of adapters" in done.stderr, flags
        assert not (tmp_path / "out").exists()


def test_what_is_left_out_of_the_base_is_said_with_an_adapter_too(adapter, tmp_path):
    source = Path(shutil.copytree(adapter / "hf", tmp_path / "hf"))
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_text("")
    shard = next(source.glob("*.safetensors"))
    buffer = {"model.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(shard) | buffer, shard, metadata={"format": "pt"})
    alone = import_checkpoint(str(source), str(tmp_path / "nemo")).details["notes"]
    assert len(alone) == 2 and "rotary_emb" in alone[0] and "original/" in alone[1]
    done = import_checkpoint(str(source), str(tmp_path / "out"), adapter=str(adapter / "peft"))
    assert done.details["notes"][-2:] == alone


def test_an_adapter_beside_the_model_is_said_to_be_left_and_does_not_go_along(adapter, tmp_path, newest):
    """As `merge_and_unload().save_pretrained` into the adapter's own folder leaves it. With an adapter_config.json of
    its own the export could not be loaded: transformers looks for the adapter's weights."""
    both = Path(shutil.copytree(adapter / "hf", tmp_path / "both"))
    for name in (FILE, CONFIG):
        shutil.copy(adapter / "peft" / name, both)
    done = import_checkpoint(str(both), str(tmp_path / "nemo"))
    said = f"left out the adapter of peft beside the model ({CONFIG})"
    assert done.details["notes"][0].startswith(said) and inspect(str(both)).notes == done.details["notes"]
    export(str(tmp_path / "nemo"), str(tmp_path / "back"))
    verify(str(adapter / "hf"), str(tmp_path / "back"))
    tokens = torch.randint(5, 500, (2, 40))
    wanted = transformers_model(adapter / "hf")(tokens).logits
    assert torch.equal(transformers_model(str(tmp_path / "back"))(tokens).logits, wanted)
    assert (newest.logits(tmp_path / "back", tokens) - wanted).abs().max() < 1e-5
    both_given = import_checkpoint(str(both), str(tmp_path / "with"), adapter=str(both))
    assert both_given.details["rank"] == 12


def test_equal_adapters_of_experts_become_the_one_that_grouped_experts_have(tmp_path):
    make_model(tmp_path / "hf", "qwen3_moe", quantized=False)

    def same_for_all(model):
        state = model.state_dict()
        for name in state:
            if "lora_" in name and ".experts." in name:
                first = re.sub(r"experts\.\d+", "experts.0", name)
                state[name].copy_(state[first])

    save_adapter(tmp_path / "hf", tmp_path / "peft", Case("qwen3_moe", 4, {"target_modules": MLP}), same_for_all)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "nemo"), adapter=str(tmp_path / "peft"))
    reader = torch_dist.Reader(tmp_path / "nemo")
    experts = [info.shape for key, info in reader.tensors.items() if ".experts.experts." in key]
    assert experts and all(len(shape) == 3 for shape in experts)
    export(str(tmp_path / "nemo"), str(tmp_path / "back"), adapter=True)
    before, after = deltas(tmp_path / "peft"), deltas(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[n][0], after[n][0]) for n in before)
