"""Megatron's classic layout: `iter_0000001/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one file for each rank.

This module says where each tensor of megatron-core lies in these files and how it is cut. The families know nothing of
it, and one description serves both directions. `Layout` makes it from the options, which have MindSpeed's names.

Two styles of names: MindSpeed-LLM's for DeepSeek, with q and kv of latent attention joined in one matrix and the norms
in modules of their own; Megatron-LM's with Transformer Engine for the other families.

Facts: ../shared/facts/classic_layout.md; MindSpeed-LLM's converters (convert_ckpt_deepseek3.py) and Megatron-LM's
checkpointing.py. Where MindSpeed loses layers or experts in silence, there is an error here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipway.errors import UsageError
from slipway.families.checks import Config
from slipway.options import option
from slipway.tensors.refs import Ref, TensorInfo

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = "iter_0000001"
FILE = "model_optim_rng.pt"
DUALPIPEV = "dualpipev"
PACKED = ("bitsandbytes", "npu")  # the two forms of NF4 that go by the same names


@dataclass(frozen=True)
class Options:
    """How the classic layout is cut; MindSpeed-LLM has the same names, with `--target-` before the first three."""

    tensor_parallel_size: int = option(1, "ranks that share each matrix", low=1, high=1024)
    pipeline_parallel_size: int = option(1, "stages of layers", low=1, high=1024)
    expert_parallel_size: int = option(1, "groups of experts", low=1, high=1024)
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that share each expert: 1 or the tensor parallel size", low=1, otherwise="the tensor parallel size"
    )
    num_layers: int | None = option(
        None, "layers with no-ops; fewer than the model has are its first ones", low=1, otherwise="all of the model's"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "layers of one virtual stage", low=1)
    num_layer_list: str | None = option(None, "layers of each stage, such as 16,15,15,15")
    noop_layers: str | None = option(None, "numbers of the layers that do nothing, such as 47,62,63")
    schedules_method: str | None = option(None, "order of the stages of a schedule", choices=(DUALPIPEV,))
    first_k_dense_replace: int | None = option(
        None, "dense layers of a model that is cut to fewer of them", low=0, otherwise="the model's"
    )
    mtp_num_layers: int = option(0, "layers for multi-token prediction to keep", low=0, high=64)
    moe_grouped_gemm: bool = option(False, "the experts of a rank in one tensor")
    moe_tp_extend_ep: bool = option(False, "tensor parallel ranks hold whole experts, as more groups of them")
    mla_mm_split: bool = option(False, "split the up projections of latent attention")
    qlora_nf4: str | None = option(
        None, "pack linear layers in NF4, in the form of one of these", choices=PACKED, alone=PACKED[0]
    )

    def described(self) -> dict[str, Any]:
        """The options that are not the default, for a note."""
        plain = Options()
        return {name: value for name, value in vars(self).items() if value != getattr(plain, name)}


# ---------------------------------------------------------------------------- where layers go


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a layer is: its stage, its chunk (virtual stage) there, and its number in the chunk."""

    stage: int
    chunk: int
    local: int


@dataclass(frozen=True)
class Stages:
    """Every layer's place.

    Args:
        layers: of each real layer, in order.
        chunks: in a stage.
        last: (stage, chunk) with the final norm, the output layer and multi-token prediction.
    """

    layers: tuple[Slot, ...]
    chunks: int
    last: tuple[int, int]

    def chunk_name(self, chunk: int) -> str:
        """Megatron's key of a chunk."""
        return "model" if self.chunks == 1 else f"model{chunk}"


def stages_of(options: Options, layers: int) -> Stages:
    """Where each of the model's layers goes; UsageError for sizes that do not divide."""
    idle = _numbers(options.noop_layers, "--noop-layers")
    slots, ranks = options.num_layers or layers + len(idle), options.pipeline_parallel_size
    if len(set(idle)) != len(idle) or any(number >= slots for number in idle):
        raise UsageError(f"--noop-layers is {options.noop_layers}; give different numbers below {slots}")
    if slots - len(idle) != layers:
        raise UsageError(
            f"--num-layers {slots} with {len(idle)} no-op layers leaves {slots - len(idle)} layers, but the model has "
            f"{layers}; --num-layers counts the no-ops too"
        )
    places, chunks, last = _slots(options, slots, ranks)
    return Stages(tuple(place for number, place in enumerate(places) if number not in set(idle)), chunks, last)


