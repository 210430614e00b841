"""Low-rank adapters that NeMo trained: merge them into their base while reading, or write them for `peft`.

A weight W [..., out, in], `X.weight`, has an adapter of two matrices: A [..., rank, in], `X.adapter.linear_in.weight`,
and B [..., out, rank], `X.adapter.linear_out.weight`. The model computes with W + alpha / rank · B·A.

On the way to Hugging Face the rules do with the rows of B what they do with the rows of W; A is the same for every
part. If W has a matrix for every expert, A and B have one for every expert too, or one pair for all experts (NeMo's
grouped experts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from slipway.checkpoint import huggingface
from slipway.checkpoint.torch_dist import Reader
from slipway.errors import DataError
from slipway.families import rules
from slipway.tensors.bits import Bits, as_dtype, to_float32
from slipway.tensors.refs import Ref, TensorInfo

IN, OUT = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
BASE_NOTE = "adapter_metadata.json"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def has_adapters(reader: Reader) -> bool:
    """The checkpoint holds low-rank adapters."""
    return any(key.endswith(IN) and not key.startswith("optimizer.") for key in reader.tensors)


def base_of(adapters: Reader, base: Path | None) -> Path:
    """The checkpoint of the base: the one given, else the one that NeMo noted; DataError if it does not exist."""
    note = adapters.folder / BASE_NOTE
    if base is None and note.is_file():
        base = Path(json.loads(note.read_text())["model_ckpt_path"])
    if base is None or not base.is_dir():
        raise DataError(f"{adapters.folder}: the base of these adapters is not at {base}; give it with --base")
    return base


def scale_of(adapters: Reader) -> float:
    """alpha / rank, from model.yaml of the checkpoint and the tensors' shapes."""
    # By its lines: the file is YAML with tags of Python objects, which a parser would have to be told about.
    path = adapters.folder.parent / "context" / "model.yaml"
    text = path.read_text() if path.is_file() else ""
    section = re.search(r"(?ms)^model_transform:\n(.*?)(?=^\S|\Z)", text)
    alpha = section and re.search(r"(?m)^\s+alpha: ([\d.]+)$", section.group(1))
    if not alpha:
        raise DataError(f"{path} does not contain the adapters' alpha; copy context/ of the checkpoint again")
    return float(alpha.group(1)) / rank_of(adapters)


def rank_of(adapters: Reader) -> int:
    """The adapters' inner size."""
    return next(info.shape[-2] for key, info in adapters.tensors.items() if key.endswith(IN))


