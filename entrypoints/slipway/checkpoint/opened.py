"""Open a checkpoint of any kind as one model: every tensor is there, in the right shape, and known to its family."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipway import families
from slipway.checkpoint import classic_files, classic_reader, huggingface, lora, nemo_context, surplus, torch_dist
from slipway.checkpoint.classic_lora import AdapterReader
from slipway.checkpoint.companions import TOKENIZER, Companions, companions_of
from slipway.checkpoint.described import Model, model_of
from slipway.checkpoint.formats import IN_CONFIG as QUANTIZATION
from slipway.checkpoint.source import NAME, source_of
from slipway.checkpoint.stream import content_of
from slipway.errors import DataError, UsageError
from slipway.families import Family, read_config, rules, understood
from slipway.families.checks import Config, check_stored
from slipway.families.decoder import is_tied
from slipway.families.mtp import has_mtp, mtp_layers, without_mtp
from slipway.tensors.bits import Bits, as_dtype
from slipway.tensors.refs import Ref, TensorInfo, stored_bytes

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight"}  # Megatron pads their rows
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Given:
    """What a user says of a checkpoint that does not say it itself.

    Args:
        config: config.json of the model.
        base: checkpoint of the adapters' base; None = the one that NeMo noted.
        layout: options of the classic layout (classic.Options), None where there is none.
        lora_rank, lora_alpha: of the adapters.
    """

    config: Path | None = None
    base: Path | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def reads(self, checkpoint: Path) -> list[Path]:
        """What a command reads that was given `checkpoint` and this."""
        return [checkpoint, *filter(None, [self.base, self.config])]

    @property
    def identity(self) -> list[Any]:
        """What the bytes of an output depend on; the files of `base` are among its sources."""
        config = content_of(self.config) if self.config else None
        return [config, sorted(self.layout.items()), self.lora_rank, self.lora_alpha]


NOTHING = Given()
Operation = Callable[[tuple[Bits, ...]], tuple[Bits, ...]]


@dataclass(frozen=True)
class Opened:
    """A checkpoint that has all its tensors, in the right shapes.

    Args:
        config: config.json of the Hugging Face form.
        model: the family's rules for this config.json.
        reader: reads its tensors: a Reader of huggingface, torch_dist or classic_reader, or lora.Merged.
        notes: what a person should know of how it was read.
        megatron: the reader has megatron-core's tensors, else Hugging Face's.
        others: the folder with the tokenizer and what else goes along; None = there is none.
        lent: it is the folder of the config.json that the user gave, in which anything may lie.
    """

    config: Config
    family: Family
    model: rules.Rules
    reader: Any
    notes: tuple[str, ...] = ()
    megatron: bool = False
    others: Path | None = None
    lent: bool = False

    def hf_parts(self, cell: rules.Cell) -> tuple[Bits, ...]:
        """The Hugging Face parts of a cell, in the dtypes of the family's rules."""
        if not self.megatron:
            return self._read(cell.hf, self.model.hf)
        return self._read(cell.megatron, {}, cell.op.to_hf, cell.hf, self.model.hf)

    def megatron_parts(self, cell: rules.Cell) -> tuple[Bits, ...]:
        """The parts of megatron-core's tensors of a cell, in the dtypes of the family's rules."""
        if self.megatron:
            return self._read(cell.megatron, self.model.megatron)
        return self._read(cell.hf, {}, cell.op.to_megatron, cell.megatron, self.model.megatron)

    @property
    def companions(self) -> Companions:
        """What goes along; DataError for a tokenizer_config.json that is not JSON."""
        found = companions_of(self.others)
        return found.of_a_model() if self.lent else found

    def units(self) -> list[list[rules.Cell]]:
        """The cells that are best worked on together: those of a matrix that is read as a whole."""
        whole = getattr(self.reader, "reads_whole", None)
        if whole is None:
            return [[cell] for cell in self.model.cells]
        groups: dict[Any, list[rules.Cell]] = {}
        for number, cell in enumerate(self.model.cells):
            ref = cell.megatron[0]
            groups.setdefault((ref.name, ref.index) if whole(ref) else number, []).append(cell)
        return list(groups.values())

    def source_bytes(self, cell: rules.Cell) -> int:
        """What is read for a cell."""
        if not self.megatron:
            return sum(self.reader.source_bytes(ref) for ref in cell.hf)
        infos = ((ref, self.model.megatron[ref.name]) for ref in cell.megatron)
        return sum(TensorInfo(ref.shape(info.shape), info.dtype).bytes for ref, info in infos)

    def _read(
        self,
        refs: tuple[Ref, ...],
        infos: Mapping[str, TensorInfo],
        op: Operation | None = None,
        made: tuple[Ref, ...] = (),
        wanted: Mapping[str, TensorInfo] | None = None,
    ) -> tuple[Bits, ...]:
        """The parts as they are, or what an operation makes of them, in the dtypes of `infos`, or of `wanted`."""
        parts = tuple(map(self.reader.read, refs))
        have = [self.reader.tensors[ref.name].dtype for ref in refs]
        if op is not None:
            parts = op(parts)
            refs, infos, have = made, wanted or {}, [have[0]] * len(made)
        return tuple(
            as_dtype(part, dtype, infos[ref.name].dtype) for ref, part, dtype in zip(refs, parts, have, strict=True)
        )


