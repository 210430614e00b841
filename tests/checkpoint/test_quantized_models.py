"""Quantised models of every form: decoded by definition, and imported as their BF16 copy would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from slipway.checkpoint import huggingface
from slipway.commands.demo.checks import by_definition
from slipway.commands.dequant import dequant
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import DataError
from slipway.families import FAMILIES, rules
from slipway.families.quantized import CompressedTensors, Fbgemm, Form, Fp8, Microscaling, Modelopt, Mxfp4, Nvfp4

# By a name for each: (kind of model, form). No side is a multiple of 128, 48 or 20 in all of them: ragged edges.
FORMS: dict[str, tuple[str, Form]] = {
    "mxfp4": ("gpt_oss", Mxfp4()),
    "deepseek": ("deepseek_v3", FAMILIES["deepseek_v3"].FORM),
    "deepseek of 128": ("deepseek_v3", Fp8()),
    "deepseek in e8m0": ("deepseek_v3", Fp8((20, 48), "float8_e8m0fnu")),
    "qwen3": ("qwen3_dense_tied", FAMILIES["qwen3"].FORM),
    "qwen3 moe, bfloat16 scales": ("qwen3_moe", Fp8((48, 20), "bfloat16")),
    "compressed, a scale per row": ("llama31", FAMILIES["llama31"].FORM),
    "compressed, float32": ("qwen25_tied", CompressedTensors(scale_dtype="float32")),
    "compressed, one scale": ("llama31", CompressedTensors("tensor")),
    "fbgemm": ("llama31", Fbgemm()),
    "compressed, blocks": ("qwen3_moe", CompressedTensors("block", (20, 48), "float32")),
    "modelopt": ("llama31", Modelopt()),
    "nvfp4": ("qwen3_dense_tied", Nvfp4()),
    "nvfp4 of modelopt": ("deepseek_v3", Nvfp4("modelopt")),
    "mxfp8": ("deepseek_v3", Microscaling(8)),
    "mxfp8, whole groups": ("qwen3_dense", Microscaling(8)),
    "mxfp4 of compressed": ("llama31", Microscaling(4)),
    "deepseek of 1 x 32 in e8m0": ("qwen3_moe", Fp8((1, 32), "float8_e8m0fnu")),
    "deepseek of 1 x 32": ("qwen3_moe", Fp8((1, 32))),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    """Path → content of every file, without the name of what was imported."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    if context := found.get("context/hf_config.json"):
        config = {name: value for name, value in json.loads(context).items() if name != "_name_or_path"}
        found["context/hf_config.json"] = json.dumps(config).encode()
    return found


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN being any other."""
    return torch.equal(found.nan_to_num(nan=9e9), wanted.nan_to_num(nan=9e9)) and torch.equal(
        found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan()
    )


def change_shards(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the model's tensors and write them as one file."""
    stored = tensors(folder)
    change(stored)
    for file in [*folder.glob("*.safetensors"), *folder.glob(huggingface.INDEX)]:
        file.unlink()
    save_file(stored, folder / huggingface.SINGLE)


def sprinkle_nan(stored: dict[str, torch.Tensor]) -> None:
    """NaN codes of both signs, and zeros of both signs, into every FP8 tensor."""
    for tensor in stored.values():
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).flatten()[:4] = torch.tensor([0x7F, 0xFF, 0x00, 0x80], dtype=torch.uint8)


