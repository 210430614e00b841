"""The tiny DeepSeek-V3 models and adapters of the golden data of MindSpeed-LLM's converter, made from nothing.

Each tensor is drawn from SHAKE-256 of its name, so the bytes are the same everywhere. golden/classic.json has digests
of what MindSpeed-LLM (convert_ckpt_deepseek3.py of commit 89722e0c) wrote of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from slipway.checkpoint import classic
from slipway.families import FAMILIES, understood

# Layers, hidden size, heads, sizes of the compressed queries and of keys with values, of a head without and with
# positions, of a value, of dense and expert MLPs, experts, vocabulary.
SIZES = {
    "t8": (8, 32, 4, 24, 16, 8, 4, 6, 40, 12, 8, 64),
    "t61": (61, 16, 2, 8, 12, 4, 2, 3, 20, 6, 4, 32),
}
RANK, ALPHA = 4, 8


def config_of(model: str) -> dict[str, Any]:
    """config.json: three dense layers first, one layer for multi-token prediction."""
    layers, hidden, heads, q, kv, nope, rope, value, wide, expert, experts, vocabulary = SIZES[model]
    return {
        **FAMILIES["deepseek_v3"].tiny_config(), "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": q, "kv_lora_rank": kv,
        "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value, "intermediate_size": wide,
        "moe_intermediate_size": expert, "n_routed_experts": experts, "vocab_size": vocabulary, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "rope_scaling": None,
        "max_position_embeddings": 128,
    }  # fmt: skip


def drawn(model: str, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """A tensor with magnitudes between 2^-8 and 1."""
    width = 2 if dtype == "BF16" else 4
    text = f"slipway-mindspeed-golden/1\n{model}\n{name}".encode()
    bits = np.frombuffer(hashlib.shake_256(text).digest(width * math.prod(shape)), f"<u{width}")
    mantissa = 7 if dtype == "BF16" else 23
    sign = bits & bits.dtype.type(1 << (8 * width - 1))
    exponent = (0x77 + ((bits >> mantissa) & 7)).astype(bits.dtype) << mantissa
    found = (sign | exponent | (bits & bits.dtype.type((1 << mantissa) - 1))).astype(f"<u{width}")
    return torch.from_numpy(found).view(torch.bfloat16 if width == 2 else torch.float32).reshape(shape)


def write_model(model: str, folder: Path) -> Path:
    """The model in Hugging Face's form."""
    import json

    config = config_of(model)
    family, known = understood(config, folder / "config.json")
    layers = config["num_hidden_layers"]
    # Copies of the embedding and the output layer lie beside the layer for multi-token prediction.
    same = {
        f"model.layers.{layers}.embed_tokens.weight": "model.embed_tokens.weight",
        f"model.layers.{layers}.shared_head.head.weight": "lm_head.weight",
    }
    infos = family.rules(known).hf
    tensors = {name: drawn(model, same.get(name, name), info.shape, info.dtype) for name, info in infos.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------- adapters


def _adapter(model: str, name: str, shape: tuple[int, int], side: str) -> np.ndarray:
    """Small values of which every product is exact in BF16."""
    text = f"slipway-mindspeed-golden/1\n{model}\n{name}/{side}".encode()
    numbers = np.frombuffer(hashlib.shake_256(text).digest(math.prod(shape)), np.uint8).astype(np.int64)
    values = ((numbers % 5) - 2) / 8 if side == "A" else ((numbers % 7) - 3) / 32
    return values.astype(np.float32).reshape(shape)


def adapter(model: str, layer: int, module: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 (A [4, in], B [out, 4]) of a module of a layer: qkv, proj, fc1, fc2, shared.fc1 or expert.3.fc2."""
    _, hidden, heads, q, kv, _, rope, value, wide, expert, *_ = SIZES[model]
    width = expert if "." in module else wide
    sizes = {
        "qkv": (hidden, q + kv + rope),
        "proj": (heads * value, hidden),
        "fc1": (hidden, 2 * width),
        "fc2": (width, hidden),
    }
    inner, outer = sizes[module.rpartition(".")[2]]
    name = f"lora/{layer}/{module}"
    return _adapter(model, name, (RANK, inner), "A"), _adapter(model, name, (outer, RANK), "B")


def _bf16(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16()


def adapters_of(model: str, rank: classic.Rank, options: classic.Options) -> dict[str, torch.Tensor]:
    """What a rank has of the adapters, of every layer and without virtual stages."""
    layers, dense, experts = SIZES[model][0], 3, SIZES[model][10]
    count = options.tensor_parallel_size
    per_stage, local = layers // options.pipeline_parallel_size, experts // options.expert_parallel_size
    found: dict[str, torch.Tensor] = {}

    def add(name: str, number: int, module: str) -> None:
        a, b = (cut(part, module, side) for part, side in zip(adapter(model, number, module), "AB", strict=True))
        found[f"{name}.lora_A.default.weight"], found[f"{name}.lora_B.default.weight"] = _bf16(a), _bf16(b)

    def cut(part: np.ndarray, module: str, side: str) -> np.ndarray:
        kind = module.rpartition(".")[2]
        if side == "A" and kind in ("proj", "fc2"):
            return np.split(part, count, 1)[rank.tensor]
        if side == "B" and kind == "fc1":
            return np.concatenate([np.split(half, count)[rank.tensor] for half in np.split(part, 2)])
        return part

    for at in range(per_stage):
        number, prefix = rank.stage * per_stage + at, f"decoder.layers.{at}."
        add(f"{prefix}self_attention.linear_qkv", number, "qkv")
        add(f"{prefix}self_attention.linear_proj", number, "proj")
        place, kind = ("mlp.", "") if number < dense else ("mlp.shared_experts.", "shared.")
        add(f"{prefix}{place}linear_fc1", number, f"{kind}fc1")
        add(f"{prefix}{place}linear_fc2", number, f"{kind}fc2")
        if number < dense:
            continue
        mine = range(rank.expert * local, (rank.expert + 1) * local)
        if not options.moe_grouped_gemm:
            for here, expert in enumerate(mine):
                add(f"{prefix}mlp.experts.local_experts.{here}.linear_fc1", number, f"expert.{expert}.fc1")
                add(f"{prefix}mlp.experts.local_experts.{here}.linear_fc2", number, f"expert.{expert}.fc2")
            continue
        for part, weight in (("fc1", "weight1"), ("fc2", "weight2")):
            pairs = [adapter(model, number, f"expert.{expert}.{part}") for expert in mine]
            a = _bf16(np.stack([cut(one, part, "A").T for one, _ in pairs]))
            b = _bf16(np.stack([cut(other, part, "B").T for _, other in pairs]))
            found[f"{prefix}mlp.experts.{weight}_lora_a"] = a.reshape((a.shape[1], -1) if part == "fc1" else (-1, RANK))
            found[f"{prefix}mlp.experts.{weight}_lora_b"] = b.reshape((RANK, -1) if part == "fc1" else (-1, b.shape[2]))
    return found


# ---------------------------------------------------------------------------- files


def as_mindspeed(checkpoint: Path, out: Path, change: Any = lambda rank, tensors: tensors) -> Path:
    """The same files as MindSpeed-LLM saves them: protocol 4, a defaultdict, no args, no note.

    Args:
        change: (name of the rank's folder, tensors of a chunk) → the tensors to save.
    """
    for file in checkpoint.rglob("*.pt"):
        saved = load(file, ours=False)
        chunks = {
            key: defaultdict(dict, change(file.parent.name, value))
            for key, value in saved.items()
            if key.startswith("model")
        }
        target = out / file.relative_to(checkpoint)
        target.parent.mkdir(parents=True)
        torch.save({**chunks, "checkpoint_version": 3.0, "iteration": 1}, target, pickle_protocol=4)
    (out / classic.TRACKER).write_text("1")
    return out


def load(file: Path, ours: bool = True) -> dict[str, Any]:
    """A file as Megatron-LM loads it: no code, and the Namespace of its arguments. MindSpeed's cannot be loaded so."""
    from argparse import Namespace

    if not ours:
        return torch.load(file, weights_only=False)
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, weights_only=True)


DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes, dtypes and elements, whatever the order."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        lines.append(f"{name} {list(tensor.shape)} {DTYPES[tensor.dtype]} {hashlib.sha256(content).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def flags(options: Mapping[str, Any], form: str = "") -> Iterator[str]:
    """Options as words of a command line."""
    for name, value in options.items():
        if name == "qlora-nf4":
            yield from ("--qlora-nf4", form)
        elif "lora" not in name:
            yield from (f"--{name}",) if value is True else (f"--{name}", str(value))
