"""What a model's files say of its quantisation, and the forms that are not read, each by its own name.

How a tensor is decoded is decided by what is stored (codecs.py): which modules are excluded, and whether config.json is
of an older form, needs no answer. What the files say gives the size of blocks, and names what cannot be decoded, so
that nobody looks for missing files.

Sources: transformers 4.57 and 5.24 (utils/quantization_config.py), compressed-tensors 0.20, ModelOpt
(torch/export/convert_hf_config.py), and the names that these and bitsandbytes, AutoGPTQ, HQQ, AQLM and EETQ write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint.companions import MODELOPT_FILE
from slipway.errors import DataError
from slipway.families.rules import FLOATS
from slipway.tensors.refs import TensorInfo
from slipway.untrusted import read_object

# Where config.json has it; compressed-tensors first called it compression_config. ModelOpt has a file of its own.
IN_CONFIG = ("quantization_config", "compression_config")
SUPPORTED = "FP8, MXFP8, MXFP4, NVFP4 and NF4 of bitsandbytes"
BLOCK = (128, 128)  # DeepSeek's, where nothing else is said
READ_METHODS = (None, "fp8", "fbgemm_fp8", "mxfp4", "mxfp8")
READ_FORMATS = (
    None, "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
    "mixed-precision", "dense",
)  # fmt: skip
READ_ALGOS = (
    None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PC_PT", "FP8_PB_WO", "NVFP4", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8",
    "MIXED_PRECISION",
)  # fmt: skip
# quant_method of config.json, in the words of those who made it.
METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "gguf": "GGUF", "quanto": "Quanto",
    "torchao": "torchao", "vptq": "VPTQ", "spqr": "SpQR", "higgs": "HIGGS", "bitnet": "BitNet", "quark": "Quark",
    "auto-round": "AutoRound", "blockwise_int8": "INT8 in blocks", "exl2": "EXL2", "exl3": "EXL3",
}  # fmt: skip
ALGOS = {
    "W4A16_AWQ": "INT4 AWQ of ModelOpt", "W4A8_AWQ": "INT4 AWQ of ModelOpt", "NVFP4_AWQ": "NVFP4 AWQ of ModelOpt",
    "W8A16": "INT8 of ModelOpt", "W8A8_SQ_PER_CHANNEL": "INT8 SmoothQuant of ModelOpt",
}  # fmt: skip
# The last part of a tensor's name → what has such tensors.
NAMES = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "g_idx": "GPTQ", "SCB": "bitsandbytes INT8",
    "bitsandbytes__fp4": "bitsandbytes FP4",
    "W_q": "HQQ", "codebooks": "AQLM", "weight_scales": "EETQ", "_data": "Quanto", "centroids": "VPTQ",
    "bitmask": "a sparse form of compressed-tensors", "pre_quant_scale": "AWQ of ModelOpt", "q_weight": "EXL2",
    "trellis": "EXL3", "weight_g_idx": "INT4 pack-quantized with reordered columns",
}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """What the files say.

    Args:
        method: quant_method, or the vendor's algorithm; "" where nothing is said.
        blocks: rows and columns of FP8 blocks, in the order in which they are to be tried.
        unread: the name of a form that is not supported, and where it says so; "" where all is.
    """

    method: str = ""
    blocks: tuple[tuple[int, int], ...] = (BLOCK,)
    unread: str = ""
    place: str = ""


def declared(config: Mapping[str, Any], folder: Path) -> Declared:
    """What config.json and ModelOpt's file say; DataError where they are damaged."""
    sections = {f"config.json: {key}": _section(config, key, folder) for key in IN_CONFIG}
    sections[MODELOPT_FILE] = _of_modelopt(folder / MODELOPT_FILE)
    blocks: list[tuple[int, int]] = []
    method = unread = place = ""
    for where, about in sections.items():
        try:
            blocks += _blocks(about, folder / "config.json")
            name = _unread(about)
        except (AttributeError, KeyError, TypeError):
            what = where.rpartition(" ")[2]
            raise DataError(f"{folder}: {what} is damaged; download the config.json of this model again") from None
        method = method or str(about.get("quant_method") or "")
        if name and not unread:
            unread, place = name, where
    return Declared(method, (*blocks, BLOCK), unread, place)


