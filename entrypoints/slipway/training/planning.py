"""Planning what to read and to write of a checkpoint, in a time that does not grow with the square of its parts.

A tensor of experts has a part for each of them in each layer: 6,144 in Qwen3-30B-A3B. To find what to read, and to see
that no part is there twice, torch sweeps over the dimension that is the longest, which is seldom one that is divided;
so it compares all pairs, for minutes. Here it gets only those together that can have something in common.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import _internals
from torch.distributed.checkpoint import default_planner, planner_helpers, utils
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from slipway.training.patches import MEGATRON, TORCH, wrap

Box = tuple[Sequence[int], Sequence[int]]  # offsets and sizes
Pair = tuple[int, int]
Create = Callable[[str, TensorStorageMetadata, list[ChunkStorageMetadata]], list[ReadItem]]
Find = Callable[[ShardedTensor, MetadataIndex], Shard]
PLACES = "_slipway_places"  # attribute of a sharded tensor: offsets of a part → its place among the parts of this rank


def plan_quickly() -> None:
    """Let torch and Megatron plan so from now on."""
    from megatron.core.dist_checkpointing import optimizer as states
    from megatron.core.dist_checkpointing import serialization, state_dict_utils
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from megatron.core.dist_checkpointing.strategies import torch as strategy
    from megatron.core.optimizer import optimizer

    wrap(planner_helpers, "create_read_items_for_chunk_list", reading_neighbours, TORCH)
    wrap(_internals, "_find_nd_overlapping_shards", finding_neighbours, TORCH)
    wrap(default_planner, "_validate_global_plan", validating_neighbours, TORCH)
    wrap(utils, "_find_shard", finding_at_once, TORCH)
    wrap(utils._DistWrapper, "__init__", sending_nothing_to_itself, TORCH)
    wrap(strategy, "mcore_to_pyt_state_dict", packing_nothing_to_load, MEGATRON)
    for module in (serialization, state_dict_utils, fully_parallel):
        wrap(module, "determine_global_metadata", asking_nobody, MEGATRON)
    for module in (states, optimizer):
        wrap(module, "get_param_id_to_sharded_param_map", printing_nothing, MEGATRON)


def neighbours(boxes: Sequence[Box]) -> list[list[int]]:
    """The indices of boxes in groups. Two of different groups have nothing in common; two of a group can have.

    Along each dimension the boxes fall into stretches that do not touch. A group is in the same stretch of each.
    """
    along = [
        _stretches({(offsets[axis], offsets[axis] + sizes[axis]) for offsets, sizes in boxes})
        for axis in range(len(boxes[0][0]) if boxes else 0)
    ]
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (offsets, _) in enumerate(boxes):
        found[tuple(stretch[first] for stretch, first in zip(along, offsets, strict=True))].append(index)
    return [*found.values()]


def _stretches(extents: Iterable[Pair]) -> dict[int, int]:
    """For the beginning of each extent [first, end) the number of its stretch."""
    found, number, reached = {}, 0, 0
    for first, end in sorted(extents):
        number += first >= reached
        found[first], reached = number, max(reached, end)
    return found


def _box(part: ChunkStorageMetadata | ShardMetadata) -> Box:
    if isinstance(part, ShardMetadata):
        return part.shard_offsets, part.shard_sizes
    return part.offsets, part.sizes


def reading_neighbours(create: Create) -> Create:
    """The same as torch's `create_read_items_for_chunk_list`."""

    @functools.wraps(create)
    def created(
        fqn: str, checkpoint_md: TensorStorageMetadata, local_chunks: list[ChunkStorageMetadata]
    ) -> list[ReadItem]:
        saved, items = checkpoint_md.chunks, []
        for group in neighbours([_box(chunk) for chunk in (*saved, *local_chunks)]):
            stored = [index for index in group if index < len(saved)]
            wanted = [index - len(saved) for index in group if index >= len(saved)]
            some = dataclasses.replace(checkpoint_md, chunks=[saved[index] for index in stored])
            for item in create(fqn, some, [local_chunks[index] for index in wanted]):
                items.append(
                    dataclasses.replace(
                        item,
                        storage_index=_at(item.storage_index, stored),
                        dest_index=_at(item.dest_index, wanted),
                    )
                )
        return items

    return created


def _at(index: MetadataIndex, places: Sequence[int]) -> MetadataIndex:
    """The same part by its place among all; torch looks there before it searches."""
    return index if index.index is None else dataclasses.replace(index, index=places[index.index])


