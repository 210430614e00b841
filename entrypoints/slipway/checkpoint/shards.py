"""Where every tensor of a file of safetensors is.

A file has 8 bytes with the length of the header (little endian), the header (JSON: name → dtype, shape, data_offsets)
and the data. Everything in a file is checked before it is used: the length of the header before it is read; of every
tensor, that it lies inside the file, has as many bytes as its shape and dtype need, and overlaps no other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.tensors.refs import DTYPE_BYTES, TensorInfo
from slipway.untrusted import NotJson, open_file, parse_json, unreadable

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Args:
        offset: that of its first byte, from the start of the file.
        strides: of its elements, counted in elements; None = row-major order without gaps.
    """

    file: Path
    offset: int
    info: TensorInfo
    strides: tuple[int, ...] | None = None


def read_header(file: Path) -> dict[str, Stored]:
    """Name → place of every tensor of one file; DataError for a file that is damaged."""
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)  # fewer bytes if the file is that short
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DataError(
                    f"{file}: not a safetensors file, or incomplete (header of {length} bytes in {size}); {AGAIN}"
                )
            header = parse_json(stream.read(length))
    except OSError as error:
        raise unreadable(file, error, AGAIN) from None
    except NotJson as error:
        raise DataError(f"{file}: the header is not JSON ({error}); {AGAIN}") from None
    if not isinstance(header, dict):
        raise DataError(f"{file}: the header is not a JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    stored = {name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_overlap(file, stored)
    return stored


def _stored(file: Path, name: str, entry: Any, data_start: int, size: int) -> Stored:
    """The place of a tensor from its header entry, checked; `size`: bytes of the file."""
    try:
        begin, end = entry["data_offsets"]
        info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
        numbers = [begin, end, *info.shape]
        # Not isinstance: True is an int. JSON has numbers of any length, and what follows multiplies them.
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
            raise ValueError
        known = info.dtype in DTYPE_BYTES  # TypeError for a list
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{file}: the header entry of tensor {name} is damaged; {AGAIN}") from None
    if not known:
        raise DataError(f"{file}: tensor {name} has the unknown dtype {info.dtype!r}; {AGAIN}")
    if begin + info.bytes != end:
        raise DataError(f"{file}: tensor {name} has {end - begin} bytes, but its shape needs {info.bytes}; {AGAIN}")
    if data_start + end > size:
        raise DataError(f"{file}: the file ends inside tensor {name} ({size} bytes of {data_start + end}); {AGAIN}")
    return Stored(file, data_start + begin, info)


def _check_overlap(file: Path, stored: Mapping[str, Stored]) -> None:
    at, before = 0, ""
    # Of two at the same place an empty one comes first, else it would seem to lie inside the other.
    for name, place in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].info.bytes)):
        if place.offset < at:
            raise DataError(f"{file}: tensors {before} and {name} overlap; {AGAIN}")
        at, before = place.offset + place.info.bytes, name
