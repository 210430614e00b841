"""What must be the same on all nodes of a run, as text that is compared over the network before anything starts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import slipway
from slipway.launch.topology import Topology
from slipway.training.recipe import Recipe

if TYPE_CHECKING:
    from slipway.tokens.scan import Index

PATHS = ("model", "data", "out", "eval_data")  # may differ from machine to machine; their contents may not
SAMPLE_BYTES = 4096  # at the beginning and at the end of each file of weights


def claims(recipe: Recipe, index: Index, held_out: Index | None, topology: Topology, begins_at: int) -> dict[str, str]:
    """Name → value of everything that decides what is computed."""
    fields = {name: value for name, value in vars(recipe).items() if name not in PATHS}
    return {
        "the version of slipway": slipway.__version__,
        "--nodes": str(topology.nodes),
        "--nproc-per-node": str(topology.processes_per_node),
        **{f"--{name.replace('_', '-')}": str(value) for name, value in fields.items()},
        "the data (bytes, usable samples, digest of their positions)": data_digest(Path(recipe.data), index),
        "the data of evaluations": data_digest(Path(recipe.eval_data), held_out) if held_out else "none",
        "the model (digest of both ends of its files of weights)": model_digest(Path(recipe.model)),
        "the step to continue from in --out, which all nodes must share": str(begins_at),
    }


def data_digest(path: Path, index: Index) -> str:
    """Size, number of samples and their positions. Two files that agree in all three are the same in practice."""
    return f"{path.stat().st_size} bytes, {len(index)} samples, {index.digest[:12]}"


def model_digest(model: Path) -> str:
    """Names, sizes and both ends of every file of weights. Reading all of a model of terabytes would take too long."""
    digest = hashlib.sha256()
    for path in sorted((model / "weights").iterdir()):
        with path.open("rb") as file:
            head, size = file.read(SAMPLE_BYTES), path.stat().st_size
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(f"{path.name} {size} ".encode() + head + file.read())
    return digest.hexdigest()[:12]
