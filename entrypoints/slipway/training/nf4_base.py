"""A frozen base in NF4 (QLoRA): four bits for a weight and a scale for each 64 of them.

Every matrix of a layer is unpacked for the product that needs it and forgotten after it; the backward pass unpacks it
again. The weights take 0.56 bytes each instead of 2. What is small or decides much stays in BF16: norms, biases,
routers, the embedding and the output layer.
"""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slipway.checkpoint.nf4 import BLOCK, TABLE
from slipway.errors import PreflightError
from slipway.training.patches import CURE, MEGATRON, NEMO, wrap

MATRIX = re.compile(r"weight\d*")  # Transformer Engine numbers those of grouped experts
AT_ONCE = 1 << 24  # elements that are packed at once, which takes about ten times their memory
LOADED_AT_ONCE = 2e9  # bytes of weights in BF16 that exist at once while the base is loaded


def pack_base() -> None:
    """Make Megatron's layers keep their matrices in NF4 from the moment they are built, and NeMo's loading fill them.

    Call it before the model is built. Errors: PreflightError from patches.py.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from nemo.lightning.io.pl import MegatronCheckpointIO

    wrap(TransformerLayer, "__init__", _packed_when_built, MEGATRON)
    wrap(MegatronCheckpointIO, "load_checkpoint", _and_fill, NEMO)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in NF4, with the codes that bitsandbytes gives each row.

    Args:
        weight: [rows, columns] of any float type.

    Returns: uint8 [rows, ⌈columns / 64⌉ · 32], the earlier element in the high half of a byte, and the scales, float32
    [rows, ⌈columns / 64⌉]. A scale is never of two rows, so that a row is packed alike whichever rank has it.
    """
    bounds = torch.from_numpy((TABLE[:-1] + TABLE[1:]) / 2).to(weight.device)
    codes, scales = zip(
        *(_packed(part, bounds) for part in weight.split(max(1, AT_ONCE // weight.shape[1]))), strict=True
    )
    return torch.cat(codes), torch.cat(scales)


def _packed(rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    count = rows.shape[1]
    blocks = nn.functional.pad(rows.float(), (0, -count % BLOCK)).view(len(rows), -1, BLOCK)
    scales = blocks.abs().amax(-1)
    scaled = blocks * scales.clamp(min=1e-38).reciprocal().unsqueeze(-1)
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(len(rows), -1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def unpack(codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What `pack` packed, rounded to BF16 on every machine: [rows, columns]."""
    if codes.is_cuda:
        from slipway.training.nf4_gpu import unpack_rows

        found = unpack_rows(codes, scales, _table(codes.device))
    else:
        found = _unpack_rows(codes, scales).bfloat16()
    return found[:, :columns].to(dtype).contiguous()


def _unpack_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """nf4_gpu.unpack_rows on the CPU, in float32."""
    halves = torch.stack([codes >> 4, codes & 15], -1).view(*scales.shape, BLOCK)
    return (_table(codes.device)[halves.int()] * scales.unsqueeze(-1)).view(len(codes), -1)


@functools.cache
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(TABLE).to(device)


class Packed:
    """The matrices of one module, which are of one shape: its weight, or those of its experts.

    The module keeps their names as parameters without memory, by which Megatron finds their place in a checkpoint.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        weights = [module.get_parameter(name) for name in names]
        self.rows, self.columns = weights[0].shape
        self.dtype = weights[0].dtype
        codes, scales = zip(*(pack(weight.detach()) for weight in weights), strict=True)
        # As integers: Megatron turns every float of a model into BF16.
        module.register_buffer("nf4_codes", torch.cat(codes), persistent=False)
        module.register_buffer("nf4_scales", torch.cat(scales).view(torch.int32), persistent=False)
        for name, weight in zip(names, weights, strict=True):
            hollow = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
            vars(hollow).update(vars(weight), packed_in=self)
            setattr(module, name, hollow)
        self._again: Callable[[], Tensor | None] = lambda: None
        self._forward, self._apply = module.forward, module._apply
        module.forward, module._apply = self.forward, self.apply

    def fill(self, weight: nn.Parameter, values: Tensor) -> None:
        """Pack the values of one of the matrices."""
        codes, scales = pack(values.to(self.module.nf4_codes.device))
        self.module.nf4_codes[self._rows_of(weight)] = codes
        self.scales_of(weight).copy_(scales)

    def scales_of(self, weight: nn.Parameter) -> Tensor:
        """The scales of one of the matrices: float32 [rows, blocks of a row]."""
        return self.module.nf4_scales[self._rows_of(weight)].view(torch.float32)

    def _rows_of(self, weight: nn.Parameter) -> slice:
        number = next(at for at, name in enumerate(self.names) if self.module.get_parameter(name) is weight)
        return slice(number * self.rows, (number + 1) * self.rows)

    def unpacked(self) -> Tensor:
        """[matrices, rows, columns]."""
        scales = self.module.nf4_scales.view(torch.float32)
        found = unpack(self.module.nf4_codes, scales, self.columns, self.dtype)
        return found.view(len(self.names), self.rows, self.columns)

    def unpacked_again(self, part: Part) -> Tensor:
        """A part of it for a backward pass. A layer that has kept a matrix under two names shares its memory."""
        before = self._again()
        found = (self.unpacked() if before is None else before).as_strided(part.shape, part.stride, part.offset)
        self._again = weakref.ref(found)
        return found

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The module's own, with unpacked matrices."""
        weights = self.unpacked()
        try:
            with self._in_their_places(weights), torch.autograd.graph.saved_tensors_hooks(self._kept(weights), _again):
                return self._forward(*arguments, **options)
        finally:
            # Transformer Engine's fused norm and linear layer keeps the weight for the backward pass, which needs none.
            weights.untyped_storage().resize_(0)

    @contextlib.contextmanager
    def _in_their_places(self, weights: Tensor) -> Iterator[None]:
        # An attribute of the module itself is found before a parameter of the same name.
        own = vars(self.module)
        own.update(zip(self.names, weights, strict=True))
        try:
            yield
        finally:
            for name in self.names:
                del own[name]

    def _kept(self, weights: Tensor) -> Callable[[Tensor], Any]:
        """What is kept of a tensor for the backward pass: of the matrices only which part it is."""
        place = weights.untyped_storage().data_ptr()

        def kept(tensor: Tensor) -> Any:
            if tensor.is_meta or tensor.untyped_storage().data_ptr() != place:
                return tensor
            return Part(self, tensor.shape, tensor.stride(), tensor.storage_offset())

        return kept

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """nn.Module._apply, which moves and converts a module, without the parameters that have no memory."""
        parameters = self.module._parameters
        hollow = {name: parameters.pop(name) for name in self.names}
        try:
            return self._apply(function, recurse)
        finally:
            parameters.update(hollow)


@dataclass(frozen=True)
class Part:
    """A view of unpacked matrices."""

    packed: Packed
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _again(kept: Any) -> Tensor:
    if not isinstance(kept, Part):
        return kept
    return kept.packed.unpacked_again(kept)


def _packed_when_built(build: Callable[..., None]) -> Callable[..., None]:
    """A layer's matrices are packed before the next layer is built: the whole model may not fit the GPU."""

    @functools.wraps(build)
    def built(layer: nn.Module, *arguments: Any, **options: Any) -> None:
        build(layer, *arguments, **options)
        pack_matrices(layer)

    return built


def pack_matrices(layer: nn.Module) -> list[Packed]:
    """Pack every matrix of a layer but its router's."""
    from megatron.core.transformer.moe.router import Router

    found = []
    for module in layer.modules():
        own = module.named_parameters(recurse=False)
        names = [name for name, weight in own if MATRIX.fullmatch(name) and weight.dim() == 2]
        names.sort(key=lambda name: (len(name), name))  # of experts by number, as their product takes them
        if names and not isinstance(module, Router):
            found.append(Packed(module, names))
    if not found:
        raise PreflightError(f"{MEGATRON.package} {MEGATRON.version} has a layer without matrices to pack; {CURE}")
    return found


def _and_fill(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load the packed matrices some at a time, and everything else at once."""

    @functools.wraps(load)
    def loaded(io: Any, path: Any, sharded_state_dict: Any = None, *arguments: Any, **options: Any) -> Any:
        wanted = (sharded_state_dict or {}).get("state_dict", {})
        hollow = {name: part for name, part in wanted.items() if _weight_of(part) is not None}
        for group in _groups(hollow):
            _load_group(load, io, path, group, *arguments, **options)
        for name in hollow:
            del wanted[name]
        found = load(io, path, sharded_state_dict, *arguments, **options)
        # NeMo wants a value for each parameter.
        found.get("state_dict", {}).update({name: _weight_of(part) for name, part in hollow.items()})
        return found

    return loaded


def _weight_of(part: Any) -> nn.Parameter | None:
    """The packed weight that an entry of Megatron's state is of."""
    weight = getattr(part, "data", None)
    return weight if hasattr(weight, "packed_in") else None


def _groups(hollow: dict[str, Any]) -> Iterable[dict[str, Any]]:
    group: dict[str, Any] = {}
    size = 0.0
    for name, part in hollow.items():
        size += part.data.numel() * 2
        if group and size > LOADED_AT_ONCE:
            yield group
            group, size = {}, part.data.numel() * 2
        group[name] = part
    if group:
        yield group


def _load_group(load: Callable[..., Any], io: Any, path: Any, group: dict[str, Any], *arguments: Any, **options: Any):
    hollow = {name: part.data for name, part in group.items()}
    for part in group.values():
        device = part.data.packed_in.module.nf4_codes.device
        part.data = torch.empty_like(part.data, device=device)
    try:
        found = load(io, path, {"state_dict": dict(group)}, *arguments, **options)["state_dict"]
        for name, weight in hollow.items():
            weight.packed_in.fill(weight, found[name])
    finally:
        for name, part in group.items():
            part.data = hollow[name]