def open_model(folder: Path, devices: Sequence[str] = ("cpu",)) -> Opened:
    """Open a Hugging Face folder; DataError if a tensor is missing, unexpected or damaged."""
    where = folder / "config.json"
    config: Config
    family, config = understood(read_config(where), where)
    notes = families.notes(config)
    reader = huggingface.Reader(folder, huggingface.read_folder(folder, notes), config, devices)
    notes += surplus.settle(reader, config)
    if not reader.quantized:  # a model that was merged in BF16 often keeps the quantization_config of its base
        config = {key: value for key, value in config.items() if key not in QUANTIZATION}
    if is_tied(config) and HEAD in reader.tensors:
        if _same_head(reader):  # some checkpoints store the embedding twice
            del reader.tensors[HEAD]
        else:
            config = {**config, "tie_word_embeddings": False}
            notes.append(
                f"{HEAD} is not the embedding, although config.json says so: it is kept, as transformers 5 does"
            )
    if not has_mtp(config, reader.tensors):
        config = without_mtp(config)  # transformers drops the layer for multi-token prediction, but not its field
    check_stored(config, where, stored_bytes(reader.tensors))
    model = family.rules(config)
    surplus.unstack(reader, model.hf)
    rules.check_tensors(reader.tensors, model.hf, str(folder))
    return Opened(config, family, model, reader, tuple(notes), others=folder)


