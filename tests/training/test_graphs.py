"""When CUDA graphs are recorded and used, and what is done where that cannot be. What they compute is compared with the
passes themselves on a GPU: tests/image-gpu/graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch


@pytest.fixture
def graphs(monkeypatch):
    from slipway.training import cpu

    cpu.enable()
    from slipway.training import graphs

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "get_num_microbatches", lambda: 3)
    monkeypatch.setattr(graphs, "LITTLE", 0)
    return graphs


def batch_of(length: int, bounds: list[int] | None = None) -> dict[str, torch.Tensor | None]:
    tokens = torch.arange(length)[None]
    return {"tokens": tokens, "position_ids": tokens, "cu_seqlens": None if bounds is None else torch.tensor([bounds])}


def twice(batch, longest) -> torch.Tensor:
    return 2 * batch["tokens"] + batch["position_ids"]


def refuse(*_):
    try:
        raise RuntimeError(f"{CAUSE}\nmore")
    finally:
        raise RuntimeError("the recording is broken")  # as torch ends it


MODEL = torch.nn.Linear(2, 2)
CAUSE = "operation not permitted when stream is capturing"
SAID = f"worker: no CUDA graph of the layers ({CAUSE}): their kernels are started one by one"


def test_a_pass_that_cannot_be_recorded_is_computed_and_said_once(graphs, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "Graph", refuse)
    found = graphs.Graphs()
    for length in (3, 4, 3):
        assert torch.equal(found(None, twice, batch_of(length)), 3 * torch.arange(length)[None])
    assert capsys.readouterr().err.splitlines() == [SAID]


def test_graphs_give_their_memory_back_where_another_finds_none(graphs, monkeypatch, capsys):
    def made(gpt, run, batch, pool):
        if batch["tokens"].shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda batch: run(batch, None)

    monkeypatch.setattr(graphs, "Graph", made)
    found = graphs.Graphs()
    for length in (2, 3, 2):
        assert torch.equal(found(None, twice, batch_of(length)), 3 * torch.arange(length)[None])
    assert not found._of_shapes
    assert capsys.readouterr().err.splitlines() == [SAID.replace(CAUSE, "CUDA out of memory")]


def test_so_many_shapes_are_recorded_and_no_more(graphs, monkeypatch):
    made = []
    monkeypatch.setattr(
        graphs, "Graph", lambda gpt, run, batch, _: made.append(batch) or (lambda batch: run(batch, None))
    )
    found = graphs.Graphs()
    for length in [*range(1, graphs.MOST + 10)] * 2:
        assert torch.equal(found(None, twice, batch_of(length)), 3 * torch.arange(length)[None])
    assert len(made) == graphs.MOST


class Made:
    """Notes which pairs were made and used."""

    def __init__(self, graphs, monkeypatch) -> None:
        self.shapes, self.used = [], 0
        self.graphs = graphs
        monkeypatch.setattr(graphs, "Pair", self.make)

    def make(self, gpt, run, batch, pool):
        self.shapes.append(batch["tokens"].shape[1])
        return self

    is_broken = False

    def __call__(self, batch):
        self.used += 1
        return self.use(batch)

    def use(self, batch):
        return twice(batch, None)


def test_a_pair_is_recorded_after_the_first_step_when_shapes_come_back(graphs, monkeypatch):
    made, found = Made(graphs, monkeypatch), graphs.Pairs(graphs.Pair)
    used = []
    for length in [8, 8, 8, 8, 8, 4, 4, 4, 8]:
        assert torch.equal(found(MODEL, twice, batch_of(length)), 3 * torch.arange(length)[None])
        used.append(made.used)
    assert made.shapes == [8, 4]
    assert used == [0, 0, 0, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("least, used", [(0, [0, 0, 1, 2, 3, 4]), (1, [0, 0, 0, 0, 1, 2])], ids=["little", "much"])
def test_where_the_optimizer_takes_little_it_is_set_aside_and_the_first_step_records(least, used, graphs, monkeypatch):
    monkeypatch.setattr(graphs, "get_num_microbatches", lambda: 4)
    monkeypatch.setattr(graphs, "LITTLE", 6 * graphs.OF_OPTIMIZER - least)
    make, new, taken = Made(graphs, monkeypatch), torch.Tensor.new_empty, []
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda like, *size, **as_: taken.append([*size]) or new(like, *size, **as_)
    )
    found, seen = graphs.Pairs(graphs.Pair), []
    for _ in used:
        assert torch.equal(found(MODEL, twice, batch_of(8)), 3 * torch.arange(8)[None])
        seen.append(make.used)
    assert seen == used and ([96] in taken) == (not least)


def test_without_memory_for_a_pair_the_run_goes_on(graphs, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "Pair", refuse)
    found = graphs.Pairs(graphs.Pair)
    for _ in range(8):
        assert torch.equal(found(MODEL, twice, batch_of(3)), 3 * torch.arange(3)[None])
    assert capsys.readouterr().err.splitlines() == [SAID]


def test_shapes_that_keep_changing_are_recorded_so_often_and_no_more(graphs, monkeypatch):
    made, found = Made(graphs, monkeypatch), graphs.Pairs(graphs.Pair)
    for length in [length for length in range(1, 100) for _ in range(4)]:
        found(MODEL, twice, batch_of(length))
    assert len(made.shapes) == graphs.TRIES


def test_packed_samples_have_one_shape_whatever_their_number(graphs, monkeypatch):
    made, found = Made(graphs, monkeypatch), graphs.Pairs(graphs.Pair)
    monkeypatch.setattr(made, "use", lambda batch: made.bounds.append(batch["cu_seqlens"].tolist()) or batch["tokens"])
    made.bounds = []
    rows = [[0, 5, 40], [0, 40], [0, 1, 2, 3, 40], [0, 7, 40], [0, 40], [*range(20), 40], [0, 40], [0, 40], [0, 40]]
    for bounds in rows:
        found(MODEL, twice, batch_of(40, bounds))
    sixteen = [[*bounds, *[40] * (16 - len(bounds))] for bounds in rows[3:5]]
    assert made.bounds[:2] == sixteen
    assert made.bounds[2:] == [[0, *[40] * 31]] * 2  # after the row of 20 samples, when two more had come
    assert made.shapes == [40, 40]


def test_other_parameters_stand_in_the_place_of_the_trained_ones(graphs):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight  # of two modules
    model[0].bias.requires_grad_(False)
    model[1].bias.main_grad, model[1].bias.grad_added_to_main_grad = torch.zeros(3), True  # Megatron's
    before, trained = dict(model.named_parameters()), [model[0].weight, model[1].bias]
    with graphs.standing_in(model, trained) as leaves:
        assert model[0].weight is model[1].weight is leaves[0] and model[1].bias is leaves[1]
        assert model[0].bias is before["0.bias"]
        assert leaves[1].main_grad is before["1.bias"].main_grad and not leaves[1].grad_added_to_main_grad
        found = torch.autograd.grad(model(torch.ones(3)).sum(), leaves)
    assert all(one is before[name] for name, one in model.named_parameters())
    wanted = torch.autograd.grad(model(torch.ones(3)).sum(), trained)
    assert all(map(torch.equal, found, wanted))
    assert [leaf.data_ptr() for leaf in leaves] == [weight.data_ptr() for weight in trained]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_computed_again_is_what_the_passes_compute(tmp_path, ranks):
    """Dense layers as a pair, layers with experts up to these, on one rank and on two that share the experts."""
    words = [sys.executable, "-W", "ignore", Path(__file__).parent / "graphs_on_cpu.py"]
    started = [
        subprocess.Popen([*words, str(rank), str(ranks), tmp_path / "store"], text=True, stdout=PIPE, stderr=PIPE)
        for rank in range(ranks)
    ]
    for one in started:
        said, errors = one.communicate()
        assert one.returncode == 0, errors
        assert said.count("alike") == 1 + 3 * ranks
