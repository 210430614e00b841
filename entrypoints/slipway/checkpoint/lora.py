"""Low-rank adapters that NeMo trained: merged into their base as it is read, or as an adapter that `peft` loads.

Beside a weight `X.weight` [..., out, in] of the base lie `X.adapter.linear_in.weight` A [..., rank, in] and
`X.adapter.linear_out.weight` B [..., out, rank]; the model computes with W + alpha / rank · B·A. What the rules do
with the rows of W on the way to Hugging Face they do with the rows of B; A is the same for every part. Where W has a
matrix for every expert, A and B have as well, or there is one pair for all of them: so NeMo adapts grouped experts.
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
from slipway.families.parts import rules
from slipway.tensors.bits import Bits, as_dtype, to_float32
from slipway.tensors.refs import Ref, TensorInfo

IN, OUT = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
BASE_NOTE = "adapter_metadata.json"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def has_adapters(reader: Reader) -> bool:
    """The checkpoint holds low-rank adapters."""
    return any(key.endswith(IN) and not key.startswith("optimizer.") for key in reader.tensors)


def base_of(adapters: Reader, base: Path | None) -> Path:
    """The base's checkpoint: the one given, else the one that NeMo noted; DataError where it is not there."""
    note = adapters.folder / BASE_NOTE
    if base is None and note.is_file():
        base = Path(json.loads(note.read_text())["model_ckpt_path"])
    if base is None or not base.is_dir():
        raise DataError(f"{adapters.folder}: the base of these adapters is not at {base}; give it with --base")
    return base


def scale_of(adapters: Reader) -> float:
    """alpha / rank, from model.yaml of the checkpoint and the tensors' shapes."""
    path = adapters.folder.parent / "context" / "model.yaml"
    text = path.read_text() if path.is_file() else ""
    section = re.search(r"(?ms)^model_transform:\n(.*?)(?=^\S|\Z)", text)
    alpha = section and re.search(r"(?m)^\s+alpha: ([\d.]+)$", section.group(1))
    if not alpha:
        raise DataError(f"{path} does not tell the adapters' alpha; the checkpoint's context/ belongs beside weights/")
    return float(alpha.group(1)) / rank_of(adapters)


def rank_of(adapters: Reader) -> int:
    """The adapters' inner size."""
    return next(info.shape[-2] for key, info in adapters.tensors.items() if key.endswith(IN))


class Merged:
    """A base checkpoint read as if its adapters had been trained into it: adapted tensors in float32, not rounded.

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
        """A part of the sum."""
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
    """The base's keys that have an adapter."""
    keys = (key for key in adapters.tensors if key.endswith(IN) and not key.startswith("optimizer."))
    return [key.removesuffix(IN) + ".weight" for key in keys]


def _check_fit(key: str, base: Reader, adapters: Reader) -> None:
    stem = key.removesuffix(".weight")
    if key not in base.tensors or stem + OUT not in adapters.tensors:
        raise DataError(f"{adapters.folder}: {stem}{IN} has no {stem}{OUT} or no weight in {base.folder}; wrong base?")
    *stack, out, inner = base.tensors[key].shape
    rank = adapters.tensors[stem + IN].shape[-2]
    wanted = {stem + IN: (*stack, rank, inner), stem + OUT: (*stack, out, rank)}
    for name, shape in wanted.items():
        if adapters.tensors[name].shape not in (shape, (*stack[:-1], *shape[-2:])):
            raise DataError(
                f"{adapters.folder}: {name} has shape {list(adapters.tensors[name].shape)}, "
                f"{base.folder} asks for {list(shape)}; wrong base?"
            )


def _ref(adapters: Reader, name: str, index: tuple[int, ...], rows: tuple[int, int] | None = None) -> Ref:
    """The part of an adapter for the matrix `index` of its weight."""
    return Ref(name, index[: len(adapters.tensors[name].shape) - 2], rows)


def _floats(reader: Reader, ref: Ref) -> Bits:
    return to_float32(reader.read(ref), reader.tensors[ref.name].dtype)


# ---------------------------------------------------------------------------- peft


def peft_adapter(adapters: Reader, model: rules.Rules, base_name: str) -> dict[str, bytes]:
    """The two files of a `peft` adapter: file name → content.

    Errors: DataError for weights that Hugging Face's form does not hold as matrices of their own.
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
    """(Hugging Face's module, A [rank, in], B [out, rank]) in bfloat16, B's rows collected from all cells."""
    wanted = set(targets(adapters))
    inners: dict[str, Bits] = {}
    outers: dict[str, Bits] = {}
    for cell in model.cells:
        if not any(ref.name in wanted for ref in cell.megatron):
            continue
        if any(ref.index for ref in cell.hf) or len({ref.name for ref in cell.megatron}) > 1:
            raise DataError(
                f"{adapters.folder}: {cell.hf[0].name} is no matrix of its own, and peft adapts no other; "
                "export the merged model, without --adapter"
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
    """The modules' last names where these mean exactly the adapted modules, else their whole names."""
    short = {name.rpartition(".")[2] for name in names}
    matrices = {name.removesuffix(".weight") for name, info in hf.items() if len(info.shape) == 2}
    meant = {name for name in matrices if name.rpartition(".")[2] in short}
    return sorted(short if meant == names else names)
