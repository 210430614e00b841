"""Low-rank adapters on their way to Hugging Face: NeMo's own forward pass with them is what the exports must give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, tensor_of, write_torch_dist
from slipway.checkpoint import torch_dist
from slipway.commands.export import export
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import DataError

RANK, ALPHA = 4, 10
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
KINDS = ["llama31", "qwen25_tied", "qwen3_moe", "deepseek_v3", "gpt_oss"]


def with_random_adapters(base: Path, folder: Path) -> torch.nn.Module:
    """NeMo's model with random adapters, which megatron-core saves into `folder` as training does."""
    from slipway.training import forward

    module = forward.load(base)
    from megatron.core import dist_checkpointing
    from nemo.collections.llm.fn.base import walk
    from slipway.training.modes import LoRA

    module = walk(module, LoRA(str(base), 0, TARGETS, RANK, ALPHA, 0.0).transform).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if ".adapter." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    state = {k: v for k, v in module.sharded_state_dict(prefix="module.").items() if ".adapter." in k}
    (folder / "weights").mkdir(parents=True)
    dist_checkpointing.save(state, str(folder / "weights"))
    (folder / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    (folder / "context").mkdir()
    (folder / "context" / "model.yaml").write_text(f"model_transform:\n  alpha: {ALPHA}\noptim:\n  alpha: 3\n")
    return module


def logits_of_nemo(module: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    module.mtp_process = False
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        return module(input_ids=tokens, position_ids=positions, attention_mask=None).float()


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(kind, folder with hf/, nemo/ and lora/, tokens, NeMo's logits with the adapters)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder / "hf", request.param, quantized=False)
    import_checkpoint(str(folder / "hf"), str(folder / "nemo"))
    tokens = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    module = with_random_adapters(folder / "nemo", folder / "lora")
    return request.param, folder, tokens, logits_of_nemo(module, tokens)


def test_merged_into_the_base(trained):
    """The bound is BF16's: the merged weights are rounded once, the adapters' sum in NeMo is not."""
    kind, folder, tokens, wanted = trained
    export(str(folder / "lora"), str(folder / "merged"))
    with torch.no_grad():
        found = transformers_model(folder / "merged")(tokens).logits
        plain = transformers_model(folder / "hf")(tokens).logits
    error, change = (found - wanted).std().item(), (plain - wanted).std().item()
    assert error < 0.02 * change, (kind, error, change)


def test_as_an_adapter_that_peft_loads(trained):
    from peft import PeftModel

    kind, folder, tokens, wanted = trained
    if kind == "gpt_oss":
        with pytest.raises(DataError, match=r"experts.* is not a separate matrix.*leave out --adapter"):
            export(str(folder / "lora"), str(folder / "adapter"), adapter=True)
        return
    export(str(folder / "lora"), str(folder / "adapter"), adapter=True)
    model = PeftModel.from_pretrained(transformers_model(folder / "hf"), folder / "adapter").eval()
    loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in loaded} == set(stored)
    with torch.no_grad():
        found = model(tokens).logits
        plain = transformers_model(folder / "hf")(tokens).logits
    error, change = (found - wanted).std().item(), (plain - wanted).std().item()
    assert error < 0.02 * change, (kind, error, change)


def test_what_does_not_fit_is_said(trained, tmp_path):
    kind, folder, _, _ = trained
    if kind != "llama31":
        return
    make_model(tmp_path / "hf", "llama31", {"intermediate_size": 128}, quantized=False)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "nemo"))
    with pytest.raises(DataError, match=r"linear_fc\d.adapter.* has shape .* needs .*check --base"):
        export(str(folder / "lora"), str(tmp_path / "out"), base=str(tmp_path / "nemo"))
    with pytest.raises(DataError, match="has no low-rank adapters"):
        export(str(folder / "nemo"), str(tmp_path / "out"), adapter=True)
    note = folder / "lora" / "weights" / "adapter_metadata.json"
    text = note.read_text()
    note.write_text('{"model_ckpt_path": "elsewhere"}')
    with pytest.raises(DataError, match="give it with --base"):
        export(str(folder / "lora"), str(tmp_path / "out"))
    note.write_text(text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "peft"])
def test_one_adapter_for_all_experts_is_the_same_one_for_each(trained, tmp_path, adapter):
    """NeMo attaches one to grouped experts, which only Transformer Engine has; here it is cut from equal ones."""
    kind, folder, _, _ = trained
    if kind not in ("qwen3_moe", "deepseek_v3"):
        return
    reader = torch_dist.Reader(folder / "lora")
    tensors = {key: tensor_of(reader, key) for key in reader.tensors}
    experts = [key for key in tensors if ".experts.experts." in key]
    assert experts
    equal = tensors | {key: tensors[key].select(-3, 0).unsqueeze(-3).expand_as(tensors[key]) for key in experts}
    one = tensors | {key: tensors[key].select(-3, 0) for key in experts}
    for name, found in (("equal", equal), ("one", one)):
        write_torch_dist(tmp_path / name / "weights", found)
        shutil.copytree(folder / "lora" / "context", tmp_path / name / "context")
        export(str(tmp_path / name), str(tmp_path / f"{name}-hf"), base=str(folder / "nemo"), adapter=adapter)
    files = sorted((tmp_path / "equal-hf").glob("*.safetensors"))
    assert files and all(file.read_bytes() == (tmp_path / "one-hf" / file.name).read_bytes() for file in files)
