"""Who says how many nodes there are, and what is refused."""

from __future__ import annotations

import pytest

from entrypoints.errors import UsageError
from entrypoints.launch import torchrun
from entrypoints.launch.topology import find_topology


def topology(env: dict | None = None, nodes=None, rank=None, addr=None, port=None, per_node=2):
    return find_topology(nodes, rank, addr, port, per_node, env or {})


def test_alone_is_one_node():
    found = topology()
    assert (found.nodes, found.node_rank, found.world_size, found.master_addr) == (1, 0, 2, "127.0.0.1")
    assert str(found) == "topology: 1 node × 2, this is node 0, master 127.0.0.1:29500, from nothing but this machine"


def test_flags_are_taken_as_given():
    found = topology(nodes=8, rank=3, addr="node0", port=1234)
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (8, 3, "node0", 1234)
    assert found.world_size == 16 and found.source == "flags"


PET = {"PET_NNODES": "4", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-0", "PET_MASTER_PORT": "23456"}


def test_torchruns_own_variables_are_read():
    found = topology(PET)
    assert (found.nodes, found.node_rank, found.master_addr, found.master_port) == (4, 1, "job-0", 23456)
    assert "PET_" in found.source


@pytest.mark.parametrize(
    "env, flags, message",
    [
        ({}, {"nodes": 2, "addr": "a"}, "2 nodes need --node-rank"),
        ({}, {"nodes": 2, "rank": 0}, "2 nodes need --master-addr"),
        ({}, {"nodes": 2, "rank": 2, "addr": "a"}, "--node-rank is 2; with 2 nodes it goes from 0 to 1"),
        (PET, {"nodes": 2}, "--nodes says 2, torchrun's PET_ variables say 4"),
        (PET | {"PET_NNODES": "1:4"}, {}, "PET_NNODES is '1:4'"),
    ],
)
def test_what_is_missing_or_disagrees_is_said(env, flags, message):
    with pytest.raises(UsageError) as error:
        topology(env, **flags)
    assert message in str(error.value)


def test_the_users_environment_goes_before_the_defaults(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert torchrun.environment()["NCCL_NVLS_ENABLE"] == "1"
    assert torchrun.environment()["OMP_NUM_THREADS"] == "1" or "OMP_NUM_THREADS" in torchrun.os.environ


def test_the_command_names_every_part_of_the_topology():
    words = torchrun.command(topology(nodes=2, rank=1, addr="node0", port=7), ["recipe.json"])
    for word in ("--nnodes=2", "--nproc-per-node=2", "--node-rank=1", "--master-addr=node0", "--master-port=7"):
        assert word in words
