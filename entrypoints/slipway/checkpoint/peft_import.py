"""A peft adapter → a NeMo checkpoint of adapters, from which a run can go on: the plan of `import --adapter`.

NeMo has one rank and one alpha for all adapters of a model, and one A for a layer that is several of Hugging Face's
(q, k and v; gate and up). What does not fit that is put together so that B·A stays the same to the bit:

    A = [A_q; A_k; A_v]     B = [B_q 0 0; 0 B_k 0; 0 0 B_v], each with its rows where the rules put them

Equal A's are there once. An adapter of a smaller rank gets rows and columns of zeros, and so does a layer that has none
while others of its kind have one. Where the scales differ, B is multiplied by the ratio, in float32.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import archive, convert, nemo_context, opened, torch_dist
from slipway.checkpoint.lora import ADAPTER, BASE, BASE_NOTE, IN, MAGNITUDE, OUT
from slipway.checkpoint.peft import CONFIG, LORA_A, LORA_B, Adapter, Lora
from slipway.checkpoint.peft import MAGNITUDE as VECTOR
from slipway.checkpoint.stream import Piece, Plan, Write, identity_of_files
from slipway.errors import DataError
from slipway.families import rules
from slipway.tensors.bits import Bits, as_dtype, to_float32
from slipway.tensors.refs import Ref, TensorInfo

CLASSES = {False: "nemo.collections.llm.peft.lora:LoRA", True: "nemo.collections.llm.peft.dora:DoRA"}
EXPERTS = ".experts.experts."


def plan(
    source: Path, adapter: Path, out: Path, name: str, mtp: bool = False, devices: Sequence[str] = ("cpu",)
) -> tuple[Plan, dict[str, Any]]:
    """Plan of the NeMo checkpoint of a peft adapter, and of its base if that is not one yet.

    Args:
        source: the base, a NeMo checkpoint or the folder of a Hugging Face model. The checkpoint of the latter is
            written to `out`/base.
        adapter: folder of the adapter.
        out: where the plan will be carried out: NeMo notes the base by its whole path.
        name: what other programs load the base by.
        mtp, devices: as for `import`.
    """
    of_base: dict[str, Any] = {}
    if _is_nemo(source):
        base, base_plan, at = opened.open_nemo(source), None, source
        if base.reader.folder != torch_dist.weights_folder(source):
            raise DataError(f"{source} is a checkpoint of adapters; give its base, and merge them with `export` before")
    else:
        base, at = opened.to_import(source, mtp, devices), out / BASE
        base_plan, of_base = convert.import_plan(source, mtp, devices, name)
    given = Adapter(adapter, base.model.hf, source)
    found = _Attached(given, base)
    files, copies = _context(found, base, base_plan, source)
    note = {"model_ckpt_path": str(at.absolute())}
    made = Plan(
        sizes={f"weights/{file}": size for file, size in found.layout.sizes.items()},
        pieces=found.pieces(),
        small={
            **files,
            "weights/metadata.json": torch_dist.FORMAT.encode(),
            "weights/common.pt": torch_dist.common_state(),
            "weights/.metadata": found.layout.metadata(),
            f"weights/{BASE_NOTE}": json.dumps(note).encode(),
        },
        copies=copies,
        identity=["adapter", mtp, identity_of_files([*base.reader.files(), *given.reader.files(), adapter / CONFIG])],
        reads=[source, adapter],
    )
    notes = [*found.notes(), *of_base.get("notes", [])]
    details = {"tensors": len(found.tensors), "rank": found.rank, "alpha": found.alpha, "notes": notes}
    return (_beside(made, base_plan) if base_plan else made), details


def _is_nemo(folder: Path) -> bool:
    return any((where / ".metadata").is_file() for where in (folder / "weights", folder))


def _beside(adapters: Plan, base: Plan) -> Plan:
    """One plan of both, the base in a folder of its own."""

    def moved(piece: Piece) -> Piece:
        return Piece(piece.bytes, lambda: ((f"{BASE}/{file}", at, data) for file, at, data in piece.work()))

    def within(names: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{BASE}/{name}": value for name, value in names.items()}

    return Plan(
        {**adapters.sizes, **within(base.sizes)},
        [*adapters.pieces, *map(moved, base.pieces)],
        {**adapters.small, **within(base.small)},
        {**adapters.copies, **within(base.copies)},
        [adapters.identity, base.identity],
        reads=adapters.reads,
    )


def _context(
    found: _Attached, base: opened.Opened, base_plan: Plan | None, source: Path
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """(content, copies) of context/: the base's, and in io.json and model.yaml NeMo's class for the adapters."""
    inside = "context/"
    if base_plan:
        small = {name: content for name, content in base_plan.small.items() if name.startswith(inside)}
        copies = {name: file for name, file in base_plan.copies.items() if name.startswith(inside)}
    else:
        context = opened.context_folder(torch_dist.weights_folder(source))
        small = {}
        copies = {f"{inside}{f.relative_to(context)}": f for f in sorted(context.rglob("*")) if f.is_file()}
    made = nemo_context.context_files(*base.family.nemo_model(base.config), {}, found.transform())
    for name in ("io.json", "model.yaml"):
        copies.pop(f"{inside}{name}", None)
        small[f"{inside}{name}"] = made[name]
    return small, copies


@dataclass(frozen=True)
class _Target:
    """One matrix of Megatron's that gets an adapter.

    Args:
        stem, index: the weight `stem`.weight, and the matrix in its stack.
        cells: between this matrix and those of Hugging Face.
    """

    stem: str
    index: tuple[int, ...]
    cells: tuple[rules.Cell, ...]

    @property
    def sources(self) -> list[str]:
        """Hugging Face's modules."""
        return list(dict.fromkeys(ref.name.removesuffix(".weight") for cell in self.cells for ref in cell.hf))