def _same_head(reader: huggingface.Reader) -> bool:
    """The output layer has the embedding's values; compared in blocks of rows up to the first difference."""
    info, embedding = reader.tensors[HEAD], reader.tensors.get(EMBEDDING)
    if embedding is None or info.shape != embedding.shape:
        return False
    block = max(1, BLOCK_BYTES * info.shape[0] // max(1, info.bytes))
    ends = range(0, info.shape[0], block)
    return all(same_values(reader, HEAD, EMBEDDING, (at, min(at + block, info.shape[0]))) for at in ends)


def same_values(reader: huggingface.Reader, one: str, other: str, rows: tuple[int, int]) -> bool:
    """Whether two tensors have the same values in some rows, whatever their dtypes."""
    parts = [as_dtype(reader.read(Ref(name, (), rows)), reader.tensors[name].dtype, "F32") for name in (one, other)]
    return np.array_equal(parts[0], parts[1])


def to_import(folder: Path, mtp: bool, devices: Sequence[str]) -> Opened:
    """A Hugging Face folder as it will be imported: without the layers for multi-token prediction unless `mtp`."""
    opened = open_model(folder, devices)
    if mtp and not mtp_layers(opened.config):
        raise DataError(f"{folder} has no layer for multi-token prediction; leave out --mtp")
    return opened if mtp else without_prediction(opened)


def open_any(folder: Path, mtp: bool, devices: Sequence[str], given: Given = NOTHING) -> Opened:
    """Open a model of any kind as `import` takes it: without layers for multi-token prediction unless `mtp`."""
    if not is_megatron(folder):
        if given != NOTHING:
            raise UsageError(
                f"{folder} is a Hugging Face model, which says itself what it is; leave out the other flags"
            )
        return to_import(folder, mtp, devices)
    found = open_megatron(folder, given)
    if mtp and not mtp_layers(found.config):
        raise DataError(f"{folder} has no layer for multi-token prediction; leave out --mtp")
    return found if mtp else without_prediction(found)


def cut_to(found: Opened, layers: int, dense: int | None) -> Opened:
    """A Hugging Face model cut to fewer layers, which get the numbers from 0 on.

    Args:
        layers: how many: the first ones.
        dense: how many of the dense ones, which come first in a mixture of experts; None = all of them.
    """
    have, there = found.config["num_hidden_layers"], found.config.get("first_k_dense_replace", 0)
    kept = list(range(there if dense is None else min(dense, there))) + list(range(there, have))
    if layers > len(kept):
        raise UsageError(f"--num-layers asks for {layers} layers without no-ops, but the model has {len(kept)}")
    kept = kept[:layers]
    if kept == list(range(have)):
        return found
    if found.megatron:
        raise UsageError("a model is cut to fewer layers only from its Hugging Face form; give that, or all layers")
    config = {**found.config, "num_hidden_layers": layers}
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = sum(number < there for number in kept)
    ahead = mtp_layers(config)
    numbers = dict(enumerate([*kept, *range(have, have + ahead)]))
    said = f"left out: layers {', '.join(map(str, sorted(set(range(have)) - set(kept))))}"
    reader, model = Renumbered(found.reader, numbers), found.family.rules(config)
    return replace(found, config=config, model=model, reader=reader, notes=(*found.notes, said))


class Renumbered:
    """Reads a Hugging Face model whose layers have other numbers.

    Args:
        numbers: number of a layer → its number in `reader`.
    """

    def __init__(self, reader: Any, numbers: Mapping[int, int]) -> None:
        self._reader, self._numbers = reader, numbers
        back = {old: new for new, old in numbers.items()}
        self.tensors = {
            renamed: info for name, info in reader.tensors.items() if (renamed := _renumbered(name, back)) is not None
        }

    def read(self, ref: Ref) -> Bits:
        return self._reader.read(self._of(ref))

    def source_bytes(self, ref: Ref) -> int:
        return self._reader.source_bytes(self._of(ref))

    def files(self) -> list[Path]:
        return self._reader.files()

    def _of(self, ref: Ref) -> Ref:
        name = _renumbered(ref.name, self._numbers)
        assert name is not None, f"{ref.name} is in no layer that is kept"
        return replace(ref, name=name)


def _renumbered(name: str, numbers: Mapping[int, int]) -> str | None:
    """A tensor's name with another number of its layer; None for a layer that is not there."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match is None:
        return name
    number = numbers.get(int(match[1]))
    return None if number is None else f"model.layers.{number}.{name[match.end() :]}"


def without_prediction(found: Opened) -> Opened:
    """The same model without its layers for multi-token prediction."""
    if not mtp_layers(found.config):
        return found
    config = {**without_mtp(found.config)}
    return replace(found, config=config, model=found.family.rules(config))


def is_megatron(checkpoint: Path) -> bool:
    """There is a checkpoint in one of Megatron's layouts."""
    if classic_files.is_classic(checkpoint):
        return True
    newest = torch_dist.newest(checkpoint)
    return any((folder / ".metadata").is_file() for folder in (newest / "weights", newest))


def open_megatron(checkpoint: Path, given: Given = NOTHING) -> Opened:
    """Open a checkpoint of NeMo, Megatron-Bridge, Megatron-LM or MindSpeed-LLM, without the optimizer's tensors.

    Low-rank adapters are merged into their base.
    """
    if classic_files.is_classic(checkpoint):
        return open_classic(checkpoint, given)
    if given.layout:
        raise UsageError(f"{checkpoint} is not in Megatron's classic layout; leave out the flags for it")
    return open_nemo(checkpoint, given)


def open_classic(checkpoint: Path, given: Given = NOTHING) -> Opened:
    """Open a checkpoint in Megatron's classic layout; low-rank adapters are merged into their base."""
    found = classic_files.find(checkpoint, given.layout, given.config)
    if found.ranks.only_adapters:
        return _merged(*classic_adapters(found, given))
    opened = _of_classic(found, given)
    return _merged(opened, _adapters(found, opened, given)) if found.ranks.has_adapters else opened


def _of_classic(found: classic_files.Found, given: Given) -> Opened:
    """The model in a checkpoint, without adapters."""
    reader = classic_reader.Reader(found.ranks, found.layout)
    opened = of_megatron(reader, found.said, str(reader.folder))
    return _with_others(
        replace(opened, notes=(*opened.notes, *found.notes)), [reader.folder.parent / classic_files.HF_NOTE], given
    )


def classic_adapters(found: classic_files.Found, given: Given) -> tuple[Opened, lora.Adapters]:
    """(their base, the adapters of a checkpoint that has nothing else)."""
    if given.base is None:
        raise UsageError(f"{found.ranks.folder} holds only adapters; give the checkpoint of their base with --base")
    layout = given.layout if classic_files.is_classic(given.base) else {}
    opened = open_megatron(given.base, Given(given.config, None, layout))
    return opened, _adapters(found, opened, given)


def _adapters(found: classic_files.Found, base: Opened, given: Given) -> lora.Adapters:
    reader = AdapterReader(found.ranks, found.layout, given.lora_rank, given.lora_alpha)
    return lora.Adapters(reader, base.model.megatron, base.reader.folder, reader.settings)


def _merged(opened: Opened, adapters: lora.Adapters) -> Opened:
    """A base with its adapters added."""
    return replace(opened, reader=lora.Merged(opened.reader, adapters), notes=(*opened.notes, *adapters.notes))


def open_nemo(checkpoint: Path, given: Given = NOTHING) -> Opened:
    """Open a checkpoint in torch_dist."""
    reader = torch_dist.Reader(checkpoint)
    if lora.has_adapters(reader):
        return _merged(*with_adapters(reader, given))
    if (weights := weights_of(reader)) and all("adapter." in key for key in weights):
        raise DataError(f"{checkpoint} holds only trained heads; use `slipway extract-heads`")
    if other := of_fsdp(weights):
        raise DataError(f"{checkpoint}: {other}")
    said = model_of(reader.folder, weights, given.config)
    context = context_folder(reader.folder)
    own = [context / nemo_context.HF_FILES, context / nemo_context.TOKENIZER, reader.folder / "tokenizer"]  # Bridge's
    left_out = len(reader.tensors) - len(weights)
    opened = of_megatron(reader, said, str(reader.folder))
    if left_out:
        opened = replace(opened, notes=(*opened.notes, f"left out: {left_out} tensors of the optimizer"))
    return _with_others(opened, own, given)


def of_fsdp(weights: Iterable[str]) -> str:
    """What to do with a checkpoint of transformers' own model, which torch.distributed has saved; "" for Megatron's."""
    name = next((key for key in weights if key.endswith(EMBEDDING)), "")
    return name and (
        f"its tensors have Hugging Face's names ({name}), as FSDP saves them; join them with `accelerate "
        "merge-weights` in a new folder, put config.json and the tokenizer beside them, and give that folder"
    )


def of_megatron(reader: Any, said: Model, where: str) -> Opened:
    """A checkpoint in one of Megatron's layouts, all tensors checked.

    Args:
        reader: of its tensors, under the keys of megatron-core.
        said: which model it is.
        where: the checkpoint, for messages.
    """
    known, notes = {**said.config}, said.notes
    known.pop(NAME, None)  # `import` noted it; what is exported need not be that any more
    check_stored(known, said.where, stored_bytes(reader.tensors))
    if not any(key.startswith("mtp.") for key in reader.tensors):
        known = {**without_mtp(known)}
    model = said.family.rules(known)
    reader.adopt(model.megatron)
    for key in VOCABULARY & reader.tensors.keys() & model.megatron.keys():
        if left := reader.cut_rows(key, known["vocab_size"]):
            notes.append(f"left out: {left} rows of {key}, which pad the vocabulary of {known['vocab_size']} tokens")
    rules.check_tensors(weights_of(reader), model.megatron, where)
    return Opened(known, said.family, model, reader, tuple(notes), megatron=True)


def weights_of(reader: Any) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint without what training saved beside them."""
    return {key: info for key, info in reader.tensors.items() if not torch_dist.is_state(key)}


def with_adapters(reader: torch_dist.Reader, given: Given) -> tuple[Opened, lora.Adapters]:
    """(their base, the adapters of a checkpoint); DataError where they do not fit each other."""
    folder = lora.base_of(reader, given.base)
    opened = open_nemo(folder, replace(given, base=None))
    adapters = lora.Adapters(reader, opened.model.megatron, folder)
    adapters.check_given(given.lora_rank, given.lora_alpha)
    return opened, adapters


def adapters_in(checkpoint: Path, given: Given) -> tuple[rules.Rules, lora.Adapters, str]:
    """(rules of their base, the adapters of a checkpoint, what the base is called); DataError where there are none."""
    if classic_files.is_classic(checkpoint):
        found = classic_files.find(checkpoint, given.layout, given.config)
        reader = AdapterReader(found.ranks, found.layout, given.lora_rank, given.lora_alpha)
        # The base need not be there: its shapes are those of the layout.
        adapters = lora.Adapters(reader, found.rules.megatron, reader.folder, reader.settings)
        return found.rules, adapters, str(found.said.config.get(NAME) or given.base or "base")
    stored = torch_dist.Reader(checkpoint)
    if not lora.has_adapters(stored):
        raise DataError(f"{checkpoint} has no low-rank adapters; leave out --adapter")
    opened, adapters = with_adapters(stored, given)
    name = source_of(context_folder(opened.reader.folder)) or str(lora.base_of(stored, given.base))
    return opened.model, adapters, name


def _with_others(opened: Opened, own: list[Path], given: Given) -> Opened:
    """With the folder of what goes along: the first one with a tokenizer, else the first one with anything.

    Args:
        own: where a checkpoint of this kind may have it. The folder of the user's config.json goes before these.
    """
    lent = given.config.parent if given.config else None
    places = [place for place in [*([lent] if lent else []), *own] if place.is_dir()]
    with_one = [place for place in places if any(file.name.startswith(TOKENIZER) for file in place.iterdir())]
    found = next(iter([*with_one, *(place for place in places if place != lent), *places]), None)
    return replace(opened, others=found, lent=found is not None and found == lent)


def context_folder(weights: Path) -> Path:
    """The context folder that belongs to a weights folder."""
    return weights.parent / "context"
