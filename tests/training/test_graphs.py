"""What is done where a CUDA graph cannot be recorded. What one computes is compared on a GPU: docs/performance.md."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def graphs(monkeypatch):
    from slipway.training import cpu

    cpu.enable()
    from slipway.training import graphs

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return graphs


def twice(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return 2 * tokens + positions


def test_a_pass_that_cannot_be_recorded_is_computed_and_said_once(graphs, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "Graph", refuse)
    found = graphs.Graphs()
    for length in (3, 4, 3):
        tokens = torch.arange(length)
        assert torch.equal(found(None, twice, tokens, tokens), 3 * tokens)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "worker: no CUDA graph of the base (operation not permitted when stream is capturing): its kernels are started "
        "one by one"
    ]


def test_memory_that_runs_out_is_no_reason_to_go_on(graphs, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "Graph", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.Graphs()(None, twice, torch.arange(2), torch.arange(2))


def test_so_many_shapes_are_recorded_and_no_more(graphs, monkeypatch):
    made = []
    monkeypatch.setattr(graphs, "Graph", lambda gpt, run, *given: made.append(given[0].shape) or run)
    found = graphs.Graphs()
    for length in [*range(1, graphs.MOST + 10)] * 2:
        tokens = torch.arange(length)
        assert torch.equal(found(None, twice, tokens, tokens), 3 * tokens)
    assert len(made) == graphs.MOST
