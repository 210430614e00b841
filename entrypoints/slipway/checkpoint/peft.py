"""Adapters in the form of `peft`: adapter_config.json and adapter_model.safetensors, written and read.

`base_model.model.X.lora_A.weight` is A [r, in] and `base_model.model.X.lora_B.weight` B [out, r] for the module X of
transformers' model, which computes with W + s·B·A. s is lora_alpha / r, or lora_alpha / √r with `use_rslora`, and
`rank_pattern` and `alpha_pattern` replace r and lora_alpha for some modules. With `use_dora` there is
`base_model.model.X.lora_magnitude_vector` [out]; see lora.py for what it does.
Source: peft 0.18.1 and 0.21.2, peft/tuners/lora and peft/utils/save_and_load.py.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import huggingface
from slipway.checkpoint.lora import Adapters, Module, biased_dora
from slipway.errors import DataError
from slipway.families import read_config, rules
from slipway.tensors.bits import Bits, to_float32
from slipway.tensors.refs import Ref, TensorInfo

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
EXPERTS = ".mlp.experts."
LORA_A, LORA_B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"

# ---------------------------------------------------------------------------- writing


@dataclass
class _Matrix:
    """The adapter of one matrix: A [rank, in] and B [out, rank], each with its dtype, and DoRA's magnitude."""

    inner: tuple[Bits, str]
    outer: tuple[Bits, str]
    magnitude: Bits | None = None

    def trimmed(self) -> _Matrix:
        """Without the ranks that do nothing, because their column of B is zero.

        A layer of Megatron that is several of Hugging Face's has one A for all of them. Where it was put together from
        several, most of it is not for this matrix.
        """
        values, dtype = self.outer
        used = (to_float32(values, dtype) != 0).any(axis=0)
        if used.all() or not used.any():  # not any: an adapter that nobody has trained yet
            return self
        return _Matrix((self.inner[0][used], self.inner[1]), (values[:, used], dtype), self.magnitude)

    @property
    def rank(self) -> int:
        return len(self.inner[0])

    def tensors(self, module: str) -> dict[str, tuple[Bits, str]]:
        """Name → (tensor, dtype)."""
        stem = f"{PREFIX}{module}"
        found = {f"{stem}.{LORA_A}.weight": self.inner, f"{stem}.{LORA_B}.weight": self.outer}
        if self.magnitude is not None:
            found[f"{stem}.{MAGNITUDE}"] = self.magnitude.view(np.uint32), "F32"
        return found


