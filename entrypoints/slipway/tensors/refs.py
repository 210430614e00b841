"""Names for tensors and for parts of tensors, from which plans are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

INDEX = "model.safetensors.index.json"  # beside the shards of a Hugging Face model: which tensor lies in which
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (in safetensors' spelling) of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Ref:
    """A part of tensor `name`: the entry `index` of its leading dimensions, then `rows` [start, stop) of the next one.

    Only such parts are needed, and they are contiguous in row-major order: one offset and one length in a file. `rows`
    None = all rows.
    """

    name: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape in a tensor of shape `whole`."""
        rest = whole[len(self.index) :]
        return rest if self.rows is None else (self.rows[1] - self.rows[0], *rest[1:])

    def start(self, whole: tuple[int, ...]) -> int:
        """Number of elements before the part in a tensor of shape `whole`."""
        at = 0
        for place, size in zip(self.index, whole, strict=False):
            at = at * size + place
        at *= math.prod(whole[len(self.index) :])
        if self.rows is not None:
            at += self.rows[0] * math.prod(whole[len(self.index) + 1 :])
        return at


def stored_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all of them."""
    return sum(info.bytes for info in tensors.values())
