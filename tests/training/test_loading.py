"""Checkpoints that torch writes are read into a model by several threads as torch reads them itself."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from slipway.training import loading
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

SHAPES = [(64, 48), (3,), (1, 7, 5), (512, 256), (), (0, 4), (1,), (2, 1, 3, 1)]
KINDS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


class Threaded(FileSystemReader):
    """torch's own reader notes what is left to it."""

    left: list[ReadItem]

    def _torch(self, plan: LoadPlan, planner: DefaultLoadPlanner) -> object:
        self.left = plan.items
        return FileSystemReader.read_data(self, plan, planner)

    read_data = loading.reading_in_threads(_torch)


@pytest.fixture(params=[1, 8], autouse=True)
def threads(request, monkeypatch) -> None:
    monkeypatch.setattr(loading, "width", lambda: request.param)


def values() -> dict[str, object]:
    torch.manual_seed(0)
    made: dict[str, object] = {"an object": "text"}
    for number in range(len(SHAPES) * len(KINDS)):
        made[f"tensor {number}"] = (torch.randn(SHAPES[number % len(SHAPES)]) * 50).to(KINDS[number % len(KINDS)])
    return made


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Four files of torch's."""
    dcp.save(values(), storage_writer=FileSystemWriter(tmp_path, thread_count=4), no_dist=True)
    assert len(list(tmp_path.glob("*.distcp"))) == 4
    return tmp_path


def loaded(reader: FileSystemReader, **options: object) -> dict[str, object]:
    into = {name: torch.zeros_like(one) if isinstance(one, Tensor) else "" for name, one in values().items()}
    dcp.load(into, storage_reader=reader, no_dist=True, **options)
    return into


def bits(one: object) -> object:
    return (one.dtype, one.shape, one.reshape(-1).view(torch.uint8).tolist()) if isinstance(one, Tensor) else one


def test_what_torch_wrote_is_read_bit_for_bit_and_torch_reads_the_rest(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 1000)
    monkeypatch.setattr(loading, "AT_ONCE", 7)
    reader = Threaded(checkpoint)
    found = loaded(reader)
    for name, one in values().items():
        assert bits(found[name]) == bits(one), name
    # Of a dtype that archive.py does not know.
    left = {item.storage_index.fqn for item in reader.left}
    unknown = {name for name, one in values().items() if isinstance(one, Tensor) and one.dtype == torch.float8_e4m3fn}
    assert left == {name for name in unknown if values()[name].numel()}


def read_part(
    reader: FileSystemReader, part: tuple[Sequence[int], Sequence[int]], whole: Tensor, at: list[int]
) -> None:
    """Read a part of the tensor `weight` into a part of another tensor."""
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    (index,) = metadata.storage_data
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"weight": whole}, metadata, is_coordinator=True)
    offsets, lengths = map(torch.Size, part)
    item = ReadItem(LoadItemType.TENSOR, index, torch.Size(at), index, offsets, lengths)
    reader.read_data(LoadPlan([item]), planner).wait()


def test_any_part_of_a_tensor_goes_to_any_place_as_with_torch(tmp_path, monkeypatch):
    """As where other ranks train than have saved, and in another dtype; in blocks of a few bytes too."""
    draw = random.Random(0)
    left = 0
    for case in range(150):
        monkeypatch.setattr(loading, "PIECE", draw.choice([64, 200, 1 << 20]))
        shape = [draw.choice([1, 2, 3, 7]) for _ in range(draw.randint(1, 4))]
        saved = torch.randn(shape, generator=torch.Generator().manual_seed(case)).to(draw.choice(KINDS[:3]))
        folder = tmp_path / str(case)
        dcp.save({"weight": saved}, storage_writer=FileSystemWriter(folder), no_dist=True)
        lengths = [draw.randint(1, size) for size in shape]
        offsets = [draw.randint(0, size - length) for size, length in zip(shape, lengths, strict=True)]
        room = [length + draw.choice([0, 2]) for length in lengths]
        at = [draw.randint(0, more - length) for more, length in zip(room, lengths, strict=True)]
        kind = draw.choice([saved.dtype, torch.float64])
        expected, found = torch.zeros(room, dtype=kind), torch.zeros(room, dtype=kind)
        read_part(FileSystemReader(folder), (offsets, lengths), expected, at)
        reader = Threaded(folder)
        read_part(reader, (offsets, lengths), found, at)
        assert torch.equal(found, expected), (shape, offsets, lengths, room, at)
        left += len(reader.left)
    assert left < 15  # where the buffer cannot hold a row


