"""Each family, as each major of transformers writes it, in BF16 and in each form that it is published quantised in:
inspect, dequant, import, verify, export; and the same logits in NeMo, in both majors, and after export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import config_of, make_model
from slipway import cli
from slipway.families.quantized import CompressedTensors, Fbgemm, Fp8, Microscaling, Modelopt, Mxfp4, Nvfp4

LENGTH = 96
BOUND = 2e-5  # of the logits' standard deviation, see test_forward.py
SMALL = (32, 48)
# The forms in which models of a kind are published, beside BF16.
FORMS = {
    "gpt_oss": {"mxfp4": Mxfp4()},
    "qwen3_moe": {"fp8": Fp8(block=SMALL)},
    "qwen3_dense_tied": {"fp8": Fp8(block=SMALL), "nvfp4": Nvfp4(), "mxfp8": Microscaling(8)},
    "qwen3_yarn": {},
    "deepseek_v3": {
        "fp8": Fp8(block=SMALL),
        "fp8 with scales of powers of two": Fp8(SMALL, "float8_e8m0fnu"),
        "nvfp4 of modelopt": Nvfp4("modelopt"),
    },
    "moonlight": {},
    "qwen25_tied": {"compressed, a scale per row": CompressedTensors()},
    "qwen25_yarn": {},
    "llama31": {
        "compressed, a scale per row": CompressedTensors(),
        "fbgemm": Fbgemm(),
        "fp8 of modelopt": Modelopt(),
    },
    "llama2": {},
}
CELLS = [(kind, form) for kind, forms in FORMS.items() for form in ("bf16", *forms)]


def command(capsys, *words: object) -> dict:
    """The --json object of a command that must succeed."""
    capsys.readouterr()
    code = cli.main([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


def logits_of_4(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(tokens).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> None:
    difference = ((found - wanted).abs().max() / wanted.std()).item()
    assert wanted.std() > 0.3 and difference <= bound, difference


@pytest.mark.parametrize("major", [4, 5])
@pytest.mark.parametrize("kind, form", CELLS, ids=[f"{kind}, {form}" for kind, form in CELLS])
def test_all_of_it(kind, form, major, newest, tmp_path, capsys):
    from slipway.training.forward import logits_of_nemo

    source = make_model(tmp_path / "hf", kind, quantized=FORMS[kind].get(form, False), shards=1)
    if major == 5 and form == "bf16":
        source = newest.save(source, tmp_path / "saved")
    elif major == 5:
        newest.save_config(source)

    assert command(capsys, "inspect", source)["problems"] == {}
    plain = source
    if form != "bf16":
        plain = tmp_path / "bf16"
        command(capsys, "dequant", source, plain)
        command(capsys, "verify", source, plain)
    mtp = ["--mtp"] if any(".eh_proj." in name for name in names_of(plain)) else []
    command(capsys, "import", source, tmp_path / "nemo", *mtp)
    command(capsys, "verify", source, tmp_path / "nemo")
    command(capsys, "export", tmp_path / "nemo", tmp_path / "exported")
    command(capsys, "verify", tmp_path / "exported", tmp_path / "nemo")

    tokens = torch.randint(5, config_of(kind)["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(7))
    wanted = newest.logits(plain, tokens)
    assert_close(logits_of_nemo(tmp_path / "nemo", tokens), wanted)
    assert_close(logits_of_4(tmp_path / "exported", tokens), wanted)
    assert_close(newest.logits(tmp_path / "exported", tokens), wanted, bound=0)
    if form != "bf16":
        assert_close(logits_of_4(plain, tokens), wanted)


def names_of(folder: Path) -> list[str]:
    from slipway.checkpoint.huggingface import read_folder

    return list(read_folder(folder))


@pytest.mark.parametrize("limit", [0.25, 3.0])
def test_a_limit_of_swiglu_is_carried(limit, newest, tmp_path, capsys):
    """transformers 4 has 7 built in, and the newest major reads it."""
    from slipway.training.forward import logits_of_nemo

    source = make_model(tmp_path / "hf", "gpt_oss", {"swiglu_limit": limit}, quantized=False)
    command(capsys, "import", source, tmp_path / "nemo")
    tokens = torch.randint(5, 512, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    assert_close(logits_of_nemo(tmp_path / "nemo", tokens), newest.logits(source, tokens))