class _Attached:
    """What NeMo attaches to the base so that it computes what the peft adapter does.

    Args:
        given: the peft adapter.
        base: the base, of either form.
    """

    def __init__(self, given: Adapter, base: opened.Opened) -> None:
        self.given, self.base = given, base
        self.targets = _targets(given, base)
        self._check_places()
        self.blocks = {(t.stem, t.index): self._blocks(t) for t in self.targets}
        self.rank = max(sum(self._rank_of(name) for name in blocks) for blocks in self.blocks.values())
        self.scale = Counter(lora.scale for lora in given.modules.values()).most_common(1)[0][0]
        self.alpha = self.scale * self.rank
        self.dtype = "BF16" if self._fits_bf16() else "F32"
        self.tensors, chunks = self._tensors()
        self.layout = torch_dist.Layout(
            self.tensors, chunks, [_extra_state(self.tensors, ref) for ref in chunks if ref.name.endswith((IN, OUT))]
        )

    def transform(self) -> nemo_context.Call:
        """NeMo's class for these adapters, in the context."""
        arguments = {"target_modules": self._patterns(), "dim": self.rank, "alpha": self.alpha, "dropout": 0.0}
        return nemo_context.Call(CLASSES[self.given.dora], arguments)

    def notes(self) -> list[str]:
        """What a person should know, and what `train` needs."""
        ranks = sorted({lora.rank for lora in self.given.modules.values()})
        targets = ",".join(self._patterns())
        kind = " --dora" if self.given.dora else ""
        said = [f"in training: --lora-rank {self.rank} --lora-alpha {self.alpha:g} --lora-targets {targets}{kind}"]
        if ranks != [self.rank]:
            said.append(
                f"rank {', '.join(map(str, ranks))} → {self.rank}: NeMo has one A for q, k and v, one for gate and up, "
                "and one rank for all; B·A is the same"
            )
        if any(EXPERTS in t.stem for t in self.targets) and not self.shared:
            said.append(
                "each expert has an adapter of its own; NeMo's grouped experts have one for all, and cannot load them"
            )
        return said

    # ------------------------------------------------------------------------ planning

    def _check_places(self) -> None:
        """DataError for a module that is no layer to which NeMo attaches adapters, and for what DoRA cannot do."""
        placed = {name for target in self.targets for name in target.sources}
        for module in self.given.modules:
            if module not in placed:
                raise DataError(
                    f"{self.given.folder}: {module} has an adapter, and NeMo attaches none there; only linear layers "
                    "of attention, MLPs and experts are supported"
                )
        for target in self.targets if self.given.dora else ():
            if EXPERTS in target.stem:
                raise DataError(
                    f"{self.given.folder}: {target.sources[0]} has DoRA, which NeMo's cannot compute for experts; "
                    "merge the adapter with peft (merge_and_unload), and import the result"
                )
            if f"{target.stem}.bias" in self.base.model.megatron:
                raise DataError(
                    f"{self.given.folder}: {target.sources[0]} has a bias, which NeMo's DoRA multiplies and peft's "
                    "does not; merge the adapter with peft (merge_and_unload), and import the result"
                )

    def _blocks(self, target: _Target) -> list[str]:
        """Of the modules of a target that have an adapter, those that have different A's."""
        found: list[str] = []
        for name in target.sources:
            if name in self.given.modules and not any(self._same_inner(name, other) for other in found):
                found.append(name)
        return found

    def _same_inner(self, one: str, other: str) -> bool:
        parts = [self.given.read(name, LORA_A)[0] for name in (one, other)]
        return np.array_equal(parts[0], parts[1])

    def _rank_of(self, name: str) -> int:
        return self.given.modules[name].rank

    def _fits_bf16(self) -> bool:
        """Everything is stored in BF16, and nothing is multiplied."""
        stored = {
            self.given.reader.tensors[n].dtype for lora in self.given.modules.values() for n in lora.tensors.values()
        }
        return stored == {"BF16"} and all(lora.scale == self.scale for lora in self.given.modules.values())

    @cached_property
    def shared(self) -> bool:
        """All experts have the same adapters, so that one is enough, as NeMo's grouped experts have it."""
        firsts: dict[Any, _Target] = {}
        for target in self.targets:
            first = firsts.setdefault((target.stem, target.index[:-1]), target)
            if EXPERTS in target.stem and target is not first and not self._same(first, target):
                return False
        return not self.given.dora

    def _same(self, one: _Target, other: _Target) -> bool:
        pairs = list(zip(one.sources, other.sources, strict=True))
        if any((a in self.given.modules) != (b in self.given.modules) for a, b in pairs):
            return False
        return all(
            np.array_equal(self.given.values(a, kind), self.given.values(b, kind))
            for a, b in pairs
            if a in self.given.modules
            for kind in (LORA_A, LORA_B)
        )

    def _index(self, target: _Target) -> tuple[int, ...] | None:
        """Where the adapter of a target lies in its stack; None if that of the first expert is for it too."""
        if EXPERTS not in target.stem or not self.shared:
            return target.index
        return None if target.index[-1] else target.index[:-1]

    def _tensors(self) -> tuple[dict[str, TensorInfo], list[Ref]]:
        tensors: dict[str, TensorInfo] = {}
        chunks = []
        for target in self.targets:
            *stack, out, inner = self.base.model.megatron[f"{target.stem}.weight"].shape
            if (index := self._index(target)) is None:
                continue
            stack = stack[: len(index)]
            shapes = {IN: (self.rank, inner), OUT: (out, self.rank)} | ({MAGNITUDE: (out,)} if self.given.dora else {})
            for kind, shape in shapes.items():
                key = f"{target.stem}{ADAPTER}{kind}"
                tensors[key] = TensorInfo((*stack, *shape), "F32" if kind == MAGNITUDE else self.dtype)
                chunks.append(Ref(key, index))
        return tensors, chunks

    def _patterns(self) -> list[str]:
        """`target_modules`: a layer's plain name if all layers of this name have an adapter, else where they lie."""
        kinds: dict[str, set[str]] = {}
        for key in self.base.model.megatron:
            if _is_linear(key):
                kinds.setdefault(_name(key), set()).add(_kind(key))
        have = {_kind(f"{target.stem}.weight") for target in self.targets}
        found: list[str] = []
        for name, places in kinds.items():
            found += [name] if places <= have else [_pattern(kind) for kind in sorted(places & have)]
        return found

    # ------------------------------------------------------------------------ the work

    def pieces(self) -> list[Piece]:
        """One for each target, and one for the extra state that Megatron's linear layers ask for."""

        def extra_state() -> Iterable[Write]:
            return [(f"weights/{file}", at, self.layout.empty_state) for file, at, _ in self.layout.extra.values()]

        adapters = [self._piece(target) for target in self.targets if self._index(target) is not None]
        return [*adapters, Piece(0, extra_state)]

    def _piece(self, target: _Target) -> Piece:
        made = {IN: self._inner, OUT: self._outer} | ({MAGNITUDE: self._magnitude} if self.given.dora else {})

        def work() -> Iterable[Write]:
            for kind, make in made.items():
                yield from self._write(f"{target.stem}{ADAPTER}{kind}", target, make(target))

        names = [n for name in target.sources if (lora := self._lora(name)) for n in lora.tensors.values()]
        return Piece(sum(self.given.reader.tensors[name].bytes for name in names), work)

    def _lora(self, name: str) -> Lora | None:
        return self.given.modules.get(name)

    def _write(self, key: str, target: _Target, values: Bits) -> Iterable[Write]:
        index = self._index(target)
        assert index is not None
        ref, info = Ref(key, index), self.tensors[key]
        file, offset, _ = self.layout.places[ref]
        part = as_dtype(values.view(np.uint32), "F32", info.dtype)
        for content in archive.write(part.reshape(torch_dist.chunk_sizes(ref, info.shape)), info.dtype):
            yield f"weights/{file}", offset, content
            offset += len(content)

    def _inner(self, target: _Target) -> Bits:
        """float32 A [rank, in]."""
        width = self.base.model.megatron[f"{target.stem}.weight"].shape[-1]
        whole, at = np.zeros((self.rank, width), np.float32), 0
        for name in self.blocks[target.stem, target.index]:
            part = self.given.values(name, LORA_A)
            whole[at : at + len(part)] = part
            at += len(part)
        return whole

    def _outer(self, target: _Target) -> Bits:
        """float32 B [out, rank]."""
        wide = {name: self._columns(target, name) for name in target.sources}
        return _joined(target, wide, self.base.model.megatron)

    def _columns(self, target: _Target, name: str) -> Bits:
        """float32 [rows, rank]: B of one of Hugging Face's matrices, in the columns of its A, scaled as all are."""
        whole = np.zeros((self.base.model.hf[f"{name}.weight"].shape[0], self.rank), np.float32)
        lora, at = self._lora(name), 0
        for block in self.blocks[target.stem, target.index] if lora else ():
            if self._same_inner(block, name):
                part = self.given.values(name, LORA_B)
                scale = 1 if lora.scale == self.scale else np.float32(lora.scale / self.scale)  # type: ignore[union-attr]
                whole[:, at : at + part.shape[1]] = part * scale
                break
            at += self._rank_of(block)
        return whole

    def _magnitude(self, target: _Target) -> Bits:
        """float32 [out]: the given ones; for a matrix without one the length of its rows, which changes nothing."""
        lengths = {
            name: self.given.values(name, VECTOR)
            if self._lora(name)
            else np.linalg.norm(_weight(self.base, f"{name}.weight"), axis=1)
            for name in target.sources
        }
        return _joined(target, lengths, self.base.model.megatron)