@pytest.mark.parametrize("offsets, lengths", [((0, 0), (4, 4)), ((0, 0), (2, 5)), ((2, 0), (2, 3)), ((0, 2), (2, 3))])
def test_a_part_that_is_not_there_is_refused_as_by_torch(tmp_path, offsets, lengths):
    dcp.save({"weight": torch.ones(3, 4)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    for reader in (FileSystemReader(tmp_path), Threaded(tmp_path)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            read_part(reader, (offsets, lengths), torch.zeros(2, 3), [0, 0])


def test_a_file_that_was_cut_off_is_torchs_error(checkpoint):
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with pytest.raises(CheckpointException):
        loaded(Threaded(checkpoint))


def test_a_planner_that_is_not_known_is_left_to_torch(tmp_path):
    dcp.save({"weight": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)

    class Another(LoadPlanner):
        """It wants one tensor, and has a place for it that nobody else knows."""

        place = torch.zeros(3)

        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            (self.index,) = metadata.storage_data

        def create_local_plan(self):
            size, none = torch.Size([3]), torch.Size([0])
            return LoadPlan([ReadItem(LoadItemType.TENSOR, self.index, none, self.index, none, size)])

        def create_global_plan(self, global_plan):
            return global_plan

        def finish_plan(self, central_plan):
            return central_plan

        def load_bytes(self, read_item, value): ...

        def resolve_tensor(self, read_item):
            return self.place

        def commit_tensor(self, read_item, tensor): ...

    planner = Another()
    dcp.load({"weight": torch.zeros(3)}, storage_reader=Threaded(tmp_path), planner=planner, no_dist=True)
    assert planner.place.tolist() == [1, 1, 1]


class InFp8(Tensor):
    """A tensor of another class, as Transformer Engine's in FP8."""


class OneAtATime(DefaultLoadPlanner):
    """As Megatron's planner with tensors in FP8: it notes one of them until it is given back."""

    noted: object = None

    def lookup_tensor(self, index):
        return super().lookup_tensor(index).as_subclass(InFp8)

    def resolve_tensor(self, item):
        assert self.noted is None, "another one has not been given back"
        self.noted = item
        time.sleep(1e-3)  # in which another thread would come
        return super().resolve_tensor(item)

    def commit_tensor(self, item, tensor):
        assert self.noted is item
        self.noted = None


def test_tensors_of_another_class_are_left_to_torch_one_after_the_other(checkpoint):
    found = loaded(Threaded(checkpoint), planner=OneAtATime())
    for name, one in values().items():
        assert bits(found[name]) == bits(one), name


def test_after_an_error_the_other_threads_read_no_more(checkpoint, monkeypatch):
    fill, asked, ended = loading._fill, [], threading.Event()
    end = loading._Loading._end

    def failing(parts: Sequence[object], memory: Sequence[Tensor]) -> None:
        asked.append(parts)
        if len(asked) == 3:
            raise OSError(5, "the disk does not answer")
        if len(asked) > 3:
            ended.wait(60)
        fill(parts, memory)

    def ending(self: object) -> None:
        end(self)
        ended.set()

    monkeypatch.setattr(loading, "_fill", failing)
    monkeypatch.setattr(loading._Loading, "_end", ending)
    with pytest.raises(CheckpointException, match="the disk does not answer"):
        loaded(Threaded(checkpoint))
    assert len(asked) <= 3 + loading.width() < len(values())


def test_neighbours_are_read_at_once_as_far_as_there_is_room(tmp_path, monkeypatch):
    """Experts as other programs save them: one behind the other, each into its own rows and in another dtype."""
    monkeypatch.setattr(loading, "PIECE", 50_000)
    saved = {f"expert {number}": torch.randn(40, 64 + number % 2, dtype=torch.float32) for number in range(30)}
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    preadv, reads = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *words: reads.append(sum(map(len, words[1]))) or preadv(*words))
    into = {name: torch.zeros(one.shape, dtype=torch.bfloat16) for name, one in saved.items()}
    reader = Threaded(tmp_path)
    dcp.load(into, storage_reader=reader, no_dist=True)
    assert not reader.left and all(torch.equal(into[name], one.bfloat16()) for name, one in saved.items())
    large = [size for size in reads if size > 10_000]
    assert len(large) == 8 and max(large) <= 50_000


def go_on_as_on_a_gpu(monkeypatch) -> list[str]:
    """A stream that tells when it is asked, in the place of a GPU's; the copies are made at once."""
    asked, empty = [], torch.empty
    stream = SimpleNamespace(synchronize=lambda: asked.append("all"), record_event=lambda: SimpleNamespace(
        synchronize=lambda: asked.append("piece")))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **about: empty(*size, **about))
    monkeypatch.setattr(loading._Part, "is_in_memory", False)
    monkeypatch.setattr(loading, "PIECE", 50_000)
    return asked


def test_as_on_a_gpu_memory_is_used_again_when_all_of_it_has_arrived(tmp_path, monkeypatch):
    saved = {f"expert {number}": torch.randn(40, 64) for number in range(160)}
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    asked = go_on_as_on_a_gpu(monkeypatch)
    into, reader = {name: torch.zeros(40, 64) for name in saved}, Threaded(tmp_path)
    dcp.load(into, storage_reader=reader, no_dist=True)
    assert not reader.left and all(torch.equal(into[name], one) for name, one in saved.items())
    assert asked.count("piece") == 40 - loading.ON_THE_WAY * loading.width() and asked[-1] == "all"


@pytest.mark.parametrize(("rows", "at_once"), [(32, True), (31, False)])
def test_as_on_a_gpu_what_follows_each_other_in_the_model_is_copied_at_once(rows, at_once, tmp_path, monkeypatch):
    """Experts that lie one behind the other in the model, and in the file each one's gate, up and down."""
    experts, into = 20, {}
    gate_up, down = torch.zeros(experts, 2 * rows, 63), torch.zeros(experts, rows, 63, dtype=torch.bfloat16)
    for number in range(experts):
        into |= {f"{number} gate": gate_up[number, :rows], f"{number} up": gate_up[number, rows:]}
        into[f"{number} down"] = down[number]
    saved = {name: torch.randn(one.shape).to(one.dtype) for name, one in into.items()}
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    go_on_as_on_a_gpu(monkeypatch)
    copies, copy = [], loading._copy
    monkeypatch.setattr(loading, "_copy", lambda parts, memory: copies.append(len(parts)) or copy(parts, memory))
    reader = Threaded(tmp_path)
    dcp.load(into, storage_reader=reader, no_dist=True)
    assert not reader.left and all(torch.equal(into[name], one) for name, one in saved.items())
    assert sum(copies) == 3 * experts
    # What is no multiple of 64 bytes has room behind it in memory, so that the next one begins as its dtype needs it.
    assert len(copies) < experts if at_once else len(copies) == 3 * experts


@pytest.mark.parametrize("flat", [True, False])
def test_an_object_that_is_there_often_is_loaded_once_and_is_each_times_own(flat, tmp_path, monkeypatch):
    saved = {f"state {number}": [None, {"scale": number % 2}, torch.ones(2) * (number % 2)] for number in range(20)}
    saved["large"] = ["x" * 10_000]
    whole = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(saved, storage_writer=FileSystemWriter(tmp_path), planner=whole, no_dist=True)
    load, loads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *words, **more: loads.append(1) or load(*words, **more))
    into, reader, planner = dict.fromkeys(saved, ""), Threaded(tmp_path), DefaultLoadPlanner(flatten_state_dict=flat)
    dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    into = into if flat else planner.state_dict
    assert [item.storage_index.fqn for item in reader.left] == ["large"]
    assert len(loads) == 3 and {name: repr(one) for name, one in into.items()} == {
        name: repr(one) for name, one in saved.items()
    }
    assert len({id(into[name][part]) for name in saved if name != "large" for part in (1, 2)}) == 40
