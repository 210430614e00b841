"""NF4, four bits for an element and a scale for each 64: packed and unpacked on the CPU, without torch.

Two forms go by the same names, and reading one as the other gives nonsense without an error:

bitsandbytes    [n/2, 1], the earlier element in the high half of a byte; the scales are packed in 8 bits themselves,
                with float32 scales for each 256 of them; the bytes may be kept as elements of a wider dtype
npu             (bitsandbytes-npu-beta 0.45.3, which MindSpeed-LLM pins) [n/2], the earlier element in the low half, the
                code turned by 8; the scales in BF16

A tensor W has parts: W, W.absmax, W.quant_map and W.quant_state.bitsandbytes__nf4 (JSON); bitsandbytes also has
W.nested_absmax and W.nested_quant_map, which tells the two apart.

Source: bitsandbytes 0.50.2 (backends/default/ops.py, csrc/cpu_ops.cpp, functional.py).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipway.errors import DataError
from slipway.tensors.bits import Bits, to_bfloat16, to_float32
from slipway.tensors.refs import DTYPE_BYTES, TensorInfo

BLOCK, NESTED = 64, 256  # elements with a scale, and scales with a scale
STATE = ".quant_state.bitsandbytes__nf4"
NESTED_PARTS = (".nested_absmax", ".nested_quant_map")
PARTS = (".absmax", ".quant_map", *NESTED_PARTS, STATE)
# Quantiles of the normal distribution (QLoRA, appendix E), as bitsandbytes has them.
TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
SLOTS = 65536  # of bitsandbytes' table for finding 8-bit codes on the CPU
Part = Callable[[str, int, int], Bits]  # (suffix of a part's name, first element, one behind the last) → these
Packed = dict[str, tuple[Bits, str]]  # suffix of the name → (elements, dtype); "" is the tensor's own name


def pack(values: Bits, form: str) -> Packed:
    """A BF16 tensor, whole, in NF4.

    Args:
        values: uint16 bits of BF16, in the shape that the unpacked tensor has.
        form: bitsandbytes or npu.
    """
    flat = to_float32(np.ascontiguousarray(values).reshape(-1), "BF16")
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(values.shape),
    }  # fmt: skip
    own = {".quant_map": (TABLE.view(np.uint32), "F32")}
    if form == "npu":
        scales, codes = _absmax(flat), _nearest(flat)
        turned = (codes + 8) % 16
        absmax = to_bfloat16(scales)[:, None]
        packed = turned[::2] | (turned[1::2] << 4)
        return {"": (packed, "U8"), ".absmax": (absmax, "BF16"), **own, STATE: (_text(state), "U8")}
    scales = np.maximum(_absmax(flat), np.float32(1e-38)) if flat.size % BLOCK else _absmax(flat)
    codes = _bucketed(flat, scales)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(7))  # of zero, with which bitsandbytes fills up
    packed = ((codes[::2] << 4) | codes[1::2])[:, None]
    offset = np.float32(scales.mean(dtype=np.float32))
    inner, nested = _pack_scales(scales - offset)
    state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
    return {
        "": (packed, "U8"),
        ".absmax": (inner, "U8"),
        **own,
        ".nested_absmax": (nested.view(np.uint32), "F32"),
        ".nested_quant_map": (dynamic_map().view(np.uint32), "F32"),
        STATE: (_text(state), "U8"),
    }


def infos(shape: tuple[int, ...], form: str) -> dict[str, TensorInfo]:
    """Suffix → TensorInfo of what a tensor of this shape is packed in; STATE has the size of the longest text."""
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    if form == "npu":
        return {
            "": TensorInfo((count // 2,), "U8"),
            ".absmax": TensorInfo((blocks, 1), "BF16"),
            ".quant_map": TensorInfo((16,), "F32"),
            STATE: TensorInfo((len(_text(_state_of(shape))),), "U8"),
        }
    return {
        "": TensorInfo((-(-count // 2), 1), "U8"),
        ".absmax": TensorInfo((blocks,), "U8"),
        ".quant_map": TensorInfo((16,), "F32"),
        ".nested_absmax": TensorInfo((-(-blocks // NESTED),), "F32"),
        ".nested_quant_map": TensorInfo((256,), "F32"),
    }


def _state_of(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}


@dataclass(frozen=True)
class Source:
    """A packed tensor, as it is stored.

    Args:
        part: gives the elements from one number to another of a part, by the suffix of its name, in row-major order.
        form: bitsandbytes, npu, or plain: bitsandbytes with scales that are not packed themselves.
        shape: of the unpacked tensor.
        offset: what bitsandbytes adds to each scale.
    """

    part: Part
    form: str
    shape: tuple[int, ...]
    offset: float

    def read(self, begin: int, end: int) -> Bits:
        """uint16 bits of BF16: elements from `begin` to `end`, counted in row-major order."""
        first = begin // 2
        packed = self.part("", first, -(-end // 2)).reshape(-1)
        codes = np.empty(packed.size * 2, np.uint8)
        if self.form == "npu":
            codes[::2], codes[1::2] = ((packed & 15) + 8) % 16, ((packed >> 4) + 8) % 16
        else:
            codes[::2], codes[1::2] = packed >> 4, packed & 15
        block = begin // BLOCK
        scales = self._scales(block, -(-end // BLOCK))
        table = self.part(".quant_map", 0, len(TABLE)).view(np.float32)
        values = table[codes[begin - 2 * first : end - 2 * first]]
        return to_bfloat16(values * np.repeat(scales, BLOCK)[begin - BLOCK * block : end - BLOCK * block])

    def _scales(self, begin: int, end: int) -> Bits:
        """float32: the scales of blocks."""
        stored = self.part(".absmax", begin, end).reshape(-1)
        if self.form == "npu":
            return to_float32(stored, "BF16")
        if self.form == "plain":
            return stored.view(np.float32)
        first = begin // NESTED
        nested = self.part(".nested_absmax", first, -(-end // NESTED)).view(np.float32)
        values = self.part(".nested_quant_map", 0, 256).view(np.float32)[stored]
        wide = np.repeat(nested, NESTED)[begin - NESTED * first : end - NESTED * first]
        return values * wide + np.float32(self.offset)


def source_of(parts: Mapping[str, TensorInfo], part: Part, where: str, shape: tuple[int, ...] | None) -> Source:
    """A packed tensor, checked.

    Args:
        parts: suffix → TensorInfo of what is there.
        part: as of Source.
        where: the tensor, for messages.
        shape: that the model needs; None = what the tensor says.

    Errors: DataError for parts that are missing or do not fit together.
    """
    for suffix in ("", ".absmax", ".quant_map", STATE):
        if suffix not in parts:
            raise DataError(f"{where}{suffix} is missing; copy the checkpoint again")
    state = read_state(part(STATE, 0, math.prod(parts[STATE].shape)), where)
    if state.get("quant_type") != "nf4" or state.get("blocksize") != BLOCK:
        said = f"{state.get('quant_type')} with blocks of {state.get('blocksize')}"
        raise DataError(f"{where} is packed in {said}; only nf4 with blocks of {BLOCK} is supported")
    told = state.get("shape")
    if not isinstance(told, list) or not all(type(size) is int and 0 <= size < 1 << 40 for size in told):
        raise DataError(f"{where}{STATE} does not say the shape; copy the checkpoint again")
    if shape is not None and math.prod(told) != math.prod(shape):
        raise DataError(f"{where} is packed from shape {told}, but the model needs {list(shape)}")
    form = {"U8": "bitsandbytes", "BF16": "npu", "F32": "plain"}.get(parts[".absmax"].dtype, "")
    offset = state.get("nested_offset", 0.0)
    if form == "bitsandbytes" and (not parts.keys() >= set(NESTED_PARTS) or type(offset) is not float):
        raise DataError(f"{where} lacks its {' or '.join(NESTED_PARTS)}; copy the checkpoint again")
    wanted = infos(tuple(told), "npu" if form == "npu" else "bitsandbytes")
    read = ("", ".absmax", ".quant_map", *(NESTED_PARTS if form == "bitsandbytes" else ()))
    width = DTYPE_BYTES[parts[""].dtype]
    held = {suffix: math.prod(parts[suffix].shape) for suffix in read} | {"": width * math.prod(parts[""].shape)}
    fits = held == {suffix: math.prod(wanted[suffix].shape) for suffix in read}
    if not form or not fits or any(parts[suffix].dtype != "F32" for suffix in read[2:]):
        raise DataError(f"{where}: its packed parts do not belong together; copy the checkpoint again")
    return Source(part if width == 1 else _bytes_of(part, width), form, tuple(told), offset)


def _bytes_of(part: Part, width: int) -> Part:
    """The same where the codes are kept as elements of `width` bytes: what FSDP shards must all be of one dtype
    (bnb_4bit_quant_storage)."""

    def found(suffix: str, begin: int, end: int) -> Bits:
        if suffix:
            return part(suffix, begin, end)
        first = begin // width
        stored = part("", first, -(-end // width)).reshape(-1)
        return stored.view(np.uint8)[begin - width * first : end - width * first]

    return found


def read_state(text: Bits, where: str) -> Mapping[str, Any]:
    """The JSON in quant_state; DataError for anything else."""
    try:
        found = json.loads(bytes(text.reshape(-1).view(np.uint8)[:4096]))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{where}{STATE} is damaged; copy the checkpoint again")
    return found


def _text(state: Mapping[str, Any]) -> Bits:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def _absmax(flat: Bits) -> Bits:
    """float32: the largest magnitude of each block."""
    return np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, BLOCK)).astype(np.float32)


def _bucketed(flat: Bits, scales: Bits) -> Bits:
    """bitsandbytes' code of each element: how many midpoints of the table are below it."""
    bounds = (TABLE[:-1] + TABLE[1:]) / np.float32(2)
    inverse = np.float32(1) / np.maximum(scales, np.float32(1e-38))
    scaled = np.clip(flat * np.repeat(inverse, BLOCK)[: flat.size], -1, 1)
    if rest := flat.size % BLOCK:  # the last, shorter block is divided
        scaled[-rest:] = np.clip(flat[-rest:] / scales[-1], -1, 1)
    return np.searchsorted(bounds, scaled, side="left").astype(np.uint8)