def _extra_state(tensors: Mapping[str, TensorInfo], ref: Ref) -> str:
    """The key of the entry that Megatron asks for beside the weight of a linear layer; see rules.Scope.state."""
    place, stack = ref.index or (0,), tensors[ref.name].shape[: len(ref.index)] or (1,)
    shard = ".".join(map(str, place)) + "_" + ".".join(map(str, stack))
    return f"{ref.name.removesuffix('weight')}_extra_state/shard_{shard}"


def _joined(target: _Target, parts: Mapping[str, Bits], megatron: Mapping[str, TensorInfo]) -> Bits:
    """The rows of Hugging Face's matrices, by their modules, in Megatron's order: what the rules do with a weight's."""
    rows = megatron[f"{target.stem}.weight"].shape[-2]
    whole = np.empty((rows, *next(iter(parts.values())).shape[1:]), np.float32)
    for cell in target.cells:
        taken = tuple(parts[ref.name.removesuffix(".weight")][slice(*ref.rows) if ref.rows else ...] for ref in cell.hf)
        for ref, part in zip(cell.megatron, cell.op.to_megatron(taken), strict=True):
            whole[slice(*ref.rows) if ref.rows else ...] = part
    return whole


def _targets(given: Adapter, base: opened.Opened) -> list[_Target]:
    """Every matrix of the base of a kind that the adapter has: NeMo attaches adapters to all of them."""
    found: dict[tuple[str, tuple[int, ...]], _Target] = {}
    for cell in base.model.cells:
        ref = cell.megatron[0]
        if not _is_linear(ref.name) or any(part.index for part in cell.hf):
            continue
        place = ref.name.removesuffix(".weight"), ref.index
        before = found.get(place, _Target(*place, ()))
        found[place] = replace(before, cells=(*before.cells, cell))
    kinds = {_kind(t.stem) for t in found.values() if any(name in given.modules for name in t.sources)}
    return [target for target in found.values() if _kind(target.stem) in kinds]


