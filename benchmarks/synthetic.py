"""A model of any size with the layout of a published checkpoint, written as a stream of random bytes.

python -m benchmarks.synthetic FOLDER FAMILY mxfp4|fp8|bf16 GIGABYTES
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from slipway.checkpoint.huggingface import INDEX, Layout
from slipway.families import FAMILIES, by_model_type
from slipway.tensors.bits import E8M0_BIAS
from slipway.tensors.refs import TORCH_NAMES, TensorInfo

SHARD_BYTES = 1_000_000_000
POOL_ELEMENTS = 1 << 22
FP8_BLOCK = 128
# Widths like those of real models, for whichever of these fields a family has.
WIDE = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "moe_intermediate_size": 1440,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts": 16,
    "n_routed_experts": 16,
    "vocab_size": 32768,
}


def config_of(family: str, gigabytes: float) -> dict[str, Any]:
    """config.json of a model with as many layers as fit into so many gigabytes of BF16, at least one."""
    tiny = FAMILIES[family].tiny_config()
    wide = {**tiny, **{name: value for name, value in WIDE.items() if name in tiny}}
    if tiny["num_key_value_heads"] == tiny["num_attention_heads"]:
        wide["num_key_value_heads"] = wide["num_attention_heads"]
    least = 1 + tiny.get("first_k_dense_replace", 0)
    one, two = (_bytes(family, _with_layers(wide, count)) for count in (least, least + 1))
    return _with_layers(wide, least + max(0, round((gigabytes * 1e9 - one) / (two - one))))


def _with_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    changed = {**config, "num_hidden_layers": count}
    if kinds := config.get("layer_types"):
        changed["layer_types"] = [kinds[layer % len(kinds)] for layer in range(count)]
    return changed


def _bytes(family: str, config: dict[str, Any]) -> int:
    return sum(info.bytes for info in FAMILIES[family].rules(config).hf.values())


def stored_as(name: str, info: TensorInfo, form: str) -> dict[str, TensorInfo]:
    """What a published checkpoint holds for a tensor: MXFP4 experts, or FP8 projections, or BF16."""
    if form == "mxfp4" and len(info.shape) == 3:
        experts, columns, rows = info.shape
        shape = (experts, rows, columns // 32)
        return {f"{name}_blocks": TensorInfo((*shape, 16), "U8"), f"{name}_scales": TensorInfo(shape, "U8")}
    if form == "fp8" and len(info.shape) == 2 and "_proj" in name and name.endswith(".weight"):
        scales = tuple(math.ceil(size / FP8_BLOCK) for size in info.shape)
        return {name: TensorInfo(info.shape, "F8_E4M3"), f"{name}_scale_inv": TensorInfo(scales, "F32")}
    return {name: info}


def write(folder: Path, config: dict[str, Any], form: str) -> None:
    """Write the model; its values are random, and as large as those of a model that is not trained yet."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in by_model_type()[config["model_type"]].rules(config).hf.items():
        tensors |= stored_as(name, info, form)
    layout = Layout(tensors, SHARD_BYTES)
    folder.mkdir(parents=True)
    files = {name: os.open(folder / name, os.O_WRONLY | os.O_CREAT) for name in layout.sizes}
    for name, header in layout.headers.items():
        os.pwrite(files[name], header, 0)
    pools = {kind: _pool(*kind) for kind in {_kind(name, info) for name, info in tensors.items()}}
    for name, info in tensors.items():
        file, offset = layout.places[name]
        _fill(files[file], offset, info.bytes, pools[_kind(name, info)])
    for descriptor in files.values():
        os.fsync(descriptor)
        os.close(descriptor)
    if form != "bf16":
        about = {"quant_method": form, "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
        config = {**config, "quantization_config": about}
    (folder / "config.json").write_text(json.dumps(config))
    if (index := layout.index()) is not None:
        (folder / INDEX).write_bytes(index)


def _kind(name: str, info: TensorInfo) -> tuple[str, str]:
    if name.endswith(("_scales", "_scale_inv")):
        return info.dtype, "scales"
    if info.dtype == "F8_E4M3":
        return info.dtype, "scaled"
    return info.dtype, "norm" if "norm" in name else "weights"


def _pool(dtype: str, kind: str) -> memoryview:
    """Values to take from again and again."""
    torch.manual_seed(0)
    if dtype == "U8":
        low, high = (E8M0_BIAS - 8, E8M0_BIAS) if kind == "scales" else (0, 256)
        values = torch.randint(low, high, (POOL_ELEMENTS,))
    elif kind == "scales":
        values = torch.rand(POOL_ELEMENTS) * 1e-3
    elif kind == "norm":
        values = torch.ones(POOL_ELEMENTS)
    else:
        values = torch.randn(POOL_ELEMENTS) * (1.0 if kind == "scaled" else 0.02)
    return memoryview(values.to(getattr(torch, TORCH_NAMES[dtype])).view(torch.uint8).numpy())


def _fill(descriptor: int, offset: int, count: int, pool: memoryview) -> None:
    for start in range(0, count, len(pool)):
        os.pwrite(descriptor, pool[: count - start], offset + start)


if __name__ == "__main__":
    write(Path(sys.argv[1]), config_of(sys.argv[2], float(sys.argv[4])), sys.argv[3])
