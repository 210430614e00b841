"""The proof of a conversion: transformers and NeMo compute the same logits, before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import KINDS, config_of, make_model
from safetensors.torch import load_file, save_file
from slipway.commands.export import export
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import DataError

# Longer than the length from which rope is scaled, and than every sliding window.
LENGTH = 160
# Of the logits' standard deviation. The same float32 arithmetic in another order: some units in the last place (2^-23
# of a value) over two to four layers. A shifted window, a wrong scale or a missing transpose is off by 0.01 and more.
BOUND = 2e-5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def tokens_of(count: int = LENGTH) -> torch.Tensor:
    """int64 [2, count]"""
    return torch.randint(5, 512, (2, count), generator=torch.Generator().manual_seed(7))


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [batch, sequence, vocabulary] by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = config["model_type"].replace("kimi_k2", "deepseek_v3")  # whose class Kimi's own code copies
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_in_transformers_and_nemo_and_after_export(kind, tmp_path):
    from slipway.training.forward import logits_of_nemo

    source = make_model(tmp_path / "hf", kind, quantized=False)
    import_checkpoint(str(source), str(tmp_path / "nemo"), mtp=config_of(kind).get("num_nextn_predict_layers", 0) > 0)
    export(str(tmp_path / "nemo"), str(tmp_path / "exported"))
    before, after = tensors(source), tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], part) and after[name].dtype == part.dtype for name, part in before.items())

    tokens = tokens_of()
    wanted = reference_logits(source, tokens)
    assert torch.equal(reference_logits(tmp_path / "exported", tokens), wanted)
    found = logits_of_nemo(tmp_path / "nemo", tokens)
    assert_close(kind, found, wanted)


def assert_close(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = ((found - wanted).abs().max() / wanted.std()).item()
    print(f"{what}: max |difference| is {difference:.1e} of the standard deviation {wanted.std():.2f}")
    assert wanted.std() > 0.3 and difference < BOUND


def reference_mtp_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [batch, sequence, vocabulary]: what the MTP layer predicts for the token after the next.

    transformers has no such layer; this is the DeepSeek-V3 report's formula over transformers' own decoder layer.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config, h, number = model.config, model.config.hidden_size, model.config.num_hidden_layers
    layer = deepseek.DeepseekV3DecoderLayer(config, number)
    layer.enorm, layer.hnorm, layer.norm = (deepseek.DeepseekV3RMSNorm(h, config.rms_norm_eps) for _ in range(3))
    layer.eh_proj = nn.Linear(2 * h, h, bias=False)
    prefix = f"model.layers.{number}."
    own = {name.removeprefix(prefix): part for name, part in tensors(folder).items() if name.startswith(prefix)}
    embedding, head = own.pop("embed_tokens.weight").float(), own.pop("shared_head.head.weight").float()
    layer.load_state_dict({name.replace("shared_head.norm", "norm"): part for name, part in own.items()})
    following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        both = [layer.eval().enorm(embedding[following]), layer.hnorm(hidden)]
        joined = layer.eh_proj(torch.cat(both, dim=-1))
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        causal = torch.full((tokens.size(1),) * 2, float("-inf")).triu(1).expand(tokens.size(0), 1, -1, -1)
        rope = model.model.rotary_emb(joined, positions)
        return layer.norm(layer(joined, attention_mask=causal, position_embeddings=rope)) @ head.T


def test_mtp_predicts_the_same_in_nemo(tmp_path):
    from slipway.training.forward import load

    source = make_model(tmp_path / "hf", "deepseek_v3", quantized=False)
    import_checkpoint(str(source), str(tmp_path / "nemo"), mtp=True)
    tokens, logits = tokens_of(), []
    module = load(tmp_path / "nemo")
    module.output_layer.register_forward_hook(lambda _, __, output: logits.append(output[0].transpose(0, 1).clone()))
    with torch.no_grad():
        positions = torch.arange(LENGTH).expand_as(tokens)
        module(input_ids=tokens, position_ids=positions, attention_mask=None, labels=tokens)
    ahead, main = logits
    assert_close("main", main, reference_logits(source, tokens))
    assert_close("MTP", ahead, reference_mtp_logits(source, tokens))


def test_a_checkpoint_without_a_tokenizer_is_built(tmp_path):
    """What `import` writes now, and what it wrote before: a call of a tokenizer whose files are not there."""
    from slipway.training.forward import logits_of_nemo

    source = make_model(tmp_path / "hf", "qwen3_dense", quantized=False)
    import_checkpoint(str(source), str(tmp_path / "before"))
    for file in (tmp_path / "before" / "context" / "nemo_tokenizer").iterdir():
        if file.name != "config.json":
            file.unlink()
    for file in source.glob("*token*"):
        file.unlink()
    import_checkpoint(str(source), str(tmp_path / "now"))
    assert b"AutoTokenizer" not in (tmp_path / "now" / "context" / "io.json").read_bytes()
    before, now = (logits_of_nemo(tmp_path / name, tokens_of()) for name in ("before", "now"))
    assert torch.equal(before, now)


def test_without_its_mtp_layer_a_model_is_the_same_but_for_that(tmp_path):
    """Left out on import, left out on export; and what transformers saved without it is read again."""
    source = make_model(tmp_path / "hf", "deepseek_v3", quantized=False)
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    export(str(tmp_path / "nemo"), str(tmp_path / "exported"))
    before, after = tensors(source), tensors(tmp_path / "exported")
    kept = {name for name in before if not name.startswith("model.layers.3.")}
    assert after.keys() == kept and all(torch.equal(after[name], before[name]) for name in kept)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    shutil.copy(source / "config.json", tmp_path / "exported")
    import_checkpoint(str(tmp_path / "exported"), str(tmp_path / "again"))
    assert (tmp_path / "again" / "weights" / "__0_0.distcp").read_bytes() == (
        tmp_path / "nemo" / "weights" / "__0_0.distcp"
    ).read_bytes()
    with pytest.raises(DataError, match="has no layer for multi-token prediction"):
        import_checkpoint(str(tmp_path / "exported"), str(tmp_path / "none"), mtp=True)


def test_an_mtp_layer_with_an_embedding_of_its_own_is_refused(tmp_path):
    source = make_model(tmp_path / "hf", "deepseek_v3", quantized=False, shards=1)
    (file,) = source.glob("*.safetensors")
    stored = load_file(file)
    stored["model.layers.3.embed_tokens.weight"][7, 7] += 1
    save_file(stored, file)
    with pytest.raises(DataError, match=r"model.layers.3.embed_tokens.weight is not a copy"):
        import_checkpoint(str(source), str(tmp_path / "nemo"), mtp=True)
    import_checkpoint(str(source), str(tmp_path / "without"))
