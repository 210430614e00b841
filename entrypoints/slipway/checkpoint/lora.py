"""Low-rank adapters that NeMo trained: account for their tensors, and merge them into their base while reading.

A weight W [..., out, in], `X.weight`, has an adapter of two matrices: A [..., rank, in], `X.adapter.linear_in.weight`,
and B [..., out, rank], `X.adapter.linear_out.weight`. The model computes with W + s·B·A, where s = alpha / rank. Two
more of NeMo's kinds (nemo.collections.llm.peft) add to that:

DoRA has `X.adapter.weight_magnitude`, m [..., out]. Row by row the model computes with m / |W + s·B·A| · (W + s·B·A).
CanonicalLoRA has adapters for q, k and v, or gate and up, `X.adapter.adapter_q.linear_in.weight` and so on.

On the way to Hugging Face the rules do with the rows of B what they do with the rows of W; A is the same for every
part. If W has a matrix for every expert, A and B have one for every expert too, or one pair for all experts (NeMo's
grouped experts).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint.torch_dist import Reader, is_state
from slipway.errors import DataError, UsageError
from slipway.tensors.bits import Bits, to_float32
from slipway.tensors.refs import Ref, TensorInfo
from slipway.untrusted import read_object, read_text

ADAPTER = ".adapter."
IN, OUT, MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"
KEY = re.compile(r"(.+)\.adapter\.((?:adapter_[a-z]+\.)?(?:linear_in\.weight|linear_out\.weight|weight_magnitude))")
# What CanonicalLoRA puts beside each other, in the order of the rows of its base's output.
CANONICAL = {
    "linear_qkv": ("adapter_q.", "adapter_k.", "adapter_v."),
    "linear_fc1": ("adapter_gate.", "adapter_up."),
}
BASE_NOTE = "adapter_metadata.json"
BASE = "base"  # the base beside its adapters, as `import --adapter` writes both
NUMBER = r"[-+]?[0-9]{1,30}(?:\.[0-9]{0,30})?(?:[eE][-+]?[0-9]{1,3})?"


def has_adapters(reader: Reader) -> bool:
    """The checkpoint holds low-rank adapters."""
    return any(KEY.fullmatch(key) for key in _without_optimizer(reader))


def _without_optimizer(reader: Reader) -> Iterator[str]:
    return (key for key in reader.tensors if not is_state(key))


def base_of(adapters: Reader, base: Path | None) -> Path:
    """The base's checkpoint: the one given, else the one that NeMo noted, else the one beside; DataError for none."""
    note = adapters.folder / BASE_NOTE
    if base is None and note.is_file():
        base = noted_base(note)
    if (base is None or not base.is_dir()) and (beside := adapters.folder.parent / BASE).is_dir():
        return beside
    if base is None or not base.is_dir():
        raise DataError(f"{adapters.folder}: the base of these adapters is not at {base}; give it with --base")
    return base


def noted_base(note: Path) -> Path:
    """What NeMo noted as the base of adapters or heads; DataError for a damaged note."""
    base = read_object(note, 1 << 20, "copy the checkpoint again").get("model_ckpt_path")
    if not isinstance(base, str):
        raise DataError(f"{note} does not name the base; copy the checkpoint again")
    return Path(base)


# ---------------------------------------------------------------------------- what there is


@dataclass(frozen=True, slots=True)
class Module:
    """What is attached to the weight `stem`.weight of the base.

    Args:
        inner, outer: the keys of A and of B: one each, or CanonicalLoRA's.
        magnitude: the key of DoRA's magnitude, or "".
    """

    stem: str
    inner: tuple[str, ...]
    outer: tuple[str, ...]
    magnitude: str = ""

    @property
    def weight(self) -> str:
        return f"{self.stem}.weight"

    @property
    def name(self) -> str:
        """Megatron's name of the layer, such as linear_qkv."""
        return self.stem.rpartition(".")[2]

    @property
    def dora(self) -> bool:
        return bool(self.magnitude)


@dataclass(frozen=True, slots=True)
class Settings:
    """What model.yaml says of the adapters; the tensors do not say it.

    Args:
        kind: NeMo's class, "" if the file does not name it.
        rank: None if the file does not name it.
        targets: names or patterns of the modules that have an adapter; empty if the file does not name them.
    """

    kind: str
    alpha: float
    rank: int | None
    targets: tuple[str, ...]


