"""What must be the same on all nodes of a run, as text that is compared over the network before anything starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import slipway
from slipway.checkpoint.lora import BASE_NOTE
from slipway.checkpoint.nemo_context import TOKENIZER as TOKENIZER_FOLDER
from slipway.launch.topology import Topology
from slipway.tokens.blend import parts_of
from slipway.training.recipe import Recipe

if TYPE_CHECKING:
    from slipway.tokens.scan import Index

PATHS = ("model", "data", "out", "eval_data", "adapter")  # may differ from machine to machine; their contents may not
DATA = "the data (bytes, usable samples, digest of their positions and of a part of the file)"
MODEL = "the model (digest of both ends of its files of weights)"
TOKENIZER = "the tokenizer (digest of its files)"
EVALUATIONS = "the data of evaluations (as that of the data)"
ADAPTER = "the adapters to begin with (digest of both ends of their files)"
NONE = "none"
STAY = (DATA, EVALUATIONS, MODEL, ADAPTER, TOKENIZER)  # what a run that goes on must find as it was, wherever it is
# Fields of a recipe that are paths, and what says that another path has the same content.
DIGESTS = {"data": DATA, "eval_data": EVALUATIONS, "model": MODEL, "adapter": ADAPTER}
SAMPLES = 64  # places of a file of data that are compared: reading all of it would take as long as training's start
SAMPLE_BYTES = 4096  # at the beginning and at the end of each file of weights


def claims(
    recipe: Recipe, indices: Sequence[Index], held_out: Index | None, topology: Topology, begins_at: int
) -> dict[str, str]:
    """Name → value of everything that decides what is computed."""
    fields = {name: value for name, value in vars(recipe).items() if name not in PATHS}
    return {
        "the version of slipway": slipway.__version__,
        "--nodes": str(topology.nodes),
        "--nproc-per-node": str(topology.processes_per_node),
        **{f"--{name.replace('_', '-')}": str(value) for name, value in fields.items()},
        DATA: ", ".join(
            data_digest(part.path, index) + (f", {part.share:.3g} of all" if len(indices) > 1 else "")
            for part, index in zip(parts_of(recipe.data), indices, strict=True)
        ),
        EVALUATIONS: data_digest(Path(recipe.eval_data), held_out) if held_out else NONE,
        MODEL: model_digest(Path(recipe.model)),
        ADAPTER: model_digest(Path(recipe.adapter)) if recipe.adapter else NONE,
        TOKENIZER: tokenizer_digest(Path(recipe.model)),
        "the step to continue from in --out, which all nodes must share": str(begins_at),
    }


def is_trained_on(claims: dict[str, str]) -> bool:
    """Whether the data of evaluations is one of the files of data, under whatever name."""
    return claims[EVALUATIONS] != NONE and claims[EVALUATIONS] in claims[DATA]


def data_digest(path: Path, index: Index) -> str:
    """Size, number of samples, their positions and a part of the file. Two files that agree in all are the same."""
    digest, size = hashlib.sha256(index.digest.encode()), path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"{size} bytes, {len(index)} samples, {digest.hexdigest()[:12]}"


def tokenizer_digest(model: Path) -> str:
    """Names and contents of the tokenizer's files; "none" where the checkpoint has no tokenizer."""
    files = [file for file in sorted((model / "context" / TOKENIZER_FOLDER).rglob("*")) if file.is_file()]
    digest = hashlib.sha256(b"".join(file.name.encode() + hashlib.sha256(file.read_bytes()).digest() for file in files))
    return digest.hexdigest()[:12] if files else NONE


def changed(begun: dict[str, str], now: dict[str, str]) -> list[str]:
    """What of a run's inputs is not as it was when the run began, in words.

    Args:
        begun: the claims of the run's first start, as far as they are known.
        now: those of this start.
    """
    differences = [name for name in STAY if begun.get(name, now[name]) != now[name]]
    # A run may begin or leave off to be evaluated, but not on other data than before.
    if NONE in (begun.get(EVALUATIONS), now[EVALUATIONS]) and EVALUATIONS in differences:
        differences.remove(EVALUATIONS)
    return [f"{name} was {begun[name]} and is {now[name]}" for name in differences]


def kept(begun: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """What is noted of a run's inputs: those of this start, and those of earlier ones that it does without."""
    return begun | {name: now[name] for name in STAY if now[name] != NONE or name not in begun}


def model_digest(model: Path) -> str:
    """Names, sizes and both ends of every file of weights. Reading all of a model of terabytes would take too long."""
    digest = hashlib.sha256()
    for path in sorted(file for file in (model / "weights").iterdir() if file.name != BASE_NOTE):  # a place
        with path.open("rb") as file:
            head, size = file.read(SAMPLE_BYTES), path.stat().st_size
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(f"{path.name} {size} ".encode() + head + file.read())
    return digest.hexdigest()[:12]