def peft_adapter(adapters: Adapters, model: rules.Rules, base_name: str) -> tuple[dict[str, bytes], list[str]]:
    """(the two files of a `peft` adapter: file name → content; notes). A, B and their dtypes are as stored.

    Args:
        base_name: what peft loads the base by.

    Errors: DataError for weights that are not separate matrices in Hugging Face's form; peft adapts only matrices. And
    for a bias that DoRA multiplies; peft's does not.
    """
    if bias := biased_dora(adapters, model.megatron):
        raise DataError(
            f"{adapters.folder}: NeMo's DoRA also multiplies {bias}, and that of peft does not; "
            "leave out --adapter to export the merged model"
        )
    matrices = {name: matrix.trimmed() for name, matrix in _matrices(adapters, model).items()}
    tensors: dict[str, tuple[Bits, str]] = {}
    for name, matrix in matrices.items():
        tensors |= matrix.tensors(name)
    config = _config(adapters, {name: matrix.rank for name, matrix in matrices.items()}, model.hf, base_name)
    files = {FILE: huggingface.one_file(tensors), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    return files, [*adapters.notes, *_dropped_by_peft(matrices, model.hf)]


def _dropped_by_peft(modules: Iterable[str], hf: Iterable[str]) -> list[str]:
    """A note where the newest peft loses adapters: it takes every gate_proj of a model with experts for an expert's."""
    mlp = [name for name in modules if name.endswith(("gate_proj", "up_proj", "down_proj")) and EXPERTS not in name]
    if not mlp or not any(EXPERTS in name for name in hf):
        return []
    return [
        f"peft 0.21 with transformers 5 drops the adapters of dense MLPs and shared experts without a word "
        f"({len(mlp)} modules, {mlp[0]} the first); peft 0.18 with transformers 4 and the merged export have them"
    ]


def _config(
    adapters: Adapters, ranks: Mapping[str, int], hf: Mapping[str, TensorInfo], base_name: str
) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(adapters.scale * rank),
        "rank_pattern": others,
        "alpha_pattern": {name: _number(adapters.scale * other) for name, other in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any(module.dora for module in adapters.modules.values()),
        "target_modules": _short_names(set(ranks), hf),
    }


def _number(value: float) -> float:
    """The value as a whole number where it is one, as people write alpha; the division has rounded some of them."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _matrices(adapters: Adapters, model: rules.Rules) -> dict[str, _Matrix]:
    """Hugging Face's module → its adapter. A large matrix is cut into cells: its rows are collected from all."""
    found: dict[str, _Matrix] = {}
    for cell in model.cells:
        module = adapters.modules.get(cell.megatron[0].name)
        if not module:
            continue
        if any(ref.index for ref in cell.hf) or len({ref.name for ref in cell.megatron}) > 1:
            raise DataError(
                f"{adapters.folder}: {cell.hf[0].name} is not a separate matrix, and peft adapts only matrices; "
                "leave out --adapter to export the merged model"
            )
        _collect(adapters, module, cell, model.hf, found)
    return found


def _collect(
    adapters: Adapters,
    module: Module,
    cell: rules.Cell,
    hf: Mapping[str, TensorInfo],
    found: dict[str, _Matrix],
) -> None:
    """Put the rows of a cell to those of its matrices that are there already."""
    inner = adapters.inner(module, cell.megatron[0].index)
    outers = [adapters.outer(module, ref.index, ref.rows) for ref in cell.megatron]
    parts = cell.op.to_hf(tuple(part for part, _ in outers))
    lengths: tuple[Bits, ...] = ()
    if module.dora:
        lengths = cell.op.to_hf(tuple(adapters.magnitude(module, ref.index, ref.rows) for ref in cell.megatron))
    for number, ref in enumerate(cell.hf):
        name, rows = ref.name.removesuffix(".weight"), hf[ref.name].shape[0]
        if name not in found:
            outer = np.empty((rows, parts[number].shape[1]), parts[number].dtype), outers[0][1]
            found[name] = _Matrix(inner, outer, np.empty(rows, np.float32) if module.dora else None)
        place = slice(*ref.rows) if ref.rows else slice(None)
        found[name].outer[0][place] = parts[number]
        if (magnitude := found[name].magnitude) is not None:
            magnitude[place] = lengths[number]


def _short_names(names: set[str], hf: Mapping[str, TensorInfo]) -> list[str]:
    """`target_modules`: the last part of each name if no other module has such a name, else the whole names.

    Short names are what people expect to read, but peft would also adapt every other module of that name.
    """
    short = {name.rpartition(".")[2] for name in names}
    matrices = {name.removesuffix(".weight") for name, info in hf.items() if len(info.shape) == 2}
    meant = {name for name in matrices if name.rpartition(".")[2] in short}
    return sorted(short if meant == names else names)


# ---------------------------------------------------------------------------- reading

# The fields of adapter_config.json that are used, and those without an effect on what the adapter computes: which
# modules have one is said by the tensors, and the rest is about training. `fan_in_fan_out` is one of them: peft itself
# sets it to false for torch's linear layers, and these models have no others.
USED = set(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
    ]
)
NO_EFFECT = set(
    [
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
# Others change the base's weights before the training, and the adapter is for the changed ones.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, "none", "", [], {})
TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(.+)\.(?:({LORA_A}|{LORA_B})(?:\.\w+)?\.weight|({MAGNITUDE})(?:\.\w+)?(?:\.weight)?)"
)
PEFT = "peft can merge it into its base (merge_and_unload), and then import that"


@dataclass
class Lora:
    """The adapter of one module of transformers' model.

    Args:
        tensors: lora_A, lora_B, lora_magnitude_vector → name in the file.
        scale: what B·A is multiplied by.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    scale: float = 0.0


class Adapter:
    """A folder of peft's, for a base: every tensor and every field is accounted for.

    `modules` maps the name of each adapted module, without `.weight`, to its adapter.

    Args:
        folder: with the two files.
        hf: name → TensorInfo of the base.
        where: the base, for messages.

    Errors: DataError for a field or tensor that is unknown, missing or does not fit the base.
    """

    def __init__(self, folder: Path, hf: Mapping[str, TensorInfo], where: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.reader = huggingface.Reader(folder, huggingface.read_header(_file(folder)), {})
        self.modules: dict[str, Lora] = {}
        for name in sorted(self.reader.tensors):
            self._add(name)
        if not self.modules:
            raise DataError(f"{folder / FILE} contains no tensors; give the folder of a LoRA adapter of peft")
        self.dora = bool(self.config.get("use_dora"))
        for module, lora in self.modules.items():
            self._complete(module, lora)
            self._check_fit(module, lora, hf, where)
        self._check_layers(hf)

    def read(self, module: str, kind: str) -> tuple[Bits, str]:
        """A matrix or magnitude of a module, and its dtype."""
        name = self.modules[module].tensors[kind]
        return self.reader.read(Ref(name)), self.reader.tensors[name].dtype

    def values(self, module: str, kind: str) -> Bits:
        """The same as float32."""
        return to_float32(*self.read(module, kind))

    def _add(self, name: str) -> None:
        if not (match := TENSOR.fullmatch(name)):
            raise DataError(f"{self.folder / FILE}: tensor {name} is not supported: {_what(name)}; {PEFT}")
        module, kind = match.group(1), match.group(2) or match.group(3)
        tensors = self.modules.setdefault(module, Lora()).tensors
        if kind in tensors:
            raise DataError(
                f"{self.folder / FILE}: {name} and {tensors[kind]} are for the same module; save one adapter"
            )
        tensors[kind] = name

    def _complete(self, module: str, lora: Lora) -> None:
        """Check that all its tensors are there, and set rank and scale."""
        wanted = {LORA_A, LORA_B, *([MAGNITUDE] if self.dora else [])}
        if odd := sorted(wanted ^ lora.tensors.keys()):
            state = "missing" if odd[0] in wanted else "there, although use_dora is false"
            raise DataError(f"{self.folder / FILE}: {PREFIX}{module}.{odd[0]} is {state}; save the adapter again")
        lora.rank = int(_of_pattern(self.config.get("rank_pattern"), module, self.config["r"]))
        alpha = float(_of_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        lora.scale = alpha / (math.sqrt(lora.rank) if self.config.get("use_rslora") else lora.rank)

    def _check_fit(self, module: str, lora: Lora, hf: Mapping[str, TensorInfo], where: Path) -> None:
        info = hf.get(f"{module}.weight")
        if info is None or len(info.shape) != 2:
            raise DataError(f"{self.folder}: {module} has an adapter, but {where} has no such matrix; check the base")
        out, inner = info.shape
        wanted = {LORA_A: (lora.rank, inner), LORA_B: (out, lora.rank), MAGNITUDE: (out,)}
        for kind, name in lora.tensors.items():
            stored = self.reader.tensors[name]
            if stored.shape != wanted[kind]:
                raise DataError(
                    f"{self.folder / FILE}: {name} has shape {list(stored.shape)}, but rank {lora.rank} of {CONFIG} "
                    f"and {where} need {list(wanted[kind])}; check the base"
                )
            if stored.dtype not in rules.FLOATS:
                raise DataError(
                    f"{self.folder / FILE}: {name} is stored as {stored.dtype}; supported are {', '.join(rules.FLOATS)}"
                )

    def _check_layers(self, hf: Mapping[str, TensorInfo]) -> None:
        """DataError where all layers have an adapter of a kind but one, and nothing in the config says that."""
        targets = self.config.get("target_modules")
        chosen = ("layers_to_transform", "layers_pattern", "exclude_modules")
        if not isinstance(targets, list) or any(self.config.get(name) for name in chosen):
            return
        kinds = {_kind(module) for module in self.modules}
        for name in hf:
            module, _, last = name.rpartition(".")
            meant = module.rpartition(".")[2] in targets or module in targets
            if meant and last == "weight" and _kind(module) in kinds and module not in self.modules:
                raise DataError(
                    f"{self.folder / FILE}: {PREFIX}{module}.{LORA_A}.weight is missing, although {CONFIG} has it "
                    "in target_modules; save the adapter again"
                )


def _file(folder: Path) -> Path:
    if (folder / FILE).is_file():
        return folder / FILE
    if (old := folder / "adapter_model.bin").is_file():
        raise DataError(f"{old} is a pickle, which can run code; load the adapter with peft and save it as safetensors")
    raise DataError(f"{folder} has no {FILE}; give the folder of a LoRA adapter of peft")


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; DataError for a field of which another value than the given one is supported."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{path} is missing; give the folder of a LoRA adapter of peft")
    config = read_config(path)
    if config.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is supported; {PEFT}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise DataError(f"{path}: task_type is {config['task_type']!r}; only 'CAUSAL_LM' is supported")
    if config.get("init_lora_weights", True) not in STARTS:
        raise DataError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base's weights, and is "
            "not supported; save the adapter with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    for name, value in config.items():
        if name not in USED | NO_EFFECT and value not in OFF:
            raise DataError(f"{path}: field {name} ({str(value)[:60]}) is not supported; {PEFT}")
    _check_numbers(config, path)
    return config


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """DataError for ranks and alphas that are no numbers, or patterns that are no regular expressions."""
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        if not _is_number(config.get(name), kinds):
            raise DataError(f"{path}: {name} is {config.get(name)!r}; it must be a positive number")
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = config.get(name) or {}
        try:
            good = all(_is_number(value, kinds) and _is_pattern(key) for key, value in pattern.items())
        except (AttributeError, TypeError, re.error):
            good = False
        if not good:
            raise DataError(f"{path}: {name} is {str(pattern)[:60]}; it must map names of modules to positive numbers")


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _is_pattern(text: str) -> bool:
    """A regular expression that takes little time, whatever it is matched with; re.error if it is none.

    A group that is repeated, or many repetitions, can take hours for a short name.
    """
    return bool(re.compile(text)) and len(re.findall(r"[*+{]", text)) <= 4 and not re.search(r"\)[*+{]", text)


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first value whose key matches the end of a module's name, at a dot; peft's own rule (get_pattern_key)."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _kind(module: str) -> str:
    """A module's name without numbers: the same in each layer, and for each expert."""
    return re.sub(r"\.\d+\.", ".N.", module)


def _what(name: str) -> str:
    """What a tensor of an adapter is that is not A, B or a magnitude of a linear layer. peft may save whole weights."""
    if "lora_embedding" in name or re.search(r"\.(embed_tokens|lm_head)\.", name):
        return "it changes the embedding or the head, and NeMo's adapters are for the layers between"
    if "bias" in name.rpartition(".")[2]:
        return "it is a bias, and NeMo's adapters have none"
    return "it replaces a weight of the base, and NeMo's adapters do not"
