"""Two checkpoints compared, in every pair of formats, the same and different by a bit."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import KINDS, make_model, tensor_of, write_torch_dist
from safetensors.torch import load_file, save_file
from slipway.checkpoint import torch_dist
from slipway.checkpoint.compare import Different
from slipway.commands.dequant import dequant
from slipway.commands.export import export
from slipway.commands.extract_heads import extract_heads
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.merge_heads import merge_heads
from slipway.commands.verify import Verified, verify
from slipway.errors import DataError, UsageError
from slipway.training import forward
from slipway.training.heads import DecodingHeads
from test_malformed import CASES, edit_json


def verified(a: Path, b: Path, **options) -> Verified:
    return verify(str(a), str(b), **options)


@pytest.fixture(scope="module")
def models(mxfp4_model, nemo_model, tmp_path_factory) -> dict[str, Path]:
    """One model in every format."""
    folder = tmp_path_factory.mktemp("formats")
    bf16, exported, merged = folder / "bf16", folder / "exported", folder / "merged"
    dequant(str(mxfp4_model), str(bf16))
    export(str(nemo_model), str(exported), shard_size="100KB")
    heads = {f"adapter.{n}": t.bfloat16() for n, t in DecodingHeads(64).state_dict().items()}
    write_torch_dist(folder / "heads-training", heads)
    extract_heads(str(folder / "heads-training"), str(folder / "heads"))
    merge_heads(str(folder / "heads"), str(bf16), str(merged))
    reader = torch_dist.Reader(nemo_model)
    state = {key: tensor_of(reader, key).float() for key in reader.tensors}  # as training in float32 saves it
    state |= {f"optimizer.state.exp_avg.module.{key}": tensor for key, tensor in state.items()}
    write_torch_dist(folder / "trained" / "weights", state)
    shutil.copytree(nemo_model / "context", folder / "trained" / "context")
    return {
        "mxfp4": mxfp4_model,
        "bf16": bf16,
        "exported": exported,
        "merged": merged,
        "nemo": nemo_model,
        "trained": folder / "trained",
    }


FORMATS = ("mxfp4", "bf16", "exported", "merged", "nemo", "trained")


@pytest.mark.parametrize("a, b", combinations(FORMATS, 2))
def test_the_same_model_in_any_two_formats(a, b, models):
    found = verified(models[a], models[b])
    assert found.tensors == 37 and found.bytes == 481_696 and found.logits is None


@pytest.fixture
def edited(models, tmp_path):
    """Copies the BF16 model and changes its tensors by a function."""

    def edit(change, name: str = "edited") -> Path:
        folder = Path(shutil.copytree(models["bf16"], tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit


DOWN, UP = "model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("other", FORMATS)
def test_one_bit_of_one_element_is_found(other, edited, models):
    def flip(tensors):
        tensors[DOWN].view(torch.int16)[2, 5, 7] ^= 1

    folder = edited(flip)
    values = [load_file(path / "model.safetensors")[DOWN][2, 5, 7].item() for path in (models["bf16"], folder)]
    with pytest.raises(Different) as error:
        verified(models[other], folder)
    assert f"tensor {DOWN}[2, 5, 7] is {values[0]!r} in the first and {values[1]!r} in the second" in str(error.value)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_of_many_differences_the_first_is_named_every_time(edited, models):
    def change(tensors):
        for name in (
            "lm_head.weight",
            DOWN,
            UP,
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.self_attn.sinks",
        ):
            tensors[name] += 1

    folder = edited(change)
    lines = set()
    for _ in range(10):
        with pytest.raises(Different) as error:
            verified(models["mxfp4"], folder)
        lines.add(str(error.value))
    assert len(lines) == 1 and "tensor lm_head.weight[0, 0] is" in lines.pop()


def test_nan_is_nan_but_zero_has_a_sign(edited):
    def with_value(bits: int):
        return lambda tensors: tensors["model.norm.weight"].view(torch.int16)[3:4].fill_(bits)

    nan, another_nan, zero, minus_zero = (edited(with_value(bits), str(bits)) for bits in (0x7FC0, 0x7FC1, 0, -0x8000))
    assert verified(nan, another_nan).tensors == 37
    with pytest.raises(Different, match=r"model.norm.weight\[3\] is 0.0 in the first and -0.0 in the second"):
        verified(zero, minus_zero)
    with pytest.raises(Different, match=r"is nan in the first and 0.0 in the second"):
        verified(nan, zero, atol=1.0)
    assert verified(zero, minus_zero, atol=1e-9).tensors == 37


def test_a_small_difference_may_be_allowed(edited, models):
    folder = edited(lambda tensors: tensors["model.norm.weight"].__setitem__(0, tensors["model.norm.weight"][0] + 0.01))
    assert verified(models["bf16"], folder, atol=0.05).tensors == 37
    with pytest.raises(Different, match=r"model.norm.weight\[0\]"):
        verified(models["bf16"], folder, atol=0.001)


def test_the_same_tensors_under_another_configuration_are_another_model(models, tmp_path):
    folder = Path(shutil.copytree(models["bf16"], tmp_path / "model"))
    edit_json(folder / "config.json", lambda c: c.update(rope_theta=10000))
    with pytest.raises(Different, match=r"rotary_base is 150000 in .* and 10000 in"):
        verified(models["nemo"], folder)


def test_memory_for_less_than_a_tensor_is_enough(models):
    assert verified(models["mxfp4"], models["nemo"], memory="1KB").bytes == 481_696


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_its_import(kind, tmp_path):
    source = make_model(tmp_path / "hf", kind)
    import_checkpoint(str(source), str(tmp_path / "nemo"))
    assert verified(source, tmp_path / "nemo").bytes > 100_000


def test_layers_for_multi_token_prediction_count_where_both_have_them(tmp_path):
    source = make_model(tmp_path / "hf", "deepseek_v3")
    for name, mtp in (("with", True), ("without", False)):
        import_checkpoint(str(source), str(tmp_path / name), mtp=mtp)
    fewer = verified(source, tmp_path / "without").tensors
    assert verified(source, tmp_path / "with").tensors > fewer
    assert verified(tmp_path / "without", tmp_path / "with").tensors == fewer
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    name = "model.layers.3.eh_proj.weight"
    file = changed / json.loads((changed / "model.safetensors.index.json").read_text())["weight_map"][name]
    stored = load_file(file)
    stored[name].neg_()
    save_file(stored, file)
    with pytest.raises(Different, match=re.escape(f"{name}[0, 0]")):
        verified(changed, tmp_path / "with")
    assert verified(changed, tmp_path / "without").tensors == fewer


# ---------------------------------------------------------------------------- the command


def test_the_command_says_what_it_compared(models, slipway):
    done = slipway("verify", models["mxfp4"], models["nemo"])
    assert done.returncode == 0 and "are the same model: 37 tensors, 482 kB in" in done.stdout
    found = json.loads(slipway("verify", models["mxfp4"], models["nemo"], "--json").stdout)
    assert found["same"] is True and found["bytes"] == 481_696 and found["logits"] is None


def test_the_command_ends_with_1_and_one_line_where_they_differ(edited, models, slipway):
    folder = edited(lambda tensors: tensors[UP].neg_())
    done = slipway("verify", models["bf16"], folder)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("slipway: ") and f"differ: tensor {UP}[0, 0, 0] is" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_each_defect_is_named(case, models, tmp_path):
    change, message = CASES[case]
    folder = Path(shutil.copytree(models["mxfp4"], tmp_path / "model"))
    change(folder)
    for a, b in ((folder, models["nemo"]), (models["bf16"], folder)):
        with pytest.raises(DataError) as error:
            verified(a, b)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_cannot_be_read_are_named(models, tmp_path):
    folder = Path(shutil.copytree(models["nemo"], tmp_path / "nemo"))
    file = folder / "weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[300_000:302_000] = bytes(2000)
    file.write_bytes(content)
    with pytest.raises((DataError, Different)) as error:
        verified(models["bf16"], folder)
    assert "\n" not in str(error.value)


def test_what_cannot_be_compared(models, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        verified(models["bf16"], tmp_path / "none")
    with pytest.raises(UsageError, match=r"--atol is -1\.0; it must be 0 or more"):
        verified(models["bf16"], models["nemo"], atol=-1.0)
    with pytest.raises(DataError, match=r"config.json is missing"):
        verified(models["bf16"], tmp_path)


# ---------------------------------------------------------------------------- the forward pass


def test_the_forward_pass_of_a_quantised_model_and_of_nemo(models, warm, tmp_path):
    words = ["verify", str(models["mxfp4"]), str(models["nemo"]), "--forward", "--json"]
    code, output = warm.start(words, tmp_path / "output").finish()
    assert code == 0, output
    logits = json.loads(output[output.index("{") :])["logits"]
    assert 0 < logits["max_difference"] < 1e-4 and logits["top1_agreement"] == 1.0 and logits["tolerance"] == 1e-4


def test_the_forward_pass_finds_what_tensors_cannot_show(models, tmp_path, slipway, warm):
    """NeMo's own configuration is wrong, the tensors and the copy of config.json are right."""
    folder = Path(shutil.copytree(models["nemo"], tmp_path / "nemo"))
    path = folder / "context" / "io.json"
    text = path.read_text()
    assert text.count('"value": 150000,') == 1
    path.write_text(text.replace('"value": 150000,', '"value": 100,'))
    assert slipway("verify", models["merged"], folder).returncode == 0
    words = ["verify", str(models["merged"]), str(folder), "--forward"]
    code, output = warm.start(words, tmp_path / "output").finish()
    assert code == 1 and "have the same tensors, but their logits differ by at most" in output


def test_the_forward_pass_of_two_hugging_face_models_is_the_same_to_the_bit(models):
    found = verified(models["bf16"], models["mxfp4"], forward=True, tolerance=0.0)
    assert found.logits.max_difference == 0 and "100.0% of the first choices agree" in str(found)


def test_those_logits_are_what_transformers_gives_by_itself(models):
    from slipway.checkpoint import compare
    from transformers import AutoModelForCausalLM

    tokens = forward.random_tokens(512, 64)
    module = AutoModelForCausalLM.from_pretrained(models["bf16"], dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = module.eval()(tokens).logits
    assert torch.equal(forward.logits_of(compare.open_model(models["mxfp4"]), tokens), wanted)
