"""What to read and to write of a checkpoint is planned as torch and Megatron plan it, without what takes them long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slipway.training import cpu
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import _internals
from torch.distributed.checkpoint import default_planner, planner_helpers, utils
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

cpu.enable()
from megatron.core.dist_checkpointing import optimizer, validation  # noqa: E402  Megatron needs it
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as strategy  # noqa: E402
from slipway.training import planning  # noqa: E402

Box = tuple[list[int], list[int]]


def before(function: Any) -> Any:
    """As it is before anything here is applied: torch's own."""
    return getattr(function, "__wrapped__", function)


CREATE = before(planner_helpers.create_read_items_for_chunk_list)
FIND = before(_internals._find_nd_overlapping_shards)
VALIDATE = before(default_planner._validate_global_plan)
LOOK = before(utils._find_shard)
INIT = before(utils._DistWrapper.__init__)
CONVERT = before(strategy.mcore_to_pyt_state_dict)
DETERMINE = before(validation.determine_global_metadata)
GET = before(optimizer.get_param_id_to_sharded_param_map)


def grid(shape: Sequence[int], parts: Sequence[int]) -> list[Box]:
    """A tensor cut into so many parts along each dimension."""
    sizes = [extent // count for extent, count in zip(shape, parts, strict=True)]
    corners = itertools.product(*(range(0, count * size, size) for count, size in zip(parts, sizes, strict=True)))
    return [([*corner], sizes) for corner in corners]


def cut(shape: Sequence[int], dice: random.Random) -> list[Box]:
    """A tensor cut in two, at any place along any dimension, again and again."""
    found: list[Box] = [([0] * len(shape), [*shape])]
    for _ in range(dice.randrange(12)):
        offsets, sizes = found.pop(dice.randrange(len(found)))
        axis = dice.randrange(len(shape))
        at = dice.randint(0, sizes[axis])
        first, second = [*sizes], [*sizes]
        first[axis], second[axis] = at, sizes[axis] - at
        found += [(offsets, first), ([o + at * (a == axis) for a, o in enumerate(offsets)], second)]
    dice.shuffle(found)
    return found


def stored(shape: Sequence[int], boxes: Sequence[Box]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(), torch.Size(shape), [chunk(*box) for box in boxes])


def chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def shard(offsets: Sequence[int], sizes: Sequence[int]) -> ShardMetadata:
    return ShardMetadata([*offsets], [*sizes], placement="rank:0/cpu")


def in_order(items: Sequence[Any]) -> list[Any]:
    """With the places that torch looks at first, which are no part of an index's equality."""
    every = [(one, one.dest_index.index, one.storage_index.index) for one in items]
    return sorted(every, key=lambda one: (one[1], one[2]))


@pytest.mark.parametrize("seed", range(60))
def test_what_to_read_is_what_torch_would_read(seed):
    dice = random.Random(seed)
    shape = [dice.choice([1, 4, 6, 12, 24]) for _ in range(dice.randint(1, 4))]
    regular = [dice.choice([n for n in (1, 2, 3, 6) if extent % n == 0]) for extent in shape]
    saved, wanted = (dice.choice([cut(shape, dice), grid(shape, regular), grid(shape, [1] * len(shape))]) for _ in "ab")
    wanted = wanted[: dice.randint(0, len(wanted))]
    asked = ("name", stored(shape, saved), [chunk(*box) for box in wanted])
    ours = planning.reading_neighbours(CREATE)(*asked)
    assert in_order(ours) == in_order(CREATE(*asked))


def test_a_number_is_read():
    asked = ("name", stored([], [([], [])]), [chunk([], [])])
    assert planning.reading_neighbours(CREATE)(*asked) == CREATE(*asked) != []
    assert planning.reading_neighbours(CREATE)("name", stored([4], []), [chunk([0], [4])]) == []


@pytest.mark.parametrize("seed", range(60))
def test_parts_that_are_there_twice_are_found(seed):
    dice = random.Random(seed)
    shape = [dice.choice([4, 6, 12]) for _ in range(dice.randint(2, 3))]
    boxes = [shard(*box) for box in dice.choice([cut(shape, dice), grid(shape, [2] * len(shape))])]
    if dice.random() < 0.6:
        sizes = [dice.randint(1, extent) for extent in shape]
        extra = shard([dice.randint(0, extent - size) for extent, size in zip(shape, sizes, strict=True)], sizes)
        boxes.insert(dice.randrange(len(boxes) + 1), extra)
    dims = [*range(len(shape))]
    ours, torchs = planning.finding_neighbours(FIND)(boxes, dims), FIND(boxes, dims)
    assert (ours is None) == (torchs is None)
    if ours:
        one, other = (boxes[index] for index in ours)
        assert one is not other and _internals._check_shard_metadata_pair_overlap(one, other)


PLANS = {
    "whole": ([8, 6], grid([8, 6], [4, 3])),
    "twice": ([8, 6], [*grid([8, 6], [4, 3]), ([2, 2], [2, 2])]),
    "partly twice": ([8, 6], [*grid([8, 6], [4, 3]), ([1, 1], [2, 2])]),
    "missing": ([8, 6], grid([8, 6], [4, 3])[1:]),
    "beyond": ([8, 6], [*grid([8, 6], [4, 3])[:-1], ([6, 4], [2, 4])]),
    "one part": ([8, 6], [([0, 0], [8, 6])]),
    "none": ([8, 6], []),
    "a number": ([], [([], [])]),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_good_where_torch_says_so(plan, ranks):
    entries: dict[str, Any] = {"an object": BytesStorageMetadata(), "good": stored([4], grid([4], [2]))}
    metadata = Metadata({**entries, "one": stored(*PLANS[plan])})
    plans = [SavePlan([])] * ranks
    assert planning.validating_neighbours(VALIDATE)(plans, metadata) == VALIDATE(plans, metadata)


def test_the_plans_are_of_every_kind():
    found = {plan: VALIDATE([SavePlan([])] * 2, Metadata({"one": stored(*PLANS[plan])})) for plan in PLANS}
    assert {plan for plan, good in found.items() if good} == {"whole", "one part", "a number"}


def test_experts_are_compared_with_their_like_alone(monkeypatch):
    shape, boxes = [12, 16, 64, 256], grid([12, 16, 64, 256], [12, 16, 2, 1])
    compared = []

    def counting(check: Any) -> Any:
        return lambda *pair: compared.append(pair) or check(*pair)

    for module, name in (
        (planner_helpers, "_check_shard_metadata_pair_overlap"),
        (_internals, "_check_shard_metadata_pair_overlap"),
        (default_planner, "_check_box_overlap"),
    ):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    metadata = stored(shape, boxes)
    calls = {
        "read": (planning.reading_neighbours, CREATE, ("name", metadata, metadata.chunks)),
        "find": (planning.finding_neighbours, FIND, ([shard(*box) for box in boxes], [0, 1, 2])),
        "validate": (planning.validating_neighbours, VALIDATE, ([SavePlan([])], Metadata({"name": metadata}))),
    }
    for name, (wrapped, torchs, given) in calls.items():
        compared.clear()
        torchs(*given)
        pairs = len(boxes) ** 2 // (1 if name == "read" else 2)
        assert len(compared) > 0.4 * pairs, f"upstream, {name}"
        compared.clear()
        wrapped(torchs)(*given)
        assert len(compared) <= len(boxes), name


def test_a_part_to_write_is_found_where_it_is(monkeypatch):
    boxes = grid([6, 8], [3, 4])
    looked = []

    class Part:
        def __init__(self, offsets: list[int]) -> None:
            self.offsets = offsets

        @property
        def metadata(self) -> Any:
            looked.append(self)
            return SimpleNamespace(shard_offsets=self.offsets)

    class Tensor:
        def __init__(self) -> None:
            self.parts = [Part(offsets) for offsets, _ in boxes]

        def local_shards(self) -> list[Part]:
            return self.parts

    tensor, find = Tensor(), planning.finding_at_once(LOOK)
    indices = [MetadataIndex("name", torch.Size(offsets)) for offsets, _ in boxes]
    assert [find(tensor, index) for index in indices] == tensor.parts == [LOOK(tensor, index) for index in indices]
    looked.clear()
    assert find(tensor, indices[-1]) is tensor.parts[-1] and len(looked) == 1
    looked.clear()
    assert LOOK(tensor, indices[-1]) is tensor.parts[-1] and len(looked) == len(boxes), "upstream"
    for gone in (MetadataIndex("name", torch.Size([1, 1])), MetadataIndex("name")):
        with pytest.raises(ValueError, match=r"Could not find shard|no offset was provided"):
            find(tensor, gone)


def test_a_process_that_is_alone_sends_nothing(monkeypatch):
    for ranks, used in ((1, False), (2, True)):
        monkeypatch.setattr(planning.dist, "get_world_size", lambda group, ranks=ranks: ranks)
        monkeypatch.setattr(utils.dist, "get_rank", lambda group: 0)
        wrapper = object.__new__(utils._DistWrapper)
        planning.sending_nothing_to_itself(INIT)(wrapper, None, True, 0)
        assert (wrapper.use_dist, wrapper.is_coordinator, wrapper.rank) == (used, True, 0)
        planning.sending_nothing_to_itself(INIT)(wrapper, None, False, 0)
        assert not wrapper.use_dist


@pytest.mark.parametrize(("ranks", "asked"), [(1, False), (2, True)])
def test_a_process_that_is_alone_knows_what_all_have(ranks, asked, monkeypatch):
    gathered = []

    def gather(found: list[Any], mine: Any) -> None:
        gathered.append(mine)
        found[:] = [mine] * ranks

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    weights = {str(number): ShardedTensor.from_rank_offsets(str(number), torch.ones(2)) for number in range(3)}
    theirs = DETERMINE({"model": weights})
    gathered.clear()
    ours = planning.asking_nobody(DETERMINE)({"model": weights})
    assert ours == theirs and bool(gathered) == asked
    assert all(one.data is None for one in ours[0]) and weights["0"].data is not None


def test_frozen_weights_are_not_printed():
    printed = []

    class Weight(torch.nn.Parameter):
        def __repr__(self, *_: Any, **__: Any) -> str:
            printed.append(self)
            return "a weight"

    weights = {name: Weight(torch.zeros(2)) for name in ("frozen", "trained", "also trained")}
    state = {"model": {name: ShardedTensorFactory(name, one, list, list) for name, one in weights.items()}}
    trained = [weights["also trained"], weights["trained"]]
    megatrons = GET(state, iter(trained))
    assert printed == [weights["frozen"]], "upstream"
    printed.clear()
    found = planning.printing_nothing(GET)(state, iter(trained))
    keys = [{index: one.key for index, one in some.items()} for some in (found, megatrons)]
    assert keys == [{0: "also trained", 1: "trained"}] * 2
    assert printed == []


def test_the_state_of_a_module_is_packed_to_be_saved_and_not_to_be_loaded(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    save, packed = torch.save, []
    monkeypatch.setattr(torch, "save", lambda content, file: packed.append(content) or save(content, file))
    convert = planning.packing_nothing_to_load(CONVERT)
    states = {f"{number}._extra_state": [ShardedObject(str(number), None, (1,), (0,))] for number in range(3)}
    assert [*CONVERT(states, True)] == [*convert(states, True)] == [*states] and len(packed) == 3, "upstream packs them"
    assert {type(one) for one in convert(states, True).values()} == {type(one) for one in CONVERT(states).values()}
    packed.clear()
    saved, theirs = convert(states), CONVERT(states)
    assert [one.getvalue() for one in saved.values()] == [one.getvalue() for one in theirs.values()]
    assert packed == [[None]] * 6
