"""What `inspect` says of every kind of checkpoint, complete, incomplete and damaged."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import KINDS, make_model, tensor_of, write_torch_dist
from safetensors.torch import load_file, save_file
from slipway.checkpoint import torch_dist
from slipway.checkpoint.contents import Contents
from slipway.checkpoint.heads import NAMES
from slipway.checkpoint.huggingface import Reader, read_folder
from slipway.commands.extract_heads import extract_heads
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.inspect import inspect
from slipway.commands.merge_heads import merge_heads
from slipway.commands.verify import verify
from slipway.errors import DataError, SlipwayError, UsageError
from slipway.families import FAMILIES, read_config
from slipway.training.heads import DecodingHeads
from test_malformed import CASES, INDEX, SHARD, edit_json, mutate, rename_scales, rewrite_header

PARAMETERS = sum(
    torch.Size(info.shape).numel() for info in FAMILIES["gpt_oss"].rules(FAMILIES["gpt_oss"].tiny_config()).hf.values()
)


def test_weights_under_a_name_that_no_other_command_reads(tmp_path, slipway):
    model = make_model(tmp_path / "hf", "llama31", quantized=False, shards=1)
    (weights,) = model.glob("*.safetensors")
    weights.rename(model / "llama.fp16.safetensors")
    (model / INDEX).unlink(missing_ok=True)
    with pytest.raises(DataError, match="safetensors of other names"):
        import_checkpoint(str(model), str(tmp_path / "out"))
    done = slipway("inspect", model)
    assert done.returncode == 65 and "llama.fp16.safetensors, where other commands look for model.saf" in done.stdout


def test_a_long_name_of_a_problem_stands_apart(tmp_path):
    words = str(Contents("a", "b", "c", 1, {}, {}, problems={"config.json contradicted": ["it"]})).splitlines()
    assert "config.json contradicted 1: it" in words and {line.index(line.split()[-1]) for line in words[1:3]} == {25}


def found(path: Path) -> Contents:
    return inspect(str(path))


@pytest.fixture
def model(mxfp4_model, tmp_path) -> Path:
    return Path(shutil.copytree(mxfp4_model, tmp_path / "model"))


@pytest.fixture
def nemo(nemo_model, tmp_path) -> Path:
    return Path(shutil.copytree(nemo_model, tmp_path / "nemo"))


@pytest.fixture
def trained_heads(nemo_model, tmp_path) -> Path:
    """What heads training saves."""
    heads = DecodingHeads(FAMILIES["gpt_oss"].tiny_config()["hidden_size"]).state_dict()
    state = {f"adapter.{name}": tensor.bfloat16() for name, tensor in heads.items()}
    state |= {f"optimizer.state.exp_avg.{key}": tensor.float() for key, tensor in state.items()}
    write_torch_dist(tmp_path / "trained" / "weights", state)
    shutil.copytree(nemo_model / "context", tmp_path / "trained" / "context")
    return tmp_path / "trained"


# ---------------------------------------------------------------------------- every kind


def test_a_quantised_model(mxfp4_model):
    c = found(mxfp4_model)
    assert (c.format, c.model, c.parameters) == ("Hugging Face", "gpt_oss", PARAMETERS)
    assert c.quantization == {"method": "mxfp4", "block": [32], "tensors": 4}
    assert c.dtypes.keys() == {"BF16", "U8"} and c.dtypes["U8"][0] == 8 and c.tensors == 41
    assert c.files == {f.name: f.stat().st_size for f in mxfp4_model.glob("*.safetensors")}
    assert c.whole and c.exit_code == 0 and c.checked == "config.json"
    assert "mxfp4, blocks of 32, 4 tensors" in str(c) and f"{PARAMETERS:,}" in str(c)


def test_a_bf16_model(tmp_path):
    c = found(make_model(tmp_path / "bf16", quantized=False, shards=3))
    assert (c.parameters, c.quantization, len(c.files)) == (PARAMETERS, None, 3)
    assert c.dtypes == {"BF16": (37, 2 * PARAMETERS)} and c.whole


def test_an_fp8_model_of_a_family_that_is_not_known(tmp_path):
    weight = torch.zeros(300, 200).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.ones(5, 4), "norm": torch.ones(7).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "quantization_config": quantization}))
    c = found(tmp_path)
    assert (c.model, c.parameters) == ("novel", 60_007)
    assert c.quantization == {"method": "fp8", "block": [64, 64], "tensors": 1}
    assert c.whole and c.checked == "" and "unknown: nothing here says" in str(c)
    assert "fp8, blocks of 64×64, 1 tensors" in str(c)


def test_an_adapter_of_peft(tmp_path):
    """As peft saves it; one matrix less, and it is not whole."""
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": torch.zeros(shape)
        for half, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/name"}')
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = inspect(str(tmp_path))
    assert (found.format, found.model, found.parameters) == ("adapter of peft (LORA)", "org/name", 128)
    assert not found.problems
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (missing,) = inspect(str(tmp_path)).problems["missing tensors"]
    assert missing.endswith("q_proj.lora_B.weight")


def test_one_file_of_several(mxfp4_model):
    parts = [found(file) for file in sorted(mxfp4_model.glob("*.safetensors"))]
    assert sum(c.parameters for c in parts) == PARAMETERS
    assert all(c.whole and c.quantization["method"] == "mxfp4" for c in parts)


def test_a_nemo_checkpoint_and_its_weights_alone(nemo, tmp_path):
    for path in (nemo, nemo / "weights"):
        c = found(path)
        assert (c.format, c.model, c.parameters) == ("NeMo checkpoint", "gpt_oss", PARAMETERS)
        assert c.whole and c.checked == "context/hf_config.json" and len(c.files) == 1
    bare = Path(shutil.copytree(nemo / "weights", tmp_path / "elsewhere" / "bare"))
    c = found(bare)
    assert (c.format, c.model, c.parameters) == ("torch_dist weights", "", PARAMETERS)
    assert c.whole and "unknown: nothing here says" in str(c)


def test_a_key_for_each_layer_is_as_good_as_one_for_all(nemo):
    """As releases of megatron-core differ; `export` takes both."""
    reader, apart = torch_dist.Reader(nemo), {}
    for key in reader.tensors:
        before, found_it, after = key.partition("decoder.layers.")
        whole = tensor_of(reader, key)
        names = [f"{before}{found_it}{number}.{after}" for number in range(len(whole))] if found_it else [key]
        apart |= dict(zip(names, whole if found_it else [whole], strict=True))
    assert len(apart) > len(reader.tensors)
    shutil.rmtree(nemo / "weights")
    write_torch_dist(nemo / "weights", apart)
    c = found(nemo)
    assert (c.model, c.parameters) == ("gpt_oss", PARAMETERS) and c.whole and c.checked == "context/hf_config.json"


def test_a_nemo_checkpoint_that_another_began(nemo):
    (nemo / "context" / "hf_config.json").unlink()
    c = found(nemo)
    assert c.model == "gpt_oss" and c.checked == "io.json" and c.whole and "made by NeMo 2" in c.notes


def test_a_training_checkpoint(nemo, tmp_path):
    reader = torch_dist.Reader(nemo)
    state = {key: tensor_of(reader, key) for key in reader.tensors}
    state |= {f"optimizer.state.exp_avg.module.{key}": tensor.float() for key, tensor in state.items()}
    shutil.rmtree(nemo / "weights")
    write_torch_dist(nemo / "weights", state)
    c = found(nemo)
    assert c.format == "NeMo checkpoint with the optimizer's state" and c.parameters == PARAMETERS and c.whole
    assert c.parts == {"model": 16, "optimizer": 16} and c.dtypes["F32"] == (16, 4 * PARAMETERS)


def test_heads_trained_extracted_and_merged(trained_heads, tmp_path):
    c = found(trained_heads)
    assert c.format == "NeMo checkpoint of trained heads with the optimizer's state"
    assert c.whole and c.parts == {"heads": 8, "optimizer": 8}
    extract_heads(str(trained_heads), str(tmp_path / "heads"))
    alone = found(tmp_path / "heads")
    assert alone.format == "extracted heads" and alone.whole and alone.parameters == c.parameters
    base = make_model(tmp_path / "bf16", quantized=False)
    merge_heads(str(tmp_path / "heads"), str(base), str(tmp_path / "merged"))
    merged = found(tmp_path / "merged")
    assert merged.format == "Hugging Face, base merged with heads" and merged.model == "gpt_oss"
    assert merged.whole and merged.parts == {"base": 37, "heads": 8}
    assert merged.parameters == PARAMETERS + alone.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_and_its_import(kind, tmp_path):
    source = make_model(tmp_path / "hf", kind)
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    c = found(source)
    assert c.whole and c.checked == "config.json", str(c)
    assert sum(found(file).parameters for file in source.glob("*.safetensors")) == c.parameters
    reader = Reader(source, read_folder(source), read_config(source / "config.json"))
    assert (c.quantization or {}).get("tensors", 0) == len(reader.quantized)
    c = found(tmp_path / "nemo")
    assert c.whole and c.checked == "context/hf_config.json", str(c)


def test_a_terabyte_takes_seconds(tmp_path):
    """A hundred sparse files of ten gigabytes."""
    where = {}
    for number in range(100):
        file = tmp_path / f"model-{number:05}-of-00100.safetensors"
        places = [(i * 10**7, (i + 1) * 10**7) for i in range(1000)]
        entries = {
            f"layer.{number}.{i}": {"dtype": "BF16", "shape": [1000, 5000], "data_offsets": place}
            for i, place in enumerate(places)
        }
        text = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        with file.open("r+b") as sparse:
            sparse.truncate(8 + len(text) + 10**10)
        where |= dict.fromkeys(entries, file.name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text('{"model_type": "novel"}')
    started = time.process_time()  # of all threads, whatever else runs here
    c = found(tmp_path)
    assert time.process_time() - started < 10
    assert c.parameters == 5 * 10**11 and c.tensors == 100_000 and c.whole and "1 TB in 100 files" in str(c)


def test_safetensors_are_inspected_without_torch(mxfp4_model):
    command = [sys.executable, "-X", "importtime", "-m", "slipway.cli", "inspect", mxfp4_model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch"}


# ---------------------------------------------------------------------------- incomplete


def one_layer_more(config: dict) -> None:
    config.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)


INCOMPLETE = {
    "shard": (lambda m: (m / SHARD).unlink(), "missing files", SHARD),
    "tensors of a shard": (lambda m: (m / SHARD).unlink(), "not in the files", "model.layers."),
    "config": (lambda m: (m / "config.json").unlink(), "missing files", "config.json"),
    "shard without an index": (lambda m: ((m / INDEX).unlink(), (m / SHARD).unlink()), "missing files", SHARD),
    "scales": (rename_scales, "missing scales", "_scales"),
    "a layer": (lambda m: edit_json(m / "config.json", one_layer_more), "missing", "model.layers.2."),
    "a place": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(num_hidden_layers=1, layer_types=["full_attention"])),
        "unexpected",
        "model.layers.1.",
    ),
    "the right shape": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(vocab_size=513)),
        "wrong shape",
        "lm_head.weight [512, 64], expected [513, 64]",
    ),
    "an entry of the index": (
        lambda m: edit_json(m / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "not in the index",
        "lm_head.weight",
    ),
    "one shard of two": (
        lambda m: shutil.copyfile(m / "model-00002-of-00002.safetensors", m / SHARD),
        "not in the files",
        "",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_is_missing_or_unexpected_is_listed(case, model):
    change, kind, name = INCOMPLETE[case]
    change(model)
    c = found(model)
    assert not c.whole and c.exit_code == 65
    assert any(name in entry for entry in c.problems[kind]), c.problems
    assert kind in str(c) and str(c).endswith("no")


def test_files_of_a_nemo_checkpoint_that_are_missing_or_cut_off(nemo):
    file = nemo / "weights" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    assert found(nemo).problems["incomplete files"][0].startswith("__0_0.distcp (")
    file.unlink()
    assert found(nemo).problems == {"missing files": ["__0_0.distcp"]}
    edit_json(nemo / "context" / "hf_config.json", one_layer_more)
    assert len(found(nemo).problems["wrong shape"]) == 13


def test_heads_that_are_not_all_there(trained_heads, tmp_path):
    extract_heads(str(trained_heads), str(tmp_path / "heads"))
    rewrite_header(tmp_path / "heads" / "heads.safetensors", lambda h: h.pop(NAMES[0]))
    (tmp_path / "heads" / "config.json").unlink()
    assert found(tmp_path / "heads").problems == {"missing files": ["config.json"], "missing": [NAMES[0]]}


def test_the_report_is_printed_and_the_exit_code_is_65(model, slipway):
    (model / SHARD).unlink()
    done = slipway("inspect", model)
    assert done.returncode == 65 and done.stderr == ""
    assert "missing files    1: model-00001-of-00002.safetensors" in done.stdout and "more)" in done.stdout
    done = slipway("inspect", model, "--json")
    assert done.returncode == 65 and json.loads(done.stdout)["problems"]["missing files"] == [SHARD]
    assert slipway("inspect", model / SHARD.replace("00001-", "00002-")).returncode == 0


# ---------------------------------------------------------------------------- unreadable


@pytest.mark.parametrize("case", CASES)
def test_every_defect_is_listed_or_refused_in_one_line(case, model):
    CASES[case][0](model)
    try:
        c = found(model)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        unknown = case in ("unknown architecture", "index names a tensor too many")
        assert unknown or not c.whole, str(c)


def test_what_is_no_checkpoint(tmp_path, slipway):
    with pytest.raises(UsageError, match="does not exist"):
        found(tmp_path / "none")
    with pytest.raises(DataError, match="not a checkpoint of a known kind"):
        found(tmp_path)
    (tmp_path / "text").write_text("text")
    with pytest.raises(DataError, match="not a safetensors file"):
        found(tmp_path / "text")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(40))
    with pytest.raises(DataError, match=r"a\.gguf has weights in GGUF, which is not supported; give a \*\.safetensors"):
        found(tmp_path / "a.gguf")
    (tmp_path / "other.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        DataError, match=r"other\.json has no weights of a known kind; .* or the folder of a checkpoint"
    ):
        found(tmp_path / "other.json")
    done = slipway("inspect", tmp_path)
    assert done.returncode == 65 and done.stdout == "" and done.stderr.count("\n") == 1


def test_three_hundred_mutations(model, nemo):
    """Random bytes changed, cut or inserted: a report or one clear line."""
    rng = random.Random(0)
    targets = [model / "config.json", model / INDEX, model / SHARD, nemo / "weights" / ".metadata"]
    targets += [nemo / "context" / "hf_config.json", nemo / "context" / "model.yaml"]
    refused = reported = 0
    for round_ in range(300):
        target = targets[round_ % len(targets)]
        original = target.read_bytes()
        target.write_bytes(mutate(original, rng))
        try:
            c = found(nemo if target.is_relative_to(nemo) else model)
            json.dumps(c.as_dict())
            reported += "\n" in str(c) and not c.whole
        except SlipwayError as error:
            refused += 1
            assert "\n" not in str(error) and error.exit_code in (2, 65), error
        target.write_bytes(original)
    assert refused > 50 and reported > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_dtype_that_no_command_reads_is_a_problem(dtype, tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=False, shards=1)
    file = next(source.glob("*.safetensors"))
    name = "model.layers.1.self_attn.o_proj.weight"
    stored = load_file(file)
    save_file(stored | {name: stored[name].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"tensor {name} is stored as"):
        import_checkpoint(str(source), str(tmp_path / "nemo"))
    (said,) = inspect(str(source)).problems["of a dtype that is not read"]
    assert said.startswith(name) and not inspect(str(source)).whole


def test_a_model_of_transformers_that_fsdp_saved_in_shards_is_named_and_what_joins_it_is_right(tmp_path):
    import torch.distributed.checkpoint as dcp
    from slipway.commands.export import export
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    saved, joined = tmp_path / "pytorch_model_fsdp_0", tmp_path / "joined"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(saved))
    said = "Hugging Face's names .*as FSDP saves them; join them with `accelerate merge-weights`"
    with pytest.raises(DataError, match=said):
        import_checkpoint(str(saved), str(tmp_path / "nemo"))
    with pytest.raises(DataError, match=said):
        export(str(saved), str(tmp_path / "out"), config=str(source))
    assert any("accelerate merge-weights" in note for note in inspect(str(saved)).notes)
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights"]
    subprocess.run([*accelerate, str(saved), str(joined)], check=True, capture_output=True)
    shutil.copy(source / "config.json", joined)
    verify(str(source), str(joined))
