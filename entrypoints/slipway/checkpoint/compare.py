"""Are two checkpoints the same model? Compares their tensors in Hugging Face's form, part by part and bit for bit.

A NeMo checkpoint is read with the rules of export, a quantised model with its decoder, a merged model without its
heads. Two models are the same if NeMo would get the same configuration for both, and if all elements of all tensors
are equal in the dtype of the dequantised model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slipway.checkpoint import huggingface, inspection, opened, stream
from slipway.checkpoint.outputs import bf16_config
from slipway.errors import SlipwayError
from slipway.families import Family, read_config, rules, understood
from slipway.families.checks import Config, check_stored
from slipway.families.mtp import has_mtp, mtp_layers, without_mtp
from slipway.tensors.bits import Bits, as_dtype, contiguous, to_float32
from slipway.tensors.refs import Ref, TensorInfo, stored_bytes


class Different(SlipwayError):
    """Two checkpoints are not the same model; the message names the first difference."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as a model in Hugging Face's form.

    Args:
        path: its folder.
        config: config.json of the dequantised model.
        family: its family.
        read: gives the Hugging Face parts of a cell, in the dtypes of the family's rules.
        nemo: it is a NeMo checkpoint.
    """

    path: Path
    config: Config
    family: Family
    read: Callable[[rules.Cell], tuple[Bits, ...]]
    nemo: bool = False

    @functools.cached_property
    def rules(self) -> rules.Rules:
        """Its tensors and cells."""
        return self.family.rules(self.config)

    def without_mtp(self) -> Model:
        """The same model without the layers for multi-token prediction, which import leaves out by default."""
        return replace(self, config=without_mtp(self.config))


def open_model(path: Path, given: opened.Given = opened.NOTHING) -> Model:
    """Open a Hugging Face folder (quantised, BF16, or merged with heads) or a NeMo checkpoint."""
    if opened.is_megatron(path):
        return _open_megatron(path, given)
    if read_config(path / "config.json").get("model_type") == inspection.MERGED_TYPE:
        return _open_merged(path)
    found = opened.open_model(path)
    return Model(path, bf16_config(found.config), found.family, found.hf_parts)


def _open_megatron(path: Path, given: opened.Given) -> Model:
    found = opened.open_megatron(path, given)
    nemo = (found.reader.folder.parent / "context").is_dir()
    return Model(found.reader.folder.parent if nemo else path, found.config, found.family, found.hf_parts, nemo=nemo)


def _open_merged(path: Path) -> Model:
    where = path / "config.json"
    config = inspection.base_config(read_config(where))
    family, config = understood(config, where)
    reader = huggingface.Reader(path, huggingface.read_folder(path), config)
    base = {n.removeprefix(inspection.BASE): i for n, i in reader.tensors.items() if n.startswith(inspection.BASE)}
    known = config if has_mtp(config, base) else without_mtp(config)
    check_stored(known, where, stored_bytes(base))
    model = family.rules(known)
    rules.check_tensors(base, model.hf, str(path))

    def read(cell: rules.Cell) -> tuple[Bits, ...]:
        refs = (Ref(inspection.BASE + ref.name, ref.index, ref.rows) for ref in cell.hf)
        dtypes = (model.hf[ref.name].dtype for ref in cell.hf)
        parts = zip(refs, dtypes, strict=True)
        return tuple(as_dtype(reader.read(ref), reader.tensors[ref.name].dtype, dtype) for ref, dtype in parts)

    return Model(path, known, family, read)


def open_pair(a: Path, b: Path, given: opened.Given = opened.NOTHING) -> tuple[Model, Model]:
    """Open two models; if one has no layers for multi-token prediction, both are taken without."""
    one, other = (open_model(path, given if opened.is_megatron(path) else opened.NOTHING) for path in (a, b))
    if mtp_layers(one.config) and mtp_layers(other.config):
        return one, other
    return one.without_mtp(), other.without_mtp()


def check_same_form(a: Model, b: Model) -> None:
    """Different if the two differ in family, configuration, or names and shapes of tensors."""
    kinds = [model.config["model_type"] for model in (a, b)]
    if kinds[0] != kinds[1]:
        raise Different(f"{a.path} is a {kinds[0]} model, {b.path} is a {kinds[1]} model")
    one, other = (model.family.nemo_model(model.config)[2] for model in (a, b))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise Different(f"{name} is {one.get(name)!r} in {a.path} and {other.get(name)!r} in {b.path}")
    for name in sorted(a.rules.hf.keys() | b.rules.hf.keys()):
        shapes = [list(model.rules.hf[name].shape) if name in model.rules.hf else "missing" for model in (a, b)]
        if shapes[0] != shapes[1]:
            raise Different(f"tensor {name} is {shapes[0]} in {a.path} and {shapes[1]} in {b.path}")


def compare(a: Model, b: Model, atol: float, memory: int) -> int:
    """The number of bytes compared, if all are equal; else Different, with the first difference in the order of cells.

    Args:
        atol: largest difference of two elements that still counts as equal; 0 = the same bits. Any two NaN are equal.
        memory: most bytes for the tensors that are being compared.
    """
    check_same_form(a, b)
    cells = a.rules.cells
    sizes = {number: 2 * _bytes(cell, a.rules.hf) for number, cell in enumerate(cells)}
    found: dict[int, str] = {}

    def do(number: int) -> None:
        # Cells are started in order, so all before the first difference are compared: each run names the same one.
        if not found or number < min(found):
            cell = cells[number]
            for ref, one, other in zip(cell.hf, a.read(cell), b.read(cell), strict=True):
                if number not in found and (difference := _difference(ref, a.rules.hf[ref.name], one, other, atol)):
                    found[number] = difference

    stream.in_parallel(sizes, do, "verify", memory)
    if found:
        raise Different(f"{a.path} and {b.path} differ: {found[min(found)]}")
    return sum(sizes.values()) // 2


def _bytes(cell: rules.Cell, tensors: Mapping[str, TensorInfo]) -> int:
    infos = ((ref, tensors[ref.name]) for ref in cell.hf)
    return sum(TensorInfo(ref.shape(info.shape), info.dtype).bytes for ref, info in infos)


def _difference(ref: Ref, info: TensorInfo, one: Bits, other: Bits, atol: float) -> str | None:
    """The first element of a part that differs, in words; None if there is none."""
    same = one == other  # bits, which is all that equal models need
    if same.all():
        return None
    values = [to_float32(contiguous(part), info.dtype) for part in (one, other)]
    same |= np.isnan(values[0]) & np.isnan(values[1])
    if atol:
        with np.errstate(invalid="ignore"):  # inf - inf
            same |= np.abs(values[0] - values[1]) <= atol
    if same.all():
        return None
    at = int(same.argmin())
    index = _unravel(ref.start(info.shape) + at, info.shape)
    found = [float(value.flat[at]) for value in values]
    return f"tensor {ref.name}{index} is {found[0]!r} in the first and {found[1]!r} in the second"


def _unravel(at: int, shape: tuple[int, ...]) -> list[int]:
    """The index of element number `at`, as plain integers, which print well."""
    index = []
    for size in reversed(shape):
        at, place = divmod(at, size)
        index.append(place)
    return index[::-1]