def _nearest(flat: Bits) -> Bits:
    """The code whose value is nearest to element / scale; of two equally near the lower."""
    scales = _absmax(flat)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.nan_to_num(flat / np.repeat(scales, BLOCK)[: flat.size])
    bounds = (TABLE[:-1].astype(np.float64) + TABLE[1:]) / 2
    return np.searchsorted(bounds, scaled, side="left").astype(np.uint8)


def _pack_scales(values: Bits) -> tuple[Bits, Bits]:
    """(8-bit code of each scale less the mean, float32 scale of each 256), as bitsandbytes' code for CPUs does it."""
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, NESTED)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(1) / largest
        scaled = np.clip(values * np.repeat(inverse, NESTED)[: values.size], np.float32(-1), np.float32(1))
    scaled = np.nan_to_num(scaled)
    at = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(SLOTS - 1) + np.float32(0.5)).astype(np.int64)
    codes = _slots()[at]
    codes[np.repeat(largest == 0, NESTED)[: values.size]] = 0
    return codes, largest


@functools.cache
def _slots() -> Bits:
    """The code for each of 65,536 values from -1 to 1: coarser than the nearest, so some codes are one off."""
    table = dynamic_map()
    middle = np.float32(0.5) * (table[:-1] + table[1:])
    values = np.float32(-1) + (np.float32(2) * np.arange(SLOTS, dtype=np.float32)) / np.float32(SLOTS - 1)
    return np.searchsorted(middle, values, side="left").astype(np.uint8)


@functools.cache
def dynamic_map() -> Bits:
    """float32 [256]: the values of bitsandbytes' 8-bit codes: a sign, a power of ten, and a fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _steps(2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = (np.float32(10.0 ** (exponent - 6)) * means).astype(np.float32)
        values += [*map(float, scaled), *map(float, -scaled)]
    return np.sort(np.array(values, np.float32))


def _steps(count: int) -> Bits:
    """torch.linspace(0.1, 1, count) in float32: the second half is counted from the end, each with one rounding."""
    start, stop = np.float32(0.1), np.float32(1)
    step = np.float64((stop - start) / np.float32(count - 1))
    at = np.arange(count)
    return np.where(at < count // 2, start + step * at, stop - step * (count - 1 - at)).astype(np.float32)
