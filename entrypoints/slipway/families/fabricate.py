"""Random models in the exact Hugging Face layout: the demo and the tests use them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slipway.families import family_of
from slipway.families.config import canonical
from slipway.families.decoder import is_tied
from slipway.families.quantized import Form
from slipway.families.rules import Copies
from slipway.tensors.refs import INDEX, TORCH_NAMES, TensorInfo

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def fabricate(
    folder: Path,
    config: dict[str, Any],
    texts: Iterable[str],
    *,
    quantized: bool | Form,
    shards: int = 2,
    seed: int = 0,
) -> None:
    """Write a random model with its tokenizer into a new folder.

    Args:
        config: config.json of the BF16 form; the vocabulary must have room for 256 bytes and the special tokens.
        texts: the tokenizer is trained on them.
        quantized: write the matrices in a quantised form; True = the family's own form.
        shards: number of safetensors files.
    """
    where = folder / "config.json"
    family = family_of(config, where)
    known = canonical(config, family.ALIASES, family.defaults(config), where)  # not checked: tests make wrong ones
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    form = family.FORM if quantized is True else quantized
    rules = family.rules(known)
    for name, info in rules.hf.items():
        if form and name.endswith(family.QUANTIZED):
            tensors |= form.tensors(name, info, generator)
        else:
            tensors[name] = _random(name, info, generator, is_tied(known))
    for first, *copies in (cell.op.names for cell in rules.cells if isinstance(cell.op, Copies)):
        tensors |= {copy: tensors[first].clone() for copy in copies}
    _save_sharded(folder, tensors, shards)
    if form:
        config = {**config, "quantization_config": form.config()}
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": [1], "pad_token_id": 0, "do_sample": True}
    _write_json(folder / "generation_config.json", generation)
    _save_tokenizer(folder, texts, config["vocab_size"])


def _random(name: str, info: TensorInfo, generator: torch.Generator, tied: bool) -> torch.Tensor:
    """Weights that keep activations and logits near 1, so that an error in any layer shows in the logits."""
    noise = torch.randn(info.shape, generator=generator)
    if "norm" in name:
        noise = 1 + 0.1 * noise
    elif name.endswith("e_score_correction_bias"):
        # Positive, because for scores below zero transformers chooses experts of groups that were not chosen.
        noise = 0.1 * noise.abs()
    elif name.endswith(("bias", "sinks")):
        noise *= 0.1
    elif "embed" not in name or tied:
        fan_in = info.shape[-2] if name.endswith(("gate_up_proj", "down_proj")) else info.shape[-1]
        noise /= fan_in**0.5
    return noise.to(getattr(torch, TORCH_NAMES[info.dtype]))


def _save_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        shard = {name: tensors[name] for name in names[number::shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _save_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", {**about, **special, "chat_template": CHAT_TEMPLATE})
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