def _slots(options: Options, slots: int, ranks: int) -> tuple[list[Slot], int, tuple[int, int]]:
    """(place of each slot, no-ops included; chunks of a stage; the last stage's last chunk)."""
    virtual = options.num_layers_per_virtual_pipeline_stage
    if options.num_layer_list is not None:
        return _listed(options, slots, ranks), 1, (ranks - 1, 0)
    if options.schedules_method == DUALPIPEV:
        if virtual:
            raise UsageError("--schedules-method dualpipev has virtual stages of its own; leave out the other option")
        size = _divided(slots, 2 * ranks, "layers", "twice the pipeline parallel size, which dualpipev needs")
        numbers = [(number // size, number % size) for number in range(slots)]
        # The first half goes down the stages, the second half comes back.
        places = [Slot(c, 0, at) if c < ranks else Slot(2 * ranks - 1 - c, 1, at) for c, at in numbers]
        return places, 2, (0, 1)
    if virtual:
        size = _divided(slots, ranks, "layers", "the pipeline parallel size")
        chunks = _divided(size, virtual, "layers of a stage", "--num-layers-per-virtual-pipeline-stage")
        places = [Slot(n // virtual % ranks, n // virtual // ranks, n % virtual) for n in range(slots)]
        return places, chunks, (ranks - 1, chunks - 1)
    size = _divided(slots, ranks, "layers", "the pipeline parallel size; --num-layer-list and --noop-layers help")
    return [Slot(number // size, 0, number % size) for number in range(slots)], 1, (ranks - 1, 0)


def _listed(options: Options, slots: int, ranks: int) -> list[Slot]:
    counts = _numbers(options.num_layer_list, "--num-layer-list")
    if options.num_layers_per_virtual_pipeline_stage or options.noop_layers or options.schedules_method:
        raise UsageError("--num-layer-list says where each layer goes; leave out virtual stages, no-ops and schedules")
    if len(counts) != ranks or sum(counts) != slots or 0 in counts:
        raise UsageError(
            f"--num-layer-list is {options.num_layer_list}; give {ranks} numbers, one a stage, with the sum {slots}"
        )
    return [Slot(stage, 0, at) for stage, count in enumerate(counts) for at in range(count)]


def _numbers(text: str | None, flag: str) -> list[int]:
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() and len(word) < 9 for word in words):
        raise UsageError(f"{flag} is {text!r}; give numbers with commas between them")
    return [int(word) for word in words]


def _divided(whole: int, parts: int, what: str, by: str) -> int:
    if whole % parts:
        raise UsageError(f"{whole} {what} cannot be divided by {parts}, {by}")
    return whole // parts


# ---------------------------------------------------------------------------- which ranks there are


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """One file: its tensor, pipeline and expert rank."""

    tensor: int
    stage: int
    expert: int


def ranks_of(options: Options, *, experts: bool) -> list[Rank]:
    """Every rank that has a file. Whole experts in fewer groups than tensor ranks leave some combinations without."""
    tensor, expert = options.tensor_parallel_size, options.expert_parallel_size
    found = [
        Rank(t, p, e)
        for t in range(tensor)
        for p in range(options.pipeline_parallel_size)
        for e in range(expert)
    ]  # fmt: skip
    if not experts or not _whole_experts(options) or options.moe_tp_extend_ep or tensor == 1 or expert == 1:
        return found
    if expert % tensor and tensor % expert:
        raise UsageError(
            f"--expert-parallel-size {expert} and --tensor-parallel-size {tensor}: one must be a multiple of the other "
            "with --expert-tensor-parallel-size 1"
        )
    return [rank for rank in found if (rank.expert - rank.tensor) % min(tensor, expert) == 0]


def _whole_experts(options: Options) -> bool:
    return options.expert_tensor_parallel_size == 1 and options.tensor_parallel_size > 1


def folder_of(rank: Rank, options: Options) -> str:
    """The name of a rank's folder, by Megatron's rule: sizes of 1 are left out."""
    name = f"mp_rank_{rank.tensor:02d}"
    if options.pipeline_parallel_size > 1:
        name += f"_{rank.stage:03d}"
    return name + (f"_{rank.expert:03d}" if options.expert_parallel_size > 1 else "")


# ---------------------------------------------------------------------------- how a tensor is cut


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a matrix (or vector) of megatron-core's that a rank has.

    Args:
        rows: which rows, in the order in which the rank has them: [start, stop).
        columns: which columns; None = all.
        transposed: the rank has the part transposed, as GroupedMLP does.
    """

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None
    transposed: bool = False

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, before it is transposed."""
        rows = sum(stop - start for start, stop in self.rows)
        if len(whole) == 1:
            return (rows,)
        return (rows, self.columns[1] - self.columns[0] if self.columns else whole[1])


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank has a part: in tensor `name` of `chunk`, from element `at` on."""

    rank: Rank
    chunk: str
    name: str
    at: int
    cut: Cut


@dataclass
class Held:
    """A tensor of a rank: its shape, and whether NF4 packs it."""

    info: TensorInfo
    packed: bool = False


Matrix = tuple[str, tuple[int, ...]]  # megatron-core's key, and the place in its stacks
Files = dict[Rank, dict[str, dict[str, Held]]]  # rank → chunk → name → tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    """A matrix of megatron-core's, and the stage and chunk that it is sent to."""

    matrix: Matrix
    shape: tuple[int, ...]
    stage: int
    chunk: str


@dataclass
class Layout:
    """Every rank's tensors, and where each part of megatron-core's tensors lies in them.

    Args:
        config: config.json of the model.
        tensors: megatron-core's key → TensorInfo, as the family's rules have them.
        options: how it is cut.
        mindspeed: MindSpeed-LLM's names, else Megatron-LM's.
        in_one: the experts of a rank are in one tensor, as GroupedMLP has them and MindSpeed-LLM; Transformer Engine's
            grouped layers have one for each expert.
    """

    config: Config
    tensors: Mapping[str, TensorInfo]
    options: Options
    mindspeed: bool
    in_one: bool = True
    files: Files = field(default_factory=dict)
    places: dict[Matrix, list[Placement]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        experts = any(".experts." in key for key in self.tensors)
        self.stages = stages_of(self.options, self.config["num_hidden_layers"])
        self.ranks = ranks_of(self.options, experts=experts)
        self._check()
        chunks = [self.stages.chunk_name(number) for number in range(self.stages.chunks)]
        self.files = {rank: {chunk: {} for chunk in chunks} for rank in self.ranks}
        self._by_stage = {
            stage: [rank for rank in self.ranks if rank.stage == stage]
            for stage in range(self.options.pipeline_parallel_size)
        }
        for key, index in _matrices(self.tensors):
            self._place(key, index)

    def _check(self) -> None:
        tensor, options, c = self.options.tensor_parallel_size, self.options, self.config
        if options.expert_tensor_parallel_size not in (None, 1, tensor):
            raise UsageError(f"--expert-tensor-parallel-size must be 1 or the tensor parallel size, {tensor}")
        _divided(c["num_attention_heads"], tensor, "attention heads", "the tensor parallel size")
        if "kv_lora_rank" not in c:
            _divided(c["num_key_value_heads"], tensor, "groups of keys and values", "the tensor parallel size")
        elif options.mla_mm_split and not self.mindspeed:
            raise UsageError("--mla-mm-split needs a model whose queries are compressed (q_lora_rank)")
        if options.mla_mm_split and "kv_lora_rank" not in c:
            raise UsageError("--mla-mm-split is for latent attention; this model has none")
        if options.mtp_num_layers != sum(key.endswith("eh_proj.weight") for key in self.tensors):
            raise UsageError(f"--mtp-num-layers {options.mtp_num_layers}: the model has another number of such layers")
        if (options.moe_tp_extend_ep or options.expert_parallel_size > 1) and self._experts() == 1:
            raise UsageError("this model has no experts; leave out the options for them")
        _divided(self._experts(), self._groups(), "experts", "the number of their groups")

    def _experts(self) -> int:
        """Experts of a layer; 1 where there are none."""
        return max((info.shape[-3] for key, info in self.tensors.items() if key.endswith("experts.linear_fc2.weight")
                    and ".experts.experts." in key), default=1)  # fmt: skip

    def _groups(self) -> int:
        """Into how many groups the experts are divided."""
        groups = self.options.expert_parallel_size
        return groups * self.options.tensor_parallel_size if self.options.moe_tp_extend_ep else groups

    # ------------------------------------------------------------------------ where a matrix goes

    def _place(self, key: str, index: tuple[int, ...]) -> None:
        """Add a matrix of megatron-core's: its parts to the files of the ranks that have one."""
        shape = self.tensors[key].shape[len(index) :]

        def sent(stage: int, chunk: int) -> _Sent:
            return _Sent((key, index), shape, stage, self.stages.chunk_name(chunk))

        if match := re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key):
            number, rest = (int(match[1]), index) if match[1] else (index[0], index[1:])
            slot = self.stages.layers[number]
            self._module(f"decoder.layers.{slot.local}.", match[2], rest, sent(slot.stage, slot.chunk))
            return
        last = sent(*self.stages.last)
        if match := re.fullmatch(r"mtp\.layers\.(\d+)\.(.+)", key):
            self._prediction(int(match[1]), match[2], last)
        elif key == "embedding.word_embeddings.weight":
            first = sent(0, 0)
            self._add(key, first)
            if self.options.mtp_num_layers and self.options.pipeline_parallel_size > 1 and first != last:
                self._add(key, last)
        elif key == "decoder.final_layernorm.weight" and self.options.mtp_num_layers and self.mindspeed:
            self._add("final_layernorm.weight", last)
        else:
            self._add(key, last)

    def _prediction(self, number: int, rest: str, sent: _Sent) -> None:
        prefix = f"mtp.layers.{number}."
        if rest.startswith("transformer_layer."):
            rest = rest.removeprefix("transformer_layer.")
            self._module(f"{prefix}transformer_layer.", rest, sent.matrix[1], sent)
        elif rest == "final_layernorm.weight" and self.mindspeed:
            self._add(f"mtp.final_layernorms.{number}.weight", sent)
        else:
            self._add(prefix + rest, sent)

    def _module(self, prefix: str, rest: str, index: tuple[int, ...], sent: _Sent) -> None:
        """A tensor of a layer; `rest` is its name there, `index` its place in a stack of experts."""
        if ".experts.experts." in rest:
            self._expert(prefix, rest, index[0], sent)
            return
        if self.mindspeed:
            rest = MINDSPEED.get(rest, rest)
            if rest in JOINED:
                self._join(prefix, rest, sent)
                return
            if self.options.mla_mm_split and rest in SPLIT:
                self._split(prefix, rest, sent)
                return
        self._add(prefix + rest, sent)

    def _add(self, name: str, sent: _Sent) -> None:
        """A tensor that each rank has a part of, or a copy of."""
        for rank in self._by_stage[sent.stage]:
            cut = self._cut(name, sent.shape, rank.tensor, self.options.tensor_parallel_size)
            self._hold(rank, name, cut.shape(sent.shape), sent, cut)

    def _join(self, prefix: str, rest: str, sent: _Sent) -> None:
        """The down projections of q and of k with v, one above the other; each rank has all of it."""
        q, (rows, columns) = self.config["q_lora_rank"], sent.shape
        whole = q + self.config["kv_lora_rank"] + self.config["qk_rope_head_dim"]
        at = 0 if rest == JOINED[0] else q
        for rank in self._by_stage[sent.stage]:
            name = f"{prefix}self_attention.linear_qkv.weight"
            self._hold(rank, name, (whole, columns), sent, Cut(((0, rows),)), at * columns)

    def _split(self, prefix: str, rest: str, sent: _Sent) -> None:
        """The two kinds of rows of each head in matrices of their own; a rank has whole heads."""
        c = self.config
        heads = c["num_attention_heads"] // self.options.tensor_parallel_size
        first, second = (c["qk_nope_head_dim"], c["qk_rope_head_dim" if rest == SPLIT[0] else "v_head_dim"])
        size = first + second
        for rank in self._by_stage[sent.stage]:
            mine = range(rank.tensor * heads, (rank.tensor + 1) * heads)
            for name, start, stop in zip(SPLIT_NAMES[rest], (0, first), (first, size), strict=True):
                cut = Cut(tuple((head * size + start, head * size + stop) for head in mine))
                self._hold(rank, f"{prefix}self_attention.{name}.weight", cut.shape(sent.shape), sent, cut)

    def _expert(self, prefix: str, rest: str, number: int, sent: _Sent) -> None:
        """A tensor of one expert."""
        options = self.options
        local = self._experts() // self._groups()
        before, _, part = rest.partition("experts.experts.")
        for rank in self._by_stage[sent.stage]:
            group = rank.expert
            if options.moe_tp_extend_ep:
                group = rank.expert * options.tensor_parallel_size + rank.tensor
            if number // local != group:
                continue
            whole = options.moe_tp_extend_ep or _whole_experts(options)
            cut = self._cut(part, sent.shape, *((0, 1) if whole else (rank.tensor, options.tensor_parallel_size)))
            at, own = number % local, cut.shape(sent.shape)
            if not options.moe_grouped_gemm:
                self._hold(rank, f"{prefix}{before}experts.local_experts.{at}.{part}", own, sent, cut)
            elif self.in_one:
                # Memory [experts, in, out]; the declared shape is [in, experts · out] or [experts · in, out].
                name = f"{prefix}{before}experts.{'weight1' if part == 'linear_fc1.weight' else 'weight2'}"
                declared = (own[1], local * own[0]) if part == "linear_fc1.weight" else (local * own[1], own[0])
                turned = Cut(cut.rows, cut.columns, transposed=True)
                self._hold(rank, name, declared, sent, turned, at * math.prod(own))
            else:  # Transformer Engine's grouped linear layers have a weight of their own for each expert
                self._hold(rank, f"{prefix}{before}experts.{part}{at}", own, sent, cut)

    def _cut(self, name: str, shape: tuple[int, ...], rank: int, ranks: int) -> Cut:
        """What rank number `rank` of `ranks` has of a tensor."""
        rows = shape[0] if shape else 1
        if ranks == 1 or (how := _how(name, len(shape))) is None:
            return Cut(((0, rows),))
        if how == "columns":
            size = _divided(shape[1], ranks, f"columns of {name}", "the tensor parallel size")
            return Cut(((0, rows),), (rank * size, (rank + 1) * size))
        halves = 2 if how == "gate and up" else 1
        size = _divided(rows // halves, ranks, f"rows of {name}", "the tensor parallel size")
        starts = (half * rows // halves + rank * size for half in range(halves))
        return Cut(tuple((start, start + size) for start in starts))

    def _hold(self, rank: Rank, name: str, shape: tuple[int, ...], sent: _Sent, cut: Cut, at: int = 0) -> None:
        """Give a rank a part of a matrix: in its tensor `name` of this shape, from element `at` on."""
        held = self.files[rank][sent.chunk]
        if name not in held:
            info = TensorInfo(shape, self.tensors[sent.matrix[0]].dtype)
            held[name] = Held(info, bool(self.options.qlora_nf4) and _is_packed(name))
        self.places.setdefault(sent.matrix, []).append(Placement(rank, sent.chunk, name, at, cut))


MINDSPEED = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
JOINED = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")
SPLIT = ("self_attention.linear_q_up_proj.weight", "self_attention.linear_kv_up_proj.weight")
SPLIT_NAMES = {SPLIT[0]: ("linear_qk_nope", "linear_qk_rope"), SPLIT[1]: ("linear_kv_nope", "linear_v")}
# Names that MindSpeed-LLM had before 2025-07-23 and 2025-04-16 → today's.
OLD_NAMES = (
    (re.compile(r"self_attention\.linear_qb\."), "self_attention.linear_q_up_proj."),
    (re.compile(r"self_attention\.linear_kvb\."), "self_attention.linear_kv_up_proj."),
    (re.compile(r"self_attention\.k_layernorm\."), "self_attention.kv_layernorm."),
    (re.compile(r"^mtp_layers\."), "mtp.layers."),
)
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
GATE_AND_UP = ("linear_fc1.weight", "linear_fc1.bias")
ROWS = (
    "word_embeddings.weight", "output_layer.weight", "self_attention.linear_qkv.weight", "linear_qkv.bias",
    "linear_q_up_proj.weight", "linear_kv_up_proj.weight", "linear_q_proj.weight", "eh_proj.weight", "softmax_offset",
)  # fmt: skip
PACKED_NAMES = re.compile(
    r"output_layer\.weight|.*\.(linear_\w+\.weight|weight[12]|eh_proj\.weight|linear_fc[12]\.weight\d+)"
)


def _how(name: str, dimensions: int) -> str | None:
    """How tensor parallel ranks share a tensor; None = each has all of it."""
    if name.endswith(COLUMNS) and dimensions > 1:
        return "columns"
    if name.endswith(GATE_AND_UP):
        return "gate and up"
    return "rows" if name.endswith(ROWS) else None


def _is_packed(name: str) -> bool:
    """NF4 packs this tensor: linear layers, but not the embedding, the norms and the router."""
    return bool(PACKED_NAMES.fullmatch(name)) and not name.endswith("layer_norm_weight")


def _matrices(tensors: Mapping[str, TensorInfo]) -> Iterator[Matrix]:
    """(key, place in the stacks) of every matrix or vector that megatron-core stacks under these keys."""
    for key, info in tensors.items():
        stacks = _stacks(key)
        for at in _places(info.shape[:stacks]):
            yield key, at


def _stacks(key: str) -> int:
    """The number of a key's leading dimensions that count layers and experts."""
    layers = bool(re.match(r"decoder\.layers\.(?!\d)", key))
    return layers + (".experts.experts." in key)


def _places(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in _places(sizes[1:]):
            yield (first, *rest)


def matrix_of(ref: Ref) -> Matrix:
    """The matrix that a part belongs to."""
    return ref.name, ref.index


def in_mindspeed(config: Config) -> bool:
    """MindSpeed-LLM's names are for latent attention with compressed queries; the other models have Megatron-LM's."""
    return bool(config.get("kv_lora_rank")) and config.get("q_lora_rank") is not None