class Merged:
    """Reads a base checkpoint with its adapters added. Adapted tensors are float32.

    float32, so that the sum is rounded once, when it is written in the dtype of the model.


    Args:
        base, adapters: readers of both.
    """

    def __init__(self, base: Reader, adapters: Reader) -> None:
        self.base, self.adapters, self.scale = base, adapters, scale_of(adapters)
        self._adapted = set(targets(adapters))
        for key in self._adapted:
            _check_fit(key, base, adapters)
        self.folder, self.tensors = base.folder, dict(base.tensors)
        self.tensors |= {key: TensorInfo(base.tensors[key].shape, "F32") for key in self._adapted}

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor with its adapter, if it has one."""
        part = self.base.read(ref)
        if ref.name not in self._adapted:
            return part
        stem = ref.name.removesuffix(".weight")
        inner = _floats(self.adapters, _ref(self.adapters, stem + IN, ref.index))
        outer = _floats(self.adapters, _ref(self.adapters, stem + OUT, ref.index, ref.rows))
        found = np.matmul(outer, inner)
        found *= np.float32(self.scale)
        found += to_float32(part, self.base.tensors[ref.name].dtype)
        return found.view(np.uint32)

    def files(self) -> list[Path]:
        """Every file of both."""
        return [*self.base.files(), *self.adapters.files()]


def targets(adapters: Reader) -> list[str]:
    """The keys of the base that have an adapter."""
    keys = (key for key in adapters.tensors if key.endswith(IN) and not key.startswith("optimizer."))
    return [key.removesuffix(IN) + ".weight" for key in keys]


def _check_fit(key: str, base: Reader, adapters: Reader) -> None:
    stem = key.removesuffix(".weight")
    if key not in base.tensors or stem + OUT not in adapters.tensors:
        raise DataError(f"{adapters.folder}: {stem}{OUT} or {key} of {base.folder} is missing; check --base")
    *stack, out, inner = base.tensors[key].shape
    rank = adapters.tensors[stem + IN].shape[-2]
    wanted = {stem + IN: (*stack, rank, inner), stem + OUT: (*stack, out, rank)}
    for name, shape in wanted.items():
        # One for each expert, or one for all experts of a layer.
        if adapters.tensors[name].shape not in (shape, (*stack[:-1], *shape[-2:])):
            raise DataError(
                f"{adapters.folder}: {name} has shape {list(adapters.tensors[name].shape)}, "
                f"but {base.folder} needs {list(shape)}; check --base"
            )


def _ref(adapters: Reader, name: str, index: tuple[int, ...], rows: tuple[int, int] | None = None) -> Ref:
    """The part of an adapter for the matrix `index` of its weight: a shared adapter has no index for the expert."""
    return Ref(name, index[: len(adapters.tensors[name].shape) - 2], rows)


def _floats(reader: Reader, ref: Ref) -> Bits:
    return to_float32(reader.read(ref), reader.tensors[ref.name].dtype)


# ---------------------------------------------------------------------------- peft


def peft_adapter(adapters: Reader, model: rules.Rules, base_name: str) -> dict[str, bytes]:
    """The two files of a `peft` adapter: file name → content.

    Errors: DataError for weights that are not separate matrices in Hugging Face's form; peft adapts only matrices.
    """
    tensors: dict[str, tuple[Bits, str]] = {}
    for name, inner, outer in _per_matrix(adapters, model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = inner, "BF16"
        tensors[f"base_model.model.{name}.lora_B.weight"] = outer, "BF16"
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank_of(adapters),
        "lora_alpha": scale_of(adapters) * rank_of(adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _short_names(names, model.hf),
    }
    return {FILE: huggingface.one_file(tensors), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _per_matrix(adapters: Reader, model: rules.Rules) -> Iterator[tuple[str, Bits, Bits]]:
    """(Hugging Face's module, A [rank, in], B [out, rank]) in bfloat16.

    A large matrix is cut into several cells: the rows of its B are collected from all of them.
    """
    wanted = set(targets(adapters))
    inners: dict[str, Bits] = {}
    outers: dict[str, Bits] = {}
    for cell in model.cells:
        if not any(ref.name in wanted for ref in cell.megatron):
            continue
        if any(ref.index for ref in cell.hf) or len({ref.name for ref in cell.megatron}) > 1:
            raise DataError(
                f"{adapters.folder}: {cell.hf[0].name} is not a separate matrix, and peft adapts only matrices; "
                "leave out --adapter to export the merged model"
            )
        stem, index = cell.megatron[0].name.removesuffix(".weight"), cell.megatron[0].index
        inner = _rounded(adapters, _ref(adapters, stem + IN, index))
        parts = tuple(_rounded(adapters, _ref(adapters, stem + OUT, ref.index, ref.rows)) for ref in cell.megatron)
        for ref, part in zip(cell.hf, cell.op.to_hf(parts), strict=True):
            rows = model.hf[ref.name].shape[0]
            outer = outers.setdefault(ref.name, np.empty((rows, len(inner)), part.dtype))
            outer[slice(*ref.rows) if ref.rows else slice(None)] = part
            inners[ref.name] = inner
    for name, outer in outers.items():
        yield name.removesuffix(".weight"), inners[name], outer


def _rounded(reader: Reader, ref: Ref) -> Bits:
    return as_dtype(reader.read(ref), reader.tensors[ref.name].dtype, "BF16")


def _short_names(names: set[str], hf: Mapping[str, TensorInfo]) -> list[str]:
    """`target_modules`: the last part of each name if no other module has such a name, else the whole names.

    Short names are what people expect to read, but peft would also adapt every other module of that name.
    """
    short = {name.rpartition(".")[2] for name in names}
    matrices = {name.removesuffix(".weight") for name, info in hf.items() if len(info.shape) == 2}
    meant = {name for name in matrices if name.rpartition(".")[2] in short}
    return sorted(short if meant == names else names)