def _section(config: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    about = config.get(key) or {}
    if not isinstance(about, dict):
        raise DataError(f"{folder / 'config.json'}: {key} is damaged; download the config.json of this model again")
    inner = about.get("quantization_config")  # the first releases of compressed-tensors had a table in the table
    return {**about, **inner} if isinstance(inner, dict) else about


def _of_modelopt(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return {"quant_method": "modelopt", **read_object(file)["quantization"]}
    except (KeyError, TypeError):
        raise DataError(f"{file} is damaged, it has no table called quantization; download it again") from None


def _weights(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of the weights of each group; a group may be a list of modules, with a preset's name."""
    groups = (about.get("config_groups") or {}).values()
    return [group["weights"] or {} for group in groups if not isinstance(group, list)]


def _blocks(about: Mapping[str, Any], where: Path) -> list[tuple[int, int]]:
    sizes = [about.get("weight_block_size")]
    for weights in _weights(about):
        sizes += [weights.get("block_structure"), [1, weights["group_size"]] if weights.get("group_size") else None]
    for size in filter(None, sizes):
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n != 0 for n in size)):
            raise DataError(f"{where}: weight_block_size is {size!r}; it must be two positive numbers")
    return [(size[0], size[1]) for size in sizes if size and min(size) > 0]  # group_size -1 is a whole row


def _unread(about: Mapping[str, Any]) -> str:
    """The name of the form, if it is one that is not read; "" if it is."""
    method = about.get("quant_method")
    if method == "compressed-tensors" or (method is None and "config_groups" in about):
        return _unread_compressed(about)
    if isinstance(method, str) and method.startswith("modelopt"):
        layers = (about.get("quantized_layers") or {}).values()
        algos = [about.get("quant_algo"), *(layer.get("quant_algo") for layer in layers)]
        return next((ALGOS.get(one, f"{one} of ModelOpt") for one in algos if _plain(one) not in READ_ALGOS), "")
    if method == "bitsandbytes" and about.get("load_in_4bit") and about.get("bnb_4bit_quant_type") == "nf4":
        return ""
    if method == "bitsandbytes":
        kind = str(about.get("bnb_4bit_quant_type", "4-bit")).upper()
        return f"bitsandbytes {kind}" if about.get("load_in_4bit") else "bitsandbytes INT8"
    return "" if method in READ_METHODS else METHODS.get(str(method), f"quant_method {method!r}")


def _plain(algo: Any) -> Any:
    return algo.upper() if isinstance(algo, str) else algo


def _unread_compressed(about: Mapping[str, Any]) -> str:
    if about.get("transform_config"):  # Hadamard matrices, some of which are applied at inference
        return "compressed-tensors with transform_config"
    sparsity = (about.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        return f"{sparsity} of compressed-tensors"
    groups = [group for group in (about.get("config_groups") or {}).values() if not isinstance(group, list)]
    bits = next((f"INT{w.get('num_bits')}" for w in _weights(about) if w.get("type", "float") == "int"), "")
    for form in (about.get("format"), *(group.get("format") for group in groups)):
        if form not in READ_FORMATS:
            return f"{bits} {form} of compressed-tensors".strip()
    return f"{bits} of compressed-tensors" if bits else ""


def refuse_unread(infos: Mapping[str, TensorInfo], said: Declared, folder: Path) -> None:
    """DataError with the form's name if what is stored is in one that is not read.

    What the files say alone refuses nothing: a model that was merged in BF16 often keeps the quantization_config of
    the base that it was trained on.
    """
    names = ((name, NAMES.get(name.rpartition(".")[2]) or _by_dtype(name, info, infos)) for name, info in infos.items())
    found = next(((name, form) for name, form in names if form), None)
    if said.unread and (found or any(info.dtype not in FLOATS for info in infos.values())):
        raise _refusal(folder, said.unread, said.place)
    if found:
        raise _refusal(folder, found[1], f"tensor {found[0]}")


def _by_dtype(name: str, info: TensorInfo, infos: Mapping[str, TensorInfo]) -> str:
    if info.dtype == "I32" and name.endswith("_packed"):
        return "INT4 or INT8 pack-quantized of compressed-tensors"
    if info.dtype == "I8" and any(f"{name}{suffix}" in infos for suffix in ("_scale", "_scale_inv")):
        return "INT8"
    return ""


def _refusal(folder: Path, form: str, evidence: str) -> DataError:
    return DataError(
        f"{folder} is quantised in the form {form} ({evidence}), which is not supported; supported are {SUPPORTED}: "
        "get the model in BF16, or dequantise it with the tool that made it"
    )
