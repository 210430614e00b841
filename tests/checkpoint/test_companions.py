"""Which files go along with the weights, and tokenizer_config.json in the form that both majors read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model, texts
from slipway import cli
from slipway.checkpoint.companions import companions_of
from slipway.errors import DataError

TOKENIZER = [
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer_config.json",
]  # fmt: skip
OTHERS = ["generation_config.json", "README.md", "modeling.py", "custom_generate/generate.py", "index.json"]
STAY = [
    "config.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json",
    "a.safetensors", "a.bin", "a.pt", "a.pth", "a.gguf", "model.safetensors.index.json", ".gitattributes",
    "additional_chat_templates/.hidden", "custom_generate/a.bin", "original/consolidated.pth", "onnx/model.onnx",
    "_private/x", ".cache/x",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (*TOKENIZER, *OTHERS, *STAY):
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}" if name == "tokenizer_config.json" else name)
    return tmp_path / "model"


def test_what_goes_along_and_what_stays(folder):
    found = companions_of(folder)
    assert found.copies == {name: folder / name for name in (*TOKENIZER, *OTHERS)}
    assert found.small == {} and found.left_out == ("onnx/", "original/")
    assert companions_of(folder / "none").copies == companions_of(folder / "README.md").copies == {}


@pytest.mark.parametrize("form", ["nemo", "bridge", "classic"])
def test_nothing_is_lost_on_the_way_there_and_back(tmp_path, form):
    """Of a model with a tokenizer, and of one without, as `save_pretrained` alone leaves it."""
    model = make_model(tmp_path / "model", "llama31", quantized=False)
    others = ("LICENSE", "README.md", "modeling_llama.py", "preprocessor_config.json", "generation_config.json")
    for name in others:
        (model / name).write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text("{}")
    without = tmp_path / "without"
    shutil.copytree(model, without, ignore=shutil.ignore_patterns("token*"))
    for source in (model, without):
        kept = companions_of(source).copies.keys() | companions_of(source).small.keys()
        assert kept >= {*others} and any(name.startswith("tokenizer") for name in kept) == (source == model)
        middle, back = tmp_path / f"{source.name}-{form}", tmp_path / f"{source.name}-back"
        assert cli.main(["import", str(source), str(middle), "--format", form]) == 0
        assert cli.main(["export", str(middle), str(back)]) == 0
        assert {name for name in kept if not (back / name).is_file()} == set()


@pytest.mark.parametrize("form", ["nemo", "classic"])
def test_beside_a_lent_config_anything_may_lie(tmp_path, form):
    """A person's job folder, with data and keys."""
    model = make_model(tmp_path / "model", "llama31", quantized=False)
    assert cli.main(["import", str(model), str(tmp_path / "ckpt"), "--format", form]) == 0
    job, mine = tmp_path / "job", {"id_rsa", "tokens.jsonl", "token", "notes.txt", "train.sh", "secrets.env"}
    shutil.copytree(model, job, ignore=shutil.ignore_patterns("*.safetensors*"))
    for name in (*mine, "LICENSE", "tokenizer.json"):
        (job / name).write_text("{}")
    for number, config in enumerate((job, job / "config.json")):
        out = tmp_path / f"out{number}"
        assert cli.main(["export", str(tmp_path / "ckpt"), str(out), "--config", str(config)]) == 0
        found = {file.name for file in out.iterdir()}
        assert not found & mine and {"tokenizer.json", "LICENSE", "config.json"} <= found


def test_the_tokenizers_files_alone_and_below_a_folder(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    found = companions_of(folder).of_tokenizer().under("context/x")
    names = {f"context/x/{name}": folder / name for name in TOKENIZER if name != "tokenizer_config.json"}
    assert found.copies == names and set(found.small) == {"context/x/tokenizer_config.json"} and found.left_out == ()


@pytest.mark.parametrize(
    "given, wanted",
    [
        (
            {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        ({"tokenizer_class": "PythonBackend"}, {"tokenizer_class": "PreTrainedTokenizer"}),
        ({"extra_special_tokens": ["a", "b"]}, {"additional_special_tokens": ["a", "b"]}),
        (
            {"extra_special_tokens": ["a", "b"], "additional_special_tokens": ["b", "c"]},
            {"additional_special_tokens": ["b", "c", "a"]},
        ),
        ({"tokenizer_class": "Qwen2Tokenizer", "backend": "x", "extra_special_tokens": {"image": "é"}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_tokenizer_config_in_the_form_of_transformers_4(tmp_path, given, wanted):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(given))
    found = companions_of(tmp_path)
    if wanted is None:
        assert found.copies == {file.name: file} and not found.small
    else:
        assert not found.copies
        assert found.small[file.name].decode() == json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"


def test_llamas_tokenizer_that_transformers_5_saved_without_tokenizer_model(tmp_path, newest):
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    model = make_model(tmp_path / "model", "llama2", quantized=False)
    for file in model.glob("*token*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()[0].split("\n")), model_prefix=str(tmp_path / "sp"), vocab_size=400,
        byte_fallback=True, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer(vocab_file=str(tmp_path / "sp.model")).save_pretrained(model)
    text = "def f(x):\n  return  x é"
    wanted = AutoTokenizer.from_pretrained(model)(text).input_ids
    newest.save_config(model)
    (model / "tokenizer.model").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True and config["tokenizer_class"] == "LlamaTokenizer"
    assert cli.main(["import", str(model), str(tmp_path / "nemo")]) == 0
    assert cli.main(["export", str(tmp_path / "nemo"), str(tmp_path / "back")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text).input_ids == wanted
    for folder in (model, tmp_path / "back"):  # loaded and written by transformers 5
        newest.save_config(folder)
    made = [json.loads((folder / "tokenizer.json").read_text()) for folder in (model, tmp_path / "back")]
    assert made[0] == made[1]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"3", b"\xff\xfe"])
def test_a_tokenizer_config_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"as JSON|not a JSON object"):
        companions_of(tmp_path)
