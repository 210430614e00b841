"""Which form a model is quantised in: what others write is read, and what is not read is refused by its own name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
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
from slipway.families.quantized import Fp8, Microscaling, Modelopt, Nvfp4
from test_quantized_models import change_shards, files, same_bits, tensors
from test_surplus import edit_config
from transformers5 import PYTHON

Stored = dict[str, torch.Tensor]
LINEAR = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))
WEIGHT = "model.layers.1.mlp.up_proj.weight"


# ---------------------------------------------------------------------------- what others write


COMPRESSED = ("nvfp4", "mxfp4", "mxfp8", "channel", "tensor")


def linear(folder: Path) -> Stored:
    """The weights that are compressed: 112 columns are no multiple of 32, and stay as they are in its quantiser too."""
    return {n: t for n, t in tensors(folder).items() if n.endswith(LINEAR) and t.shape[1] % 32 == 0}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Stored:
    """What compressed-tensors makes of them in each form, in one process: it takes seconds to import."""
    folder = tmp_path_factory.mktemp("compressed")
    chosen = linear(make_model(folder / "hf", "llama31", quantized=False, shards=1))
    given = {f"{form}.{n.removesuffix('.weight')}": t.float() for form in COMPRESSED for n, t in chosen.items()}
    save_file(given, folder / "given.safetensors")
    words = [PYTHON, "-W", "ignore", Path(__file__).with_name("compressed.py")]
    subprocess.run([*words, folder / "given.safetensors", folder / "made.safetensors"], check=True, capture_output=True)
    return load_file(folder / "made.safetensors")


@pytest.mark.parametrize("form", COMPRESSED)
def test_what_compressed_tensors_writes_is_read_as_it_reads_it(form, written, tmp_path):
    """Bit for bit: it rounds where we do. (Of a scale of 255, which the standard says is NaN, it makes infinity.)"""
    source = make_model(tmp_path / "hf", "llama31", quantized=False, shards=1)
    plain, chosen = tensors(source), linear(source)
    begins = f"{form}."
    parts = {name.removeprefix(begins): tensor for name, tensor in written.items() if name.startswith(begins)}
    wanted = {n.removesuffix("decompressed") + "weight": t for n, t in parts.items() if n.endswith("decompressed")}
    assert wanted.keys() == chosen.keys()

    def compress(stored: Stored) -> None:
        for name in chosen:
            del stored[name]
        stored |= {name: tensor for name, tensor in parts.items() if not name.endswith("decompressed")}

    change_shards(source, compress)
    edit_config(source, quantization_config={"quant_method": "compressed-tensors", "format": "mixed-precision"})
    done = dequant(str(source), str(tmp_path / "bf16"))
    assert done.details["decoded_tensors"] == len(chosen)
    found = tensors(tmp_path / "bf16")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert same_bits(tensor, wanted[name].bfloat16() if name in wanted else plain[name]), name


def test_modelopts_file_is_read_and_stays_behind(tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=Nvfp4("modelopt"), shards=1)
    about = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    told = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": about}
    (source / "hf_quant_config.json").write_text(json.dumps(told))
    edit_config(source, quantization_config=...)
    assert inspect(str(source)).quantization == {"method": "nvfp4", "block": [16], "tensors": 14}
    dequant(str(source), str(tmp_path / "bf16"))
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    from slipway.commands.export import export

    export(str(tmp_path / "nemo"), str(tmp_path / "exported"))
    for folder in ("bf16", "nemo", "exported"):
        assert not list((tmp_path / folder).rglob("hf_quant_config.json"))
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {**about, "quant_algo": "NVFP4_AWQ"}}))
    with pytest.raises(DataError, match=r"NVFP4 AWQ of ModelOpt \(hf_quant_config\.json\)"):
        dequant(str(source), str(tmp_path / "out"))
    for text in ("{", "[]", '{"quantization": 1}'):
        (source / "hf_quant_config.json").write_text(text)
        with pytest.raises(DataError, match=r"hf_quant_config\.json (is damaged|cannot be|is not a JSON)"):
            dequant(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize("nested", [False, True])
def test_the_older_name_of_the_quantisation_config(nested, tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=Fp8((32, 48)), shards=1)
    dequant(str(source), str(tmp_path / "a"))
    about = {"weight_block_size": [32, 48], "quant_method": "fp8"}
    config = {"compression_config": {"quantization_config": about} if nested else about}
    edit_config(source, quantization_config=..., **config)
    dequant(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "compression_config" not in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize(
    "form, stale",
    [
        (Nvfp4("modelopt"), {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
        (Nvfp4(), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (Nvfp4(), None),
        (Microscaling(8), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        (Microscaling(4), {"quant_method": "mxfp4"}),
        (Modelopt(), {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    ],
)
def test_a_stale_quantisation_config_does_not_mislead(form, stale, tmp_path):
    source = make_model(tmp_path / "hf", "qwen3_dense", quantized=form)
    dequant(str(source), str(tmp_path / "a"))
    edit_config(source, quantization_config=stale)
    dequant(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert inspect(str(source)).whole


PATTERNS = {
    "modules_to_not_convert": ["model.layers.1", "lm_head"],
    "ignore": ["re:.*mlp.*", "lm_head"],
    "ignored_layers": ["model.layers.1.mlp.up_proj"],
    "exclude_modules": ["model.layers.1*", "*mlp*"],
}


@pytest.mark.parametrize("field", PATTERNS)
def test_excluded_modules_are_as_they_are_stored(field, tmp_path):
    """Excluded and plain, excluded and yet quantised, and plain although nothing excludes it: what is stored counts."""
    source = make_model(tmp_path / "hf", "llama31", quantized=Fp8((32, 48)), shards=1)
    dequant(str(source), str(tmp_path / "all"))
    plain = tensors(tmp_path / "all")
    config = json.loads((source / "config.json").read_text())["quantization_config"]

    def change(stored: Stored) -> None:
        for name in (WEIGHT, "model.layers.0.self_attn.q_proj.weight"):
            del stored[f"{name}_scale_inv"]
            stored[name] = plain[name]

    change_shards(source, change)
    edit_config(source, quantization_config={**config, field: PATTERNS[field]})
    done = dequant(str(source), str(tmp_path / "bf16"))
    assert done.details["decoded_tensors"] == 12 and inspect(str(source)).whole
    found = tensors(tmp_path / "bf16")
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())

    change_shards(source, lambda stored: stored.pop("model.layers.1.mlp.down_proj.weight_scale_inv"))
    with pytest.raises(DataError, match=r"down_proj\.weight has no scale; download the file with"):
        dequant(str(source), str(tmp_path / "out"))


def test_a_model_merged_in_bf16_with_the_config_of_its_base(tmp_path):
    """QLoRA's users merge into BF16 and keep quantization_config: every other program reads what is stored."""
    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    import_checkpoint(str(source), str(tmp_path / "a"))
    edit_config(source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    import_checkpoint(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b") and inspect(str(source)).whole


def test_scales_of_blocks_in_four_dimensions(tmp_path):
    """ModelOpt's FP8_PB_WO: [down, 1, across, 1]."""
    source = make_model(tmp_path / "hf", "llama31", quantized=Fp8((32, 48)), shards=1)
    dequant(str(source), str(tmp_path / "a"))

    def four(stored: Stored) -> None:
        for name in [name for name in stored if name.endswith("_scale_inv")]:
            stored[name.removesuffix("_inv")] = stored.pop(name)[:, None, :, None].contiguous()

    change_shards(source, four)
    dequant(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    change_shards(source, lambda t: t.update({f"{WEIGHT}_scale": torch.ones(4, 2, 2, 1)}))
    with pytest.raises(DataError, match=r"needs scales \[4, 2\], but .*_scale has \[4, 2, 2, 1\]"):
        dequant(str(source), str(tmp_path / "out"))


def test_zero_points_must_be_zero(tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=Modelopt(), shards=1)
    dequant(str(source), str(tmp_path / "a"))
    name = f"{WEIGHT}_zero_point"
    zero = torch.tensor([0.0, -0.0]).to(torch.float8_e4m3fn)
    change_shards(source, lambda stored: stored.update({name: zero}))
    dequant(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    change_shards(source, lambda stored: stored.update({name: torch.ones(1, dtype=torch.int8)}))
    with pytest.raises(DataError, match="_zero_point is not zero; only symmetric"):
        dequant(str(source), str(tmp_path / "out"))


DEFECTS: dict[str, tuple[Nvfp4 | Microscaling, Callable[[Stored], object], str]] = {
    "no scales": (Nvfp4(), lambda t: t.pop(f"{WEIGHT}_scale"), f"{WEIGHT}_packed has no scales; download the file"),
    "no scale of the tensor": (Nvfp4(), lambda t: t.pop(f"{WEIGHT}_global_scale"), f"with {WEIGHT}_global_scale"),
    "no second scale": (Nvfp4("modelopt"), lambda t: t.pop(f"{WEIGHT}_scale_2"), f"the file with {WEIGHT}_scale_2"),
    "no first scale": (Nvfp4("modelopt"), lambda t: t.pop(f"{WEIGHT}_scale"), f"download the file with {WEIGHT}_scale"),
    "no weight": (Nvfp4(), lambda t: t.pop(f"{WEIGHT}_packed"), f"{WEIGHT} is missing"),
    "another grid": (
        Nvfp4(),
        lambda t: t.update({f"{WEIGHT}_scale": t[f"{WEIGHT}_scale"][:, :2].contiguous()}),
        "in NVFP4 needs scales [112, 4], but",
    ),
    "scales of groups of 16 in MXFP4": (
        Microscaling(4),
        lambda t: t.update({f"{WEIGHT}_scale": torch.zeros(112, 4, dtype=torch.uint8)}),
        "in MXFP4 needs scales [112, 2], but",
    ),
    "many numbers for the tensor": (
        Nvfp4(),
        lambda t: t.update({f"{WEIGHT}_global_scale": torch.ones(112)}),
        "one number is needed",
    ),
    "a stack": (
        Nvfp4(),
        lambda t: t.update({f"{WEIGHT}_packed": t[f"{WEIGHT}_packed"][None].clone()}),
        "supported are matrices in NVFP4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFECTS)
def test_each_defect_is_named(case, tmp_path):
    form, change, message = DEFECTS[case]
    source = make_model(tmp_path / "hf", "llama31", quantized=form)
    change_shards(source, change)
    for command in (dequant, import_checkpoint):
        with pytest.raises(DataError) as error:
            command(str(source), str(tmp_path / "out"))
        assert message in str(error.value) and "\n" not in str(error.value)
    try:
        assert not inspect(str(source)).whole
    except DataError as error:
        assert message in str(error)


# ---------------------------------------------------------------------------- what is not read


def each(change: Callable[[str, torch.Tensor], Stored]) -> Callable[[Stored], Stored]:
    """The tensors with every linear layer's weight changed."""

    def changed(stored: Stored) -> Stored:
        out: Stored = {}
        for name, tensor in stored.items():
            out |= change(name, tensor) if name.endswith(LINEAR) else {name: tensor}
        return out

    return changed


def module(name: str) -> str:
    return name.removesuffix("weight")


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@each
def packed_int4(name: str, t: torch.Tensor) -> Stored:
    rows, columns = t.shape
    scale = torch.ones(rows, columns // 16).bfloat16()
    return {f"{name}_packed": zeros(rows, columns // 8), f"{name}_scale": scale, f"{name}_shape": torch.tensor(t.shape)}


@each
def int8(name: str, t: torch.Tensor) -> Stored:
    return {name: t.to(torch.int8), f"{name}_scale": torch.ones(t.shape[0], 1)}


@each
def gptq(name: str, t: torch.Tensor) -> Stored:
    m, (rows, columns) = module(name), t.shape
    scales = torch.ones(1, rows).half()
    return {f"{m}qweight": zeros(columns // 8, rows), f"{m}qzeros": zeros(1, rows // 8), f"{m}scales": scales}


@each
def fp4(name: str, t: torch.Tensor) -> Stored:
    state = torch.zeros(80, dtype=torch.uint8)
    packed = {name: zeros(t.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(t.numel() // 64)}
    return {**packed, f"{name}.quant_map": torch.ones(16), f"{name}.quant_state.bitsandbytes__fp4": state}


@each
def llm_int8(name: str, t: torch.Tensor) -> Stored:
    return {name: t.to(torch.int8), f"{module(name)}SCB": torch.ones(t.shape[0])}


@each
def hqq(name: str, t: torch.Tensor) -> Stored:
    m = module(name)
    return {f"{m}W_q": zeros(8, 8, dtype=torch.uint8), f"{m}scale": torch.ones(8), f"{m}zero": torch.ones(8)}


@each
def aqlm(name: str, t: torch.Tensor) -> Stored:
    m = module(name)
    codes = zeros(*t.shape, 1, dtype=torch.int16)
    return {f"{m}codes": codes, f"{m}codebooks": torch.ones(1, 256, 1, 8).half(), f"{m}scales": torch.ones(8)}


@each
def eetq(name: str, t: torch.Tensor) -> Stored:
    return {name: t.T.to(torch.int8).contiguous(), f"{module(name)}weight_scales": torch.ones(t.shape[0]).half()}


@each
def modelopt_awq(name: str, t: torch.Tensor) -> Stored:
    m, (rows, columns) = module(name), t.shape
    packed = {name: zeros(rows // 2, columns, dtype=torch.uint8), f"{name}_scale": torch.ones(rows, 1).bfloat16()}
    return {**packed, f"{m}pre_quant_scale": torch.ones(columns).bfloat16()}


def compressed(form: str, kind: str, bits: int, **more: object) -> dict:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "strategy": "group", "group_size": 16}}
    about = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return about | more


BNB = {"quant_method": "bitsandbytes"}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
# (what config.json says, what is stored, the name that the line must give).
UNREAD: dict[str, tuple[dict | None, Callable[[Stored], Stored], str]] = {
    "int4": (compressed("pack-quantized", "int", 4), packed_int4, "INT4 pack-quantized of compressed-tensors"),
    "int4, nothing said": (None, packed_int4, "INT4 or INT8 pack-quantized of compressed-tensors"),
    "int8": (compressed("int-quantized", "int", 8), int8, "INT8 int-quantized of compressed-tensors"),
    "int8, nothing said": (None, int8, "INT8"),
    "int8 in blocks": ({"quant_method": "blockwise_int8"}, int8, "INT8 in blocks"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq, "GPTQ"),
    "awq": ({"quant_method": "awq", "bits": 4}, gptq, "AWQ"),
    "gptq or awq, nothing said": (None, gptq, "GPTQ or AWQ"),
    "gptq, said to be fp8": ({"quant_method": "fp8"}, gptq, "GPTQ or AWQ"),
    "fp4": ({**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, fp4, "bitsandbytes FP4"),
    "fp4, nothing said": (None, fp4, "bitsandbytes"),
    "llm.int8": ({**BNB, "load_in_8bit": True}, llm_int8, "bitsandbytes INT8"),
    "llm.int8, nothing said": (None, llm_int8, "bitsandbytes INT8"),
    "hqq": ({"quant_method": "hqq"}, hqq, "HQQ"),
    "hqq, nothing said": (None, hqq, "HQQ"),
    "aqlm": ({"quant_method": "aqlm"}, aqlm, "AQLM"),
    "eetq": ({"quant_method": "eetq"}, eetq, "EETQ"),
    "eetq, nothing said": (None, eetq, "EETQ"),
    "modelopt awq": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, modelopt_awq, "INT4 AWQ of ModelOpt"),
    "modelopt awq, nothing said": (None, modelopt_awq, "AWQ of ModelOpt"),
    "an unknown one": ({"quant_method": "brandnew"}, int8, "quant_method 'brandnew'"),
    "an unknown one of modelopt": ({"quant_method": "modelopt", "quant_algo": "NEW3"}, int8, "NEW3 of ModelOpt"),
    "sparse": (compressed("dense", "float", 8, sparsity_config={"format": "marlin-24"}), int8, "marlin-24"),
    "rotated": (compressed("dense", "float", 8, transform_config={"a": {}}), int8, "compressed-tensors with transform"),
    "a mixture": (
        {**MIXED, "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W4A8_AWQ"}}},
        modelopt_awq,
        "INT4 AWQ of ModelOpt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_refused_by_its_own_name(case, tmp_path):
    about, change, name = UNREAD[case]
    source = make_model(tmp_path / "hf", "llama31", quantized=False, shards=1)
    stored = change(tensors(source))
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, source / "model.safetensors")
    edit_config(source, quantization_config=about)
    for command in (dequant, import_checkpoint, lambda path, _: inspect(path)):
        with pytest.raises(DataError) as error:
            command(str(source), str(tmp_path / "out"))
        line = str(error.value)
        assert f"is quantised in the form {name}" in line and "\n" not in line
        assert "download" not in line and "incomplete" not in line and "get the model in BF16" in line


@pytest.mark.parametrize(
    "file, form", [("a-Q4_K_M.gguf", "GGUF"), ("consolidated.00.pth", "Meta's"), ("tf_model.h5", "TensorFlow's")]
)
def test_weights_in_other_forms_are_named(file, form, tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=False, shards=1)
    for old in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        old.unlink()
    (source / file).write_bytes(b"x" * 100)
    for command in (dequant, import_checkpoint, lambda path, _: inspect(path)):
        with pytest.raises(DataError, match=f"its weights are in {form}"):
            command(str(source), str(tmp_path / "out"))


def test_no_registered_form_is_lost(tmp_path):
    """A model in each form that is read: verify takes it and its BF16 copy for the same model."""
    for form in (Nvfp4(), Microscaling(8), Modelopt()):
        source = make_model(tmp_path / "hf", "qwen3_moe", quantized=form)
        dequant(str(source), str(tmp_path / "bf16"))
        verify(str(source), str(tmp_path / "bf16"))
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "bf16")