def settings_of(adapters: Reader) -> Settings:
    """The settings in the context of a checkpoint; DataError where its model.yaml does not contain alpha."""
    # By its lines: the file is YAML with tags of Python objects, which a parser would have to be told about.
    path = adapters.folder.parent / "context" / "model.yaml"
    text = read_text(path, 16 << 20, "copy the checkpoint again") if path.is_file() else ""
    section = re.search(r"(?ms)^model_transform:\n(.*?)(?=^\S|\Z)", text)
    lines = section.group(1) if section else ""

    def value(name: str, pattern: str) -> str:
        found = re.search(rf"(?m)^  {name}: ({pattern})$", lines)
        return found.group(1) if found else ""

    if not (alpha := value("alpha", NUMBER)):
        raise DataError(f"{path} does not contain the adapters' alpha; copy context/ of the checkpoint again")
    targets = re.search(r"(?m)^  target_modules:\n((?:  +- .*\n?)+)", lines)
    rank = value("dim", "[0-9]{1,9}")
    return Settings(
        value("_target_", r"\S+").rpartition(".")[2],
        float(alpha),
        int(rank) if rank else None,
        tuple(re.findall(r"- ['\"]?([^'\"\n]+)", targets.group(1))) if targets else (),
    )


class Adapters:
    """The adapters of a checkpoint: every tensor is accounted for, and they fit their base.

    `modules` maps the key of each adapted weight of the base to what it has. `left_out` counts the optimizer's tensors.

    Args:
        reader: of the adapters' checkpoint.
        base: key → TensorInfo of the base.
        where: the base, for messages.
        settings: of the adapters; None = what model.yaml says.

    Errors: DataError for a tensor that is unknown, missing or of a wrong shape, and for what cannot be merged.
    """

    def __init__(
        self, reader: Any, base: Mapping[str, TensorInfo], where: Path, settings: Settings | None = None
    ) -> None:
        self.reader, self.folder = reader, reader.folder
        self.settings = settings or settings_of(reader)
        self.modules = {module.weight: module for module in _modules(reader)}
        self.left_out = len(reader.tensors) - sum(1 for _ in _without_optimizer(reader))
        first = next(iter(self.modules.values())).inner[0]
        self.rank = self.settings.rank or reader.tensors[first].shape[-2]
        self._check_kind()
        for module in self.modules.values():
            self._check_ranks(module)
            self._check_fit(module, base, where)
            self._check_layout(module)
        self._check_targets(base)

    def check_given(self, rank: int | None, alpha: float | None) -> None:
        """UsageError where the user says another rank or alpha than the checkpoint."""
        for name, given, stored in (("r", rank, self.rank), ("alpha", alpha, self.settings.alpha)):
            if given is not None and given != stored:
                raise UsageError(f"--lora-{name} is {given:g}, but {self.folder} says {stored:g}")

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.settings.alpha / self.rank

    @property
    def notes(self) -> tuple[str, ...]:
        """What the summary says of what was not read."""
        return (f"left out: {self.left_out} tensors of the optimizer",) if self.left_out else ()

    def inner(self, module: Module, index: tuple[int, ...]) -> tuple[Bits, str]:
        """A [..., rank, in] of the matrix `index` of a weight, and its dtype; CanonicalLoRA's are one below another."""
        return np.concatenate([self._read(key, index) for key in module.inner], axis=-2), self._dtype(module.inner)

    def outer(self, module: Module, index: tuple[int, ...], rows: tuple[int, int] | None = None) -> tuple[Bits, str]:
        """B [..., rows, rank] of the matrix `index` of a weight, and its dtype; CanonicalLoRA's stand diagonally."""
        if len(module.outer) == 1:
            return self._read(module.outer[0], index, rows), self._dtype(module.outer)
        parts = [self._read(key, index) for key in module.outer]
        *stack, _, rank = parts[0].shape
        whole = np.zeros((*stack, sum(part.shape[-2] for part in parts), rank * len(parts)), parts[0].dtype)
        at = 0
        for number, part in enumerate(parts):
            whole[..., at : at + part.shape[-2], number * rank : (number + 1) * rank] = part
            at += part.shape[-2]
        return whole[..., slice(*rows) if rows else slice(None), :], self._dtype(module.outer)

    def magnitude(self, module: Module, index: tuple[int, ...], rows: tuple[int, int] | None = None) -> Bits:
        """float32 [..., rows]: DoRA's magnitude of the rows of the matrix `index` of a weight."""
        values = to_float32(self._read(module.magnitude, index, matrix=1), self._dtype((module.magnitude,)))
        ranks = self.reader.cuts(module.magnitude, -1)
        if module.name == "linear_fc1" and ranks > 1:
            # NeMo keeps gate above up in the weight and in B whatever the ranks, but forgets it for the magnitude:
            # that has the gate rows and the up rows of the first rank, then those of the second, and so on.
            values = values.reshape(*values.shape[:-1], ranks, 2, -1).swapaxes(-3, -2).reshape(values.shape)
        return values[..., slice(*rows)] if rows else values

    def _read(self, key: str, index: tuple[int, ...], rows: tuple[int, int] | None = None, matrix: int = 2) -> Bits:
        # A shared adapter has no index for the expert.
        return self.reader.read(Ref(key, index[: len(self.reader.tensors[key].shape) - matrix], rows))

    def _dtype(self, keys: tuple[str, ...]) -> str:
        return self.reader.tensors[keys[0]].dtype

    # ------------------------------------------------------------------------ checks

    def _check_kind(self) -> None:
        """Either all modules have a magnitude or none has."""
        wanted = self.settings.kind == "DoRA" or any(module.dora for module in self.modules.values())
        again = "is missing; copy the checkpoint again"
        for module in self.modules.values():
            if module.dora != wanted:
                raise DataError(f"{self.folder}: tensor {module.stem}{ADAPTER}{MAGNITUDE} of DoRA {again}")

    def _check_ranks(self, module: Module) -> None:
        for key, axis in [(key, -2) for key in module.inner] + [(key, -1) for key in module.outer]:
            if (shape := self.reader.tensors[key].shape)[axis] != self.rank:
                said = "model.yaml says" if self.settings.rank else "the others have"
                raise DataError(
                    f"{self.folder}: {key} has shape {list(shape)}, so rank {shape[axis]}, but {said} {self.rank}; "
                    "copy the checkpoint again, with its context/"
                )

    def _check_fit(self, module: Module, base: Mapping[str, TensorInfo], where: Path) -> None:
        if module.weight not in base:
            raise DataError(
                f"{self.folder}: {module.inner[0]} is for {module.weight}, which {where} lacks; check --base"
            )
        *stack, out, inner = base[module.weight].shape
        tensors = self.reader.tensors
        wanted = {key: (*stack, self.rank, inner) for key in module.inner}
        rows = [tensors[key].shape[-2] for key in module.outer]
        if len(rows) == 1 or sum(rows) != out:
            rows = [out // len(rows)] * len(rows)
        wanted |= {key: (*stack, count, self.rank) for key, count in zip(module.outer, rows, strict=True)}
        for key, shape in wanted.items():
            # One for each expert, or one for all experts of a layer.
            if tensors[key].shape not in (shape, (*stack[:-1], *shape[-2:])):
                raise self._misfit(key, shape, where)
        if module.dora and tensors[module.magnitude].shape != (*stack, out):
            raise self._misfit(module.magnitude, (*stack, out), where)

    def _misfit(self, key: str, wanted: tuple[int, ...], where: Path) -> DataError:
        shape = list(self.reader.tensors[key].shape)
        return DataError(f"{self.folder}: {key} has shape {shape}, but {where} needs {list(wanted)}; check --base")

    def _check_layout(self, module: Module) -> None:
        """DataError for what tensor parallel ranks have saved in a form that nothing can be merged from."""
        key = module.inner[0]
        if module.dora and (ranks := self.reader.cuts(key, -1)) > 1:
            raise DataError(
                f"{self.folder}: {module.magnitude} is of a run with tensor parallel size {ranks}, in which NeMo takes "
                "the length of a row on each rank alone and saves that of the first rank: no weights compute the same; "
                f"train without {module.name} in --lora-targets, or with tensor parallel size 1"
            )
        if len(module.inner) > 1 and (ranks := self.reader.cuts(key, -2)) > 1:
            raise DataError(
                f"{self.folder}: {module.outer[0]} of CanonicalLoRA is from a run with tensor parallel size {ranks}, "
                "which orders its rows by ranks, and this is not supported; train with tensor parallel size 1"
            )

    def _check_targets(self, base: Mapping[str, TensorInfo]) -> None:
        """DataError for a module that the run adapted by its plain name, and that has no adapter here."""
        plain = {name for name in self.settings.targets if "*" not in name}
        for key in base:
            stem, _, kind = key.rpartition(".")
            if kind == "weight" and stem.rpartition(".")[2] in plain and key not in self.modules:
                raise DataError(
                    f"{self.folder}: tensor {stem}{ADAPTER}{IN} is missing, although model.yaml has "
                    f"{stem.rpartition('.')[2]} in target_modules; copy the checkpoint again"
                )


def _modules(reader: Reader) -> Iterator[Module]:
    found: dict[str, set[str]] = defaultdict(set)
    for key in _without_optimizer(reader):
        if not (match := KEY.fullmatch(key)):
            raise _unknown(reader, key)
        found[match.group(1)].add(match.group(2))
    for stem, names in found.items():
        yield _module(reader, stem, names)


def _module(reader: Reader, stem: str, names: set[str]) -> Module:
    """The module of these tensors' names; DataError if one is missing or unknown."""
    parts: tuple[str, ...] = ("",)
    if any(name.startswith("adapter_") for name in names):
        parts = CANONICAL.get(stem.rpartition(".")[2], ())
    inner, outer = (tuple(f"{stem}{ADAPTER}{part}{kind}" for part in parts) for kind in (IN, OUT))
    magnitude = f"{stem}{ADAPTER}{MAGNITUDE}" if parts == ("",) and MAGNITUDE in names else ""
    module = Module(stem, inner, outer, magnitude)
    wanted = {*inner, *outer, *filter(None, [magnitude])}
    there = {f"{stem}{ADAPTER}{name}" for name in names}
    if surplus := sorted(there - wanted):
        raise _unknown(reader, surplus[0])
    if missing := sorted(wanted - there):
        raise DataError(
            f"{reader.folder}: tensor {missing[0]} is missing, and {min(there)} is there; copy the checkpoint again"
        )
    return module


def _unknown(reader: Reader, key: str) -> DataError:
    return DataError(
        f"{reader.folder}: unknown tensor {key} in a checkpoint of adapters; known are those of NeMo's LoRA, DoRA and "
        f"CanonicalLoRA: X{ADAPTER}{IN}, X{ADAPTER}{OUT}, X{ADAPTER}{MAGNITUDE}"
    )


# ---------------------------------------------------------------------------- merging


class Merged:
    """Reads a base checkpoint with its adapters added. Adapted tensors are float32.

    float32, so that the sum is rounded once, when it is written in the dtype of the model.

    Args:
        base: a reader of the base.
        adapters: for this base.
    """

    def __init__(self, base: Reader, adapters: Adapters) -> None:
        self.base, self.adapters = base, adapters
        self._biases = _scaled_biases(adapters, base.tensors)
        self.folder, self.tensors = base.folder, dict(base.tensors)
        for key in (*adapters.modules, *self._biases):
            self.tensors[key] = TensorInfo(base.tensors[key].shape, "F32")

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor with its adapter, if it has one."""
        if module := self.adapters.modules.get(ref.name):
            return self._weight(module, ref).view(np.uint32)
        if module := self._biases.get(ref.name):
            return self._bias(module, ref).view(np.uint32)
        return self.base.read(ref)

    def files(self) -> list[Path]:
        """Every file of both."""
        return [*self.base.files(), *self.adapters.reader.files()]

    def _weight(self, module: Module, ref: Ref) -> Bits:
        found = self._sum(module, ref)
        if module.dora:
            found *= self._ratio(module, ref, found)[..., None]
        return found

    def _bias(self, module: Module, ref: Ref) -> Bits:
        of_weight = Ref(module.weight, ref.index, ref.rows)
        return self._floats(ref) * self._ratio(module, of_weight, self._sum(module, of_weight))

    def _sum(self, module: Module, ref: Ref) -> Bits:
        """float32 W + s·B·A."""
        outer = to_float32(*self.adapters.outer(module, ref.index, ref.rows))
        found = np.matmul(outer, to_float32(*self.adapters.inner(module, ref.index)))
        found *= np.float32(self.adapters.scale)
        found += self._floats(ref)
        return found

    def _ratio(self, module: Module, ref: Ref, found: Bits) -> Bits:
        """float32: what DoRA multiplies each row of the sum by."""
        return self.adapters.magnitude(module, ref.index, ref.rows) / np.linalg.norm(found, axis=-1)

    def _floats(self, ref: Ref) -> Bits:
        return to_float32(self.base.read(ref), self.base.tensors[ref.name].dtype)


def _scaled_biases(adapters: Adapters, base: Mapping[str, TensorInfo]) -> dict[str, Module]:
    """The biases that NeMo's DoRA multiplies as it does the rows: those that its linear layer adds itself.

    That is linear_qkv's alone: the others give their bias to the caller, who adds it after the adapter.
    """
    dora = [module for module in adapters.modules.values() if module.dora and module.name == "linear_qkv"]
    return {bias: module for module in dora if (bias := f"{module.stem}.bias") in base}


def biased_dora(adapters: Adapters, base: Mapping[str, TensorInfo]) -> str:
    """A bias that NeMo's DoRA multiplies, which peft's does not; "" if there is none."""
    return next(iter(_scaled_biases(adapters, base)), "")
