"""Random weights in the quantised forms of published checkpoints, for the demo and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slipway.tensors.refs import TensorInfo

if TYPE_CHECKING:
    from torch import Generator, Tensor

MXFP4_BYTES = 16


@dataclass(frozen=True)
class Mxfp4:
    """gpt-oss: `_blocks` and `_scales` of the experts, [experts, rows, …]; the BF16 form is [experts, …, rows]."""

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        """Random codes, with scales that keep the outputs near 1."""
        import torch

        experts, columns, rows = info.shape
        groups = columns // (2 * MXFP4_BYTES)
        middle = 127 - round(columns.bit_length() / 2) - 1
        shape = (experts, rows, groups)
        blocks = torch.randint(0, 256, (*shape, MXFP4_BYTES), dtype=torch.uint8, generator=generator)
        scales = torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}


@dataclass(frozen=True)
class Fp8:
    """DeepSeek and Qwen: float8_e4m3fn, and `_scale_inv` with one scale for each block of rows × columns.

    Args:
        block: rows and columns of a block; 128 × 128 in the published models.
        scale_dtype: float32, bfloat16 or float8_e8m0fnu.
    """

    block: tuple[int, int] = (128, 128)
    scale_dtype: str = "float32"

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        rows, columns = info.shape
        grid = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        scales = _scales(grid, columns, self.scale_dtype, generator)
        return {name: _codes(info, generator), f"{name}_scale_inv": scales}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        about = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        return {**about, "weight_block_size": list(self.block)}


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors: float8_e4m3fn, and `_scale` with one scale for the tensor, each row or each block.

    Args:
        strategy: which of these, in the words of config.json.
        block: rows and columns of a block.
        scale_dtype: bfloat16 or float32.
    """

    strategy: Literal["tensor", "channel", "block"] = "channel"
    block: tuple[int, int] = (128, 128)
    scale_dtype: str = "bfloat16"

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        rows, columns = info.shape
        grid = {
            "tensor": (1,),
            "channel": (rows, 1),
            "block": (-(-rows // self.block[0]), -(-columns // self.block[1])),
        }[self.strategy]
        scales = _scales(grid, columns, self.scale_dtype, generator)
        return {name: _codes(info, generator), f"{name}_scale": scales}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        weights: dict[str, Any] = {"dynamic": False, "num_bits": 8, "strategy": self.strategy, "symmetric": True}
        weights["type"] = "float"
        if self.strategy == "block":
            weights["block_structure"] = list(self.block)
        group = {"targets": ["Linear"], "weights": weights}
        about = {"format": "float-quantized", "ignore": ["lm_head"], "quant_method": "compressed-tensors"}
        return {**about, "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Fbgemm:
    """fbgemm, the form of Llama 3.1 405B: float8_e4m3fn, and `_scale` with a float32 scale for each row."""

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        return CompressedTensors("channel", scale_dtype="float32").tensors(name, info, generator)

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        skipped = ["model.embed_tokens", "model.norm", "lm_head"]
        return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": skipped}


@dataclass(frozen=True)
class Modelopt:
    """ModelOpt's FP8, float8_e4m3fn with one float32 scale for the tensor: also of activations and of the KV cache."""

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        import torch

        scales = _scales((), info.shape[1], "float32", generator)
        found = {name: _codes(info, generator), f"{name}_scale": scales}
        return found | _of_inference(name, torch.tensor(0.5))

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        about = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        return {**about, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


@dataclass(frozen=True)
class Nvfp4:
    """NVFP4: two e2m1 in a byte, the low nibble first, a float8_e4m3fn for each 16, and a float32 for the tensor.

    Args:
        vendor: compressed-tensors divides by the last, and ModelOpt multiplies by it.
    """

    vendor: Literal["compressed-tensors", "modelopt"] = "compressed-tensors"

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        """Scales as the quantisers make them: those in float8 up to its largest value, that of the tensor small."""
        import torch

        rows, columns = info.shape
        if columns % 16:
            return _not_quantised(name, info, generator)
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        scales = _scales((rows, columns // 16), columns, "float32", generator) / 4
        of_tensor = scales.max().reshape(1) / 448
        scales = (scales / of_tensor).to(torch.float8_e4m3fn)
        if self.vendor == "modelopt":
            found = {name: packed, f"{name}_scale": scales, f"{name}_scale_2": of_tensor[0].clone()}
            return found | _of_inference(name, torch.tensor(0.5))
        return {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_global_scale": 1 / of_tensor}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        if self.vendor == "modelopt":
            return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
        return _compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)


@dataclass(frozen=True)
class Microscaling:
    """MXFP8 or MXFP4 of compressed-tensors and ModelOpt: an exponent (e8m0, as uint8) for each 32 elements of a row.

    Args:
        bits: of an element: e4m3, or two e2m1 in a byte.
    """

    bits: Literal[8, 4] = 8

    def tensors(self, name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
        import torch

        rows, columns = info.shape
        if self.bits == 4 and columns % 32:
            return _not_quantised(name, info, generator)
        middle = 127 - round(columns.bit_length() / 2) - (self.bits == 4)
        shape = (rows, -(-columns // 32))
        scales = torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, generator=generator)
        if self.bits == 8:
            return {name: _codes(info, generator), f"{name}_scale": scales}
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        return {f"{name}_packed": packed, f"{name}_scale": scales}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        form = {8: "mxfp8-quantized", 4: "mxfp4-pack-quantized"}[self.bits]
        return _compressed(form, num_bits=self.bits, strategy="group", group_size=32, scale_dtype="torch.uint8")


Form = Mxfp4 | Fp8 | CompressedTensors | Fbgemm | Modelopt | Nvfp4 | Microscaling


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, "dynamic": False, **weights}}
    about = {"format": form, "ignore": ["lm_head"], "quant_method": "compressed-tensors"}
    return {**about, "config_groups": {"group_0": group}}


def _not_quantised(name: str, info: TensorInfo, generator: Generator) -> dict[str, Tensor]:
    """In BF16, as the quantisers leave what their groups do not fit."""
    import torch

    return {name: (torch.randn(info.shape, generator=generator) * info.shape[1] ** -0.5).bfloat16()}


def _of_inference(name: str, scale: Tensor) -> dict[str, Tensor]:
    """ModelOpt's scales of a module's input, and of the KV cache that it fills."""
    module = name.removesuffix("weight")
    cache = {f"{module}{part}_scale": scale.clone() for part in "kv" if module.endswith(f"{part}_proj.")}
    return {f"{module}input_scale": scale.clone()} | cache


def _codes(info: TensorInfo, generator: Generator) -> Tensor:
    import torch

    return torch.randn(info.shape, generator=generator).to(torch.float8_e4m3fn)


def _scales(grid: tuple[int, ...], fan_in: int, dtype: str, generator: Generator) -> Tensor:
    """Random scales between half and twice the scale that keeps the outputs near 1."""
    import torch

    values = fan_in**-0.5 * 2 ** (2 * torch.rand(grid, generator=generator) - 1)
    return values.to(getattr(torch, dtype))
