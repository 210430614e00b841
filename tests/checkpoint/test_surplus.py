"""Tensors beyond the weights: what everyone else ignores is left out and counted, by every command alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from slipway.commands.dequant import dequant
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.inspect import inspect
from slipway.commands.verify import verify
from slipway.errors import DataError
from slipway.families.quantized import CompressedTensors
from test_quantized_models import change_shards, files, tensors

ONE = torch.ones(1)
ATTENTION = "model.layers.{}.self_attn."
# As those who write them name them: (in each layer, what the summary says of two layers).
CACHE = "left out {} scales of the KV cache, which weights do not need"
INPUTS = "left out {} scales of activations, which weights do not need"
NAMES = {
    "compressed-tensors": (("k_scale", "v_scale", "q_scale"), CACHE.format(6)),
    "compressed-tensors, zero points": (("k_zero_point", "v_zero_point"), CACHE.format(4)),
    "AutoFP8": (("kv_scale",), CACHE.format(2)),
    "AutoFP8, older": (("k_proj.output_scale", "v_proj.output_scale"), CACHE.format(4)),
    "ModelOpt": (("k_proj.k_scale", "v_proj.v_scale"), CACHE.format(4)),
    "vLLM": (("attn.k_scale", "attn.v_scale", "qkv_proj.k_scale"), CACHE.format(6)),
    "Quark": (("q_proj.output_scale", "prob_output_scale"), CACHE.format(4)),
    "inputs": (("q_proj.input_scale", "o_proj.input_zero_point", "o_proj.input_global_scale"), INPUTS.format(6)),
    "outputs": (("o_proj.output_scale",), INPUTS.format(2)),
    "rotary": (("rotary_emb.inv_freq",), "left out 2 buffers of rotary_emb, which are computed from config.json"),
    "rotary, cached": (("rotary_emb.cos_cached", "rotary_emb.sin_cached"), "left out 4 buffers of rotary_emb"),
}


def edit_config(folder: Path, **new: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **new}.items() if v is not ...}))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "llama", "llama31", quantized=CompressedTensors("tensor"), shards=1)


@pytest.mark.parametrize("kind", NAMES)
def test_what_everyone_ignores_is_left_out_and_counted(kind, quantised, tmp_path):
    names, said = NAMES[kind]
    source = Path(shutil.copytree(quantised, tmp_path / "hf"))
    added = {f"{ATTENTION.format(layer)}{name}": ONE for layer in range(2) for name in names}
    change_shards(source, lambda stored: stored.update({name: one.clone() for name, one in added.items()}))
    for command in (dequant, import_checkpoint):
        done = command(str(source), str(tmp_path / command.__name__))
        assert any(note.startswith(said) for note in done.details["notes"]), done.details
        assert said in str(done)
    dequant(str(quantised), str(tmp_path / "without"))
    assert files(tmp_path / "dequant") == files(tmp_path / "without")
    found = inspect(str(source))
    assert found.whole and any(note.startswith(said) for note in found.notes) and said in str(found)
    assert found.as_dict()["notes"] == found.notes
    verify(str(source), str(tmp_path / "import_checkpoint"))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_norm.weight", "model.layers.0.extra_scale", "scale"])
def test_everything_else_is_an_error(name, quantised, tmp_path):
    source = Path(shutil.copytree(quantised, tmp_path / "hf"))
    change_shards(source, lambda stored: stored.update({name: ONE}))
    with pytest.raises(DataError, match="unexpected tensor"):
        dequant(str(source), str(tmp_path / "out"))
    assert inspect(str(source)).problems == {"unexpected": [name]}


@pytest.mark.parametrize("value", [0, ...])
def test_layers_for_mtp_that_config_json_switches_off(value, tmp_path):
    source = make_model(tmp_path / "hf", "deepseek_v3", shards=1)
    names = [name for name in tensors(source) if name.startswith("model.layers.3.")]
    weights = [name for name in names if not name.endswith("_scale_inv")]
    import_checkpoint(str(source), str(tmp_path / "before"))
    edit_config(source, num_nextn_predict_layers=value)
    done = import_checkpoint(str(source), str(tmp_path / "nemo"))
    said = f"left out layer 3 for multi-token prediction ({len(weights)} tensors), which config.json does not have"
    assert done.details["notes"][0].startswith(said)
    assert (tmp_path / "nemo/weights/__0_0.distcp").read_bytes() == (
        tmp_path / "before/weights/__0_0.distcp"
    ).read_bytes()
    found = inspect(str(source))
    assert found.whole and found.notes[0].startswith(said)
    dequant(str(source), str(tmp_path / "bf16"))
    assert not [name for name in tensors(tmp_path / "bf16") if name.startswith("model.layers.3.")]
    with pytest.raises(DataError, match="has no layer for multi-token prediction"):
        import_checkpoint(str(source), str(tmp_path / "mtp"), mtp=True)


def test_a_layer_too_many_that_is_not_for_mtp_is_an_error(tmp_path):
    source = make_model(tmp_path / "hf", "deepseek_v3", shards=1)
    edit_config(source, num_hidden_layers=2, num_nextn_predict_layers=0)
    with pytest.raises(DataError, match=r"unexpected tensor model\.layers\.2\."):
        import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert inspect(str(source)).problems["unexpected"][0].startswith("model.layers.2.")


# ---------------------------------------------------------------------------- experts as a stack


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_experts_as_transformers_5_has_them_in_memory(kind, newest, tmp_path, monkeypatch):
    from slipway.families import rules

    changes = {"num_nextn_predict_layers": 0} if kind == "deepseek_v3" else {}
    source = make_model(tmp_path / "hf", kind, changes, quantized=False, shards=1)
    saved = newest.save(source, tmp_path / "stacks", stacks=True)
    stacks = [name for name in load_file(saved / "model.safetensors") if name.endswith("experts.gate_up_proj")]
    assert stacks, "transformers 5 wrote no stacks"
    verify(str(source), str(saved))
    assert inspect(str(saved)).whole
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", 1000)  # read by rows
    import_checkpoint(str(saved), str(tmp_path / "nemo"))
    verify(str(source), str(tmp_path / "nemo"))


def test_a_stack_of_another_shape_is_named(tmp_path):
    source = make_model(tmp_path / "hf", "qwen3_moe", quantized=False, shards=1)
    module = "model.layers.0.mlp.experts"

    def stack(stored: dict[str, torch.Tensor]) -> None:
        downs = [stored.pop(f"{module}.{number}.down_proj.weight") for number in range(4)]
        stored[f"{module}.down_proj"] = torch.stack(downs).transpose(1, 2).contiguous()

    change_shards(source, stack)
    with pytest.raises(DataError, match="holds all experts in one tensor") as error:
        import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert "[4, 48, 64]; expected [4, 64, 48]" in str(error.value)


# ---------------------------------------------------------------------------- models of another kind


@pytest.mark.parametrize("name", ["score.weight", "classifier.weight"])
def test_a_reward_model_is_named(name, tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    change_shards(source, lambda stored: stored.update({name: stored.pop("lm_head.weight")[:1].clone()}))
    edit_config(source, architectures=["LlamaForSequenceClassification"])
    for command in (import_checkpoint, lambda path, _: inspect(path)):
        with pytest.raises(DataError) as error:
            command(str(source), str(tmp_path / "nemo"))
        assert f"a classifier or reward model (LlamaForSequenceClassification): it has {name}" in str(error.value)


@pytest.mark.parametrize(
    "prefix, said", [("", "names of a decoder alone"), ("module.model.", "begin with module.model.")]
)
def test_a_model_without_its_head_or_inside_another_is_named(prefix, said, tmp_path):
    source = make_model(tmp_path / "hf", "qwen25_tied", quantized=False)

    def rename(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            stored[prefix + name.removeprefix("model.")] = stored.pop(name)

    change_shards(source, rename)
    for command in (import_checkpoint, lambda path, _: inspect(path)):
        with pytest.raises(DataError, match=said):
            command(str(source), str(tmp_path / "nemo"))


def test_a_classifiers_name_alone_refuses_nothing(tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    edit_config(source, architectures=["LlamaForSequenceClassification"])
    import_checkpoint(str(source), str(tmp_path / "nemo"))


# ---------------------------------------------------------------------------- roots of Megatron


def megatron_root(nemo: Path, root: Path, iteration: str = "12") -> Path:
    """A folder as Megatron-Bridge leaves one, with our context beside the iteration."""
    root.mkdir()
    shutil.copytree(nemo / "weights", root / f"iter_{int(iteration):07d}")
    shutil.copytree(nemo / "context", root / "context")
    (root / "latest_checkpointed_iteration.txt").write_text(iteration + "\n")
    return root


def test_the_newest_iteration_of_a_megatron_root_is_taken(nemo_model, mxfp4_model, tmp_path):
    from slipway.commands.export import export

    root = megatron_root(nemo_model, tmp_path / "root")
    assert inspect(str(root)).path == str(root / "iter_0000012") and inspect(str(root)).whole
    export(str(root), str(tmp_path / "a"))
    export(str(nemo_model), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    verify(str(mxfp4_model), str(root))


def test_a_megatron_root_without_its_iteration_or_its_files(nemo_model, tmp_path):
    root = megatron_root(nemo_model, tmp_path / "root")
    (root / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(DataError, match="names iteration 13, but there is no iter_0000013"):
        inspect(str(root))
    (root / "iter_0000013" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(DataError, match="not a checkpoint of a known kind"):
        inspect(str(root))


# ---------------------------------------------------------------------------- copies


def two_copies(folder: Path, shards: tuple[int, int], listed: int) -> None:
    """The final norm in two of three shards, with the shard's number as values; the index lists one of them."""
    name = "model.norm.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for number in (1, 2, 3):
        file = folder / f"model-{number:05}-of-00003.safetensors"
        stored = {key: tensor for key, tensor in load_file(file).items() if key != name}
        if number in shards:
            stored[name] = torch.full((64,), float(number)).bfloat16()
        save_file(stored, file, metadata={"format": "pt"})
        if number == listed:
            index["weight_map"][name] = file.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards, listed", [((1, 2), 1), ((1, 2), 2), ((2, 3), 3), ((1, 3), 1)])
