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


Form = Mxfp4 | Fp8 | CompressedTensors | Fbgemm


def _codes(info: TensorInfo, generator: Generator) -> Tensor:
    import torch

    return torch.randn(info.shape, generator=generator).to(torch.float8_e4m3fn)


def _scales(grid: tuple[int, ...], fan_in: int, dtype: str, generator: Generator) -> Tensor:
    """Random scales between half and twice the scale that keeps the outputs near 1."""
    import torch

    values = fan_in**-0.5 * 2 ** (2 * torch.rand(grid, generator=generator) - 1)
    return values.to(getattr(torch, dtype))