def _weight(base: opened.Opened, name: str) -> Bits:
    """float32 [rows, columns]: one of Hugging Face's matrices, of a base in either form."""
    info = base.model.hf[name]
    if name in base.reader.tensors:
        return to_float32(base.reader.read(Ref(name)), base.reader.tensors[name].dtype)
    whole = np.empty(info.shape, np.float32)
    for cell in base.model.cells:
        if any(ref.name == name for ref in cell.hf):
            for ref, part in zip(cell.hf, base.hf_parts(cell), strict=True):
                if ref.name == name:
                    whole[slice(*ref.rows) if ref.rows else ...] = to_float32(part, info.dtype)
    return whole


def _is_linear(key: str) -> bool:
    """The key of a weight that NeMo's classes attach an adapter to."""
    return _name(key).startswith("linear_") and key.endswith(".weight")


def _name(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def _kind(key: str) -> str:
    """The place of a layer inside its transformer layer, such as mlp.shared_experts.linear_fc1."""
    found = re.search(r"(?:self_attention|mlp)\..*", key.removesuffix(".weight"))
    return found.group().replace("experts.experts.", "experts.") if found else key


def _pattern(kind: str) -> str:
    """NeMo's pattern for the layers of a kind. The name of a module of experts that are not grouped has a number."""
    return f"*.{kind}".replace(".mlp.experts.", ".mlp.experts.*")