def test_of_a_tensor_in_two_shards_the_last_ones_is_taken_as_both_majors_do(newest, shards, listed, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "hf", "llama31", quantized=False, shards=3)
    two_copies(source, shards, listed)
    done = import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert done.details["notes"] == [
        f"model.norm.weight is in several files: the last one's (model-{shards[1]:05}-of-00003.safetensors) is taken, "
        "as transformers does"
    ]
    assert inspect(str(source)).whole and inspect(str(source)).notes == done.details["notes"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "4")
    verify(str(tmp_path / "4"), str(tmp_path / "nemo"))
    verify(str(newest.save(source, tmp_path / "5")), str(tmp_path / "nemo"))


def test_an_index_that_lists_the_head_of_a_tied_model(tmp_path):
    source = make_model(tmp_path / "hf", "qwen25_tied", quantized=False)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert inspect(str(source)).whole


@pytest.mark.parametrize("kind", ["qwen25_tied", "llama31_tied", "qwen3_dense_tied"])
def test_a_tied_model_of_which_only_the_head_is_stored(kind, newest, tmp_path):
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "hf", kind, quantized=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    shutil.copytree(source, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_model(model, str(tmp_path / "saved" / "model.safetensors"), metadata={"format": "pt"})
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert "lm_head.weight" in stored and "model.embed_tokens.weight" not in stored
    said = "lm_head.weight is read as the embedding, which is not stored: config.json ties the two"
    assert import_checkpoint(str(tmp_path / "saved"), str(tmp_path / "nemo")).details["notes"] == [said]
    assert inspect(str(tmp_path / "saved")).whole and inspect(str(tmp_path / "saved")).notes == [said]
    verify(str(source), str(tmp_path / "nemo"))
    verify(str(newest.save(tmp_path / "saved", tmp_path / "5")), str(tmp_path / "nemo"))
    edit_config(tmp_path / "saved", tie_word_embeddings=False)
    with pytest.raises(DataError, match=r"tensor model\.embed_tokens\.weight is missing"):
        import_checkpoint(str(tmp_path / "saved"), str(tmp_path / "untied"))


def test_one_file_is_taken_before_an_index_as_both_majors_do(newest, tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    other = make_model(tmp_path / "other", "llama31", quantized=False, shards=1, seed=5)
    shutil.copy(other / "model-00001-of-00001.safetensors", source / "model.safetensors")
    done = import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert done.details["notes"] == [
        "model.safetensors is read, and not the files of model.safetensors.index.json, as transformers does"
    ]
    verify(str(other), str(tmp_path / "nemo"))
    verify(str(newest.save(source, tmp_path / "5")), str(tmp_path / "nemo"))