@pytest.mark.parametrize("name", FORMS)
def test_decoded_by_definition_and_imported_as_its_copy(name, tmp_path, monkeypatch):
    kind, form = FORMS[name]
    source = make_model(tmp_path / "source", kind, quantized=form, shards=3)
    where = json.loads((source / huggingface.INDEX).read_text())["weight_map"]
    stems = {n: n.removesuffix("_packed") for n in where}
    pairs = [(where[n], where[stems[n] + s]) for n in where for s in huggingface.FP8_SCALES if stems[n] + s in where]
    assert isinstance(form, Mxfp4) or any(weight != scale for weight, scale in pairs), "no scale in another shard"

    dequant(str(source), str(tmp_path / "bf16"))
    wanted = by_definition(tensors(source), json.loads((source / "config.json").read_text()))
    found = tensors(tmp_path / "bf16")
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == t.dtype and same_bits(found[n], t) for n, t in wanted.items())

    mtp = kind == "deepseek_v3"
    import_checkpoint(str(source), str(tmp_path / "a"), mtp=mtp)
    import_checkpoint(str(tmp_path / "bf16"), str(tmp_path / "b"), mtp=mtp)
    assert files(tmp_path / "a") == files(tmp_path / "b")

    if not isinstance(form, Mxfp4):  # read in blocks of rows that do not follow the scales' blocks
        monkeypatch.setattr(rules, "MAX_CELL_BYTES", 1000)
        dequant(str(source), str(tmp_path / "by_rows"))
        assert files(tmp_path / "by_rows") == files(tmp_path / "bf16")


@pytest.mark.parametrize("form", [Fp8((20, 48)), Fp8((20, 48), "float8_e8m0fnu"), CompressedTensors()])
def test_nan_codes_and_signed_zeros(form, tmp_path):
    source = make_model(tmp_path / "source", "llama31", quantized=form)
    change_shards(source, sprinkle_nan)
    dequant(str(source), str(tmp_path / "bf16"))
    wanted = by_definition(tensors(source), json.loads((source / "config.json").read_text()))
    found = tensors(tmp_path / "bf16")
    assert sum(int(t.isnan().sum()) for t in found.values()) == 2 * 7 * 2
    assert all(same_bits(found[n], t) for n, t in wanted.items())


def test_scales_of_activations_are_left_out(tmp_path):
    source = make_model(tmp_path / "source", "llama31", quantized=CompressedTensors("tensor"))
    dequant(str(source), str(tmp_path / "a"))
    name = "model.layers.1.mlp.up_proj.input_scale"
    change_shards(source, lambda stored: stored.update({name: torch.ones(1)}))
    dequant(str(source), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


WEIGHT = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
CASES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scale": (lambda t: t.pop(SCALE), f"FP8 tensor {WEIGHT} has no scale"),
    "no weight": (lambda t: t.pop(WEIGHT), f"{WEIGHT} is missing"),
    "scales of another grid": (lambda t: t.update({SCALE: torch.ones(2, 3)}), "needs scales [4, 2], but"),
    "scales that are no numbers": (lambda t: t.update({SCALE: t[SCALE].to(torch.uint8)}), "stored as U8"),
    "int8 is no FP8": (
        lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}),
        f"the form INT8 (tensor {WEIGHT})",
    ),
    "a scale of BF16": (
        lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}),
        f"unexpected tensor {SCALE}; does",
    ),
    "e5m2": (lambda t: t.update({WEIGHT: t[WEIGHT].float().to(torch.float8_e5m2)}), "is stored as F8_E5M2"),
    "vectors": (lambda t: t.update({WEIGHT: t[WEIGHT].flatten().clone()}), "supported only for matrices"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_defect_is_named(case, tmp_path):
    change, message = CASES[case]
    source = make_model(tmp_path / "source", "llama31", quantized=Fp8((32, 48)))
    change_shards(source, change)
    for command in (dequant, import_checkpoint):
        with pytest.raises(DataError) as error:
            command(str(source), str(tmp_path / "out"))
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "about, message",
    [
        ({"quant_method": "gptq"}, "in the form GPTQ (config.json: quantization_config), which is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, "quantization_config is damaged"),
        (["fp8"], "quantization_config is damaged"),
    ],
)
def test_a_quantization_config_that_cannot_be_followed(about, message, tmp_path):
    source = make_model(tmp_path / "source", "llama31", quantized=Fp8((32, 48)))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    with pytest.raises(DataError) as error:
        import_checkpoint(str(source), str(tmp_path / "out"))
    assert message in str(error.value) and "\n" not in str(error.value)