def finding_neighbours(
    find: Callable[[list[ShardMetadata], list[int]], Pair | None],
) -> Callable[[list[ShardMetadata], list[int]], Pair | None]:
    """The same as torch's `_find_nd_overlapping_shards`: the indices of two parts with something in common."""

    @functools.wraps(find)
    def found(shards: list[ShardMetadata], sharded_dims: list[int]) -> Pair | None:
        for group in neighbours([_box(shard) for shard in shards]):
            if pair := find([shards[index] for index in group], sharded_dims):
                return group[pair[0]], group[pair[1]]
        return None

    return found


def validating_neighbours(
    validate: Callable[[list[SavePlan], Metadata], bool],
) -> Callable[[list[SavePlan], Metadata], bool]:
    """The same as torch's `_validate_global_plan`: no part is beyond its tensor or there twice, and none is missing."""

    @functools.wraps(validate)
    def valid(global_plan: list[SavePlan], metadata: Metadata) -> bool:
        groups: dict[Any, TensorStorageMetadata] = {}
        full = True
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            for group in neighbours([_box(chunk) for chunk in entry.chunks]):
                chunks = [entry.chunks[index] for index in group]
                groups[name, len(groups)] = dataclasses.replace(entry, chunks=chunks)
            held, size = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
            if len(global_plan) > 1 and held != size:
                default_planner.logger.warning("%s has parts of %d elements in all, not %d", name, held, size)
                full = False
        # With one plan torch does not count the elements, which are not all in a group.
        return validate(global_plan[:1], dataclasses.replace(metadata, state_dict_metadata=groups)) and full

    return valid


def finding_at_once(find: Find) -> Find:
    """The same as torch's `_find_shard`, which looks at all parts of a tensor for each part that is written."""

    @functools.wraps(find)
    def found(tensor: ShardedTensor, index: MetadataIndex) -> Shard:
        places = tensor.__dict__.get(PLACES)
        if places is None:
            places = {tuple(shard.metadata.shard_offsets): at for at, shard in enumerate(tensor.local_shards())}
            setattr(tensor, PLACES, places)
        # torch looks there first, and everywhere else where it is another part.
        return find(tensor, dataclasses.replace(index, index=places.get(index.offset)))

    return found


def sending_nothing_to_itself(init: Callable[..., None]) -> Callable[..., None]:
    """The same as torch's `_DistWrapper.__init__`. A process that is alone pickles its plans to send them to itself."""

    @functools.wraps(init)
    def made(self: Any, group: dist.ProcessGroup | None, use_dist: bool, coordinator_rank: int) -> None:
        init(self, group, use_dist and dist.get_world_size(group) > 1, coordinator_rank)

    return made


def asking_nobody(determine: Callable[..., tuple[list[Any], list[Any]]]) -> Callable[..., tuple[list[Any], list[Any]]]:
    """The same as Megatron's `determine_global_metadata`: what each rank has. A process that is alone asks itself."""

    @functools.wraps(determine)
    def found(sharded_state_dict: Any) -> tuple[list[Any], list[Any]]:
        if dist.get_world_size() > 1:
            return determine(sharded_state_dict)
        here = [one.without_data() for one in nested_values(sharded_state_dict)]
        return here, [here]

    return found


def packing_nothing_to_load(convert: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same as Megatron's `mcore_to_pyt_state_dict`.

    It packs the state of each module into an archive, also where that is about to be loaded: each expert has two.
    """

    @functools.wraps(convert)
    def found(state_dict: dict[str, Any], is_loading: bool = False, *arguments: Any, **options: Any) -> dict[str, Any]:
        objects = {key for key, parts in state_dict.items() if is_loading and isinstance(parts[0], ShardedObject)}
        tensors = {key: parts for key, parts in state_dict.items() if key not in objects}
        made = convert(tensors, is_loading, *arguments, **options)
        return {key: io.BytesIO() if key in objects else made[key] for key in state_dict}

    return found


def printing_nothing(get: Callable[..., dict[int, Any]]) -> Callable[..., dict[int, Any]]:
    """The same as Megatron's `get_param_id_to_sharded_param_map`.

    It writes the values of each frozen gate and up projection into a text for a log that nobody keeps.
    """

    @functools.wraps(get)
    def found(model_sharded_state_dict: Any, optim_params_iter: Iterable[nn.Parameter]) -> dict[int, Any]:
        parameters = [*optim_params_iter]
        trained = {id(parameter) for parameter in parameters}
        sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        return get([one for one in nested_values(sharded) if id(one.data) in trained], parameters)

    return found
