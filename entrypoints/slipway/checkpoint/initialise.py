"""A model with random weights, as its family begins to train: what `slipway init` writes.

Every element depends on the seed, the tensor's name and its place alone. So a model of any size is made piece by piece,
by any number of threads, and comes out the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.errors import DataError, UsageError
from slipway.tensors.bits import Bits, to_bfloat16
from slipway.tensors.refs import Ref, TensorInfo
from slipway.untrusted import parse_json

ONES = ("norm.weight",)  # also layernorm.weight
ZEROS = (".bias", "_bias")
PER_STEP = 8  # normal numbers that Philox's counter stands for: four outputs of 64 bits, two numbers each
STANDARD_DEVIATION = 0.02  # transformers' own, where config.json does not say
LARGEST_DEVIATION = 100  # a model that begins with so much computes nothing


class RandomWeights:
    """Reads like a model's files, and makes the parts that it is asked for. Threads may share it.

    Args:
        tensors: name → TensorInfo of the Hugging Face form.
        deviation: standard deviation of the matrices (`initializer_range`); norms are 1, biases 0.
        seed: of all of them.
    """

    quantized: tuple[str, ...] = ()

    def __init__(self, tensors: Mapping[str, TensorInfo], deviation: float, seed: int) -> None:
        self.tensors, self.deviation, self.seed = dict(tensors), deviation, seed

    def read(self, ref: Ref) -> Bits:
        """A part of a tensor."""
        info = self.tensors[ref.name]
        shape = ref.shape(info.shape)
        if ref.name.endswith(ONES):
            values = np.ones(shape, np.float32)
        elif ref.name.endswith(ZEROS):
            values = np.zeros(shape, np.float32)
        else:
            normal = _normal(self.seed, ref.name, ref.start(info.shape), math.prod(shape))
            values = (normal * np.float32(self.deviation)).reshape(shape)
        return to_bfloat16(values) if info.dtype == "BF16" else values.view(np.uint32)

    def source_bytes(self, ref: Ref) -> int:
        """Memory that making a part takes, for the budget."""
        return 8 * math.prod(ref.shape(self.tensors[ref.name].shape))

    def files(self) -> list[Path]:
        """None: nothing is read."""
        return []


def _normal(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """float32 [count]: elements `start` and on of a tensor's own stream of normal numbers (Box and Muller).

    Philox numbers its outputs, so that any part of the stream can be made alone; numpy's own normal numbers take a
    varying number of outputs each, and cannot.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    stream = np.random.Philox(key=key)
    stream.advance(start // PER_STEP)
    skip = start % PER_STEP
    raw = stream.random_raw(-(-(skip + count) // 2)).view(np.uint32).reshape(-1, 2)
    # Each output is two uniform numbers, which become two normal ones. The first is never 0: its logarithm is taken.
    length = np.sqrt(-2 * np.log((raw[:, 0].astype(np.float32) + 1) * np.float32(2**-32)))
    angle = raw[:, 1].astype(np.float32) * np.float32(2 * np.pi * 2**-32)
    pairs = np.empty((len(raw), 2), np.float32)
    np.multiply(length, np.cos(angle), out=pairs[:, 0])
    np.multiply(length, np.sin(angle), out=pairs[:, 1])
    return pairs.reshape(-1)[skip : skip + count]


def deviation_of(config: Mapping[str, Any], where: Path) -> float:
    """The standard deviation of the matrices that config.json asks for; DataError for what is none."""
    said = config.get("initializer_range", STANDARD_DEVIATION)
    if type(said) not in (int, float) or not 0 <= said <= LARGEST_DEVIATION:
        raise DataError(
            f"{where}: field initializer_range is {said!r}; it must be a number from 0 to {LARGEST_DEVIATION}"
        )
    return float(said)


def changed(config: Mapping[str, Any], settings: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """(config.json with fields set as KEY=VALUE says, notes). A value is JSON, else a text.

    A list with an entry for each layer is cut where there are fewer layers now.

    Errors: UsageError for a word that is not KEY=VALUE, or a field that config.json does not have.
    """
    c, notes = dict(config), []
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in c:
            raise UsageError(f"--set {setting}: expected FIELD=VALUE with a field of config.json: {', '.join(c)}")
        try:
            c[key] = parse_json(text)
        except ValueError:
            c[key] = text
    layers, kinds = c.get("num_hidden_layers"), c.get("layer_types")
    if isinstance(kinds, list) and isinstance(layers, int) and 0 < layers < len(kinds):
        c["layer_types"] = kinds[:layers]
        notes.append(f"layer_types is cut to the first {layers} layers")
    return c, notes
