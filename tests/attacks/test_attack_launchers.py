"""Launchers' variables that are none.

What they do: a node list with letters for numbers, without an end or of a hundred million hosts; numbers of 5,000
digits, ², or 0 processes; addresses with control characters.

What must happen: exit code 2 and one line that names the variable, at once and in little memory.
"""

from __future__ import annotations

import pytest
from slipway.errors import UsageError
from slipway.launch import launchers
from slipway.launch.placement import Placement
from slipway.launch.topology import find_topology

SLURM = {"SLURM_STEP_NODELIST": "a[0-3]", "SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "1"}
PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "h", "PET_NPROC_PER_NODE": "1"}
MPI = {f"OMPI_COMM_WORLD_{name}": "1" for name in ("SIZE", "LOCAL_SIZE")}
MPI |= {f"OMPI_COMM_WORLD_{name}": "0" for name in ("RANK", "LOCAL_RANK")}
LISTS = [
    "a[x-y]", "", "a[0-99999999]", "a[", "a]", "a[]", "a[0-9999]b[0-9999]c[0-9999]", "[", ",", "a[1-2", "a[1--2]",
    "a[²]", "a[" + "9" * 5000 + "]", "a b", "\x1b[2J", "a[5-1]", "a[0-1]" * 40, "a[0-1],b[0-99999999]", "[[[[",
]  # fmt: skip
NUMBERS = ["²", "9" * 5000, "-1", "1e9", "", " ", "0x10", "١", "1:2", "nan", "9999999999", "\x1b[2J1"]


@pytest.mark.parametrize("names", LISTS)
def test_lists_of_nodes(names):
    with pytest.raises(UsageError, match="SLURM_STEP_NODELIST is "):
        find_topology(Placement(), SLURM | {"SLURM_STEP_NODELIST": names})


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    "env, name",
    [
        (SLURM, "SLURM_STEP_NUM_NODES"), (SLURM, "SLURM_NODEID"), (PET, "PET_NNODES"), (PET, "PET_NODE_RANK"),
        (PET, "PET_NPROC_PER_NODE"), (PET, "PET_MASTER_PORT"), (MPI, "OMPI_COMM_WORLD_SIZE"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE"), (SLURM, "SLURM_GPUS_ON_NODE"),
    ],
)  # fmt: skip
def test_numbers(env, name, value):
    try:
        found = find_topology(Placement(), env | {name: value})
    except UsageError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)
    else:
        assert not value.strip() or name == "SLURM_GPUS_ON_NODE", found


@pytest.mark.parametrize(
    "name, value",
    [
        ("PET_NPROC_PER_NODE", "0"), ("PET_NNODES", "0"), ("PET_MASTER_PORT", "0"), ("PET_MASTER_PORT", "65535"),
        ("PET_MASTER_ADDR", "a\x1b[2J"), ("PET_MASTER_ADDR", "a" * 5000), ("PET_MASTER_ADDR", "a\0b"),
        ("PET_MASTER_ADDR", "a b"), ("PET_NODE_RANK", "999999999"),
    ],
)  # fmt: skip
def test_values_out_of_range(name, value):
    with pytest.raises(UsageError, match="it must be"):
        find_topology(Placement(), PET | {name: value})


def test_what_is_right_is_read_as_before():
    assert launchers.expand("a[08-10,12]-ib,b1") == ["a08-ib", "a09-ib", "a10-ib", "a12-ib", "b1"]
    assert launchers.expand("a[0-1]x[2-3]") == ["a0x2", "a0x3", "a1x2", "a1x3"]
    assert find_topology(Placement(), SLURM | {"SLURM_GPUS_ON_NODE": "8"}).master_addr == "a0"
    assert len(launchers.expand("node[00001-50000]")) == 50_000


def test_the_command_says_so_in_one_line(arena):
    for variables in (
        {"SLURM_STEP_NODELIST": "a[0-99999999]"},
        {"SLURM_STEP_NODELIST": "\udc80[x"},
        {"PET_NNODES": "²"},
    ):
        found = arena.run("doctor", environment=variables)
        assert next(iter(variables)) in found.check(2) and found.seconds < 5
