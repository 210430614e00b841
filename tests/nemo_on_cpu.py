"""NeMo's own importers and exporters on a machine without a GPU.

They read and write the names of Transformer Engine's modules, which need a GPU. Here layers of plain torch have these
names; the rest is NeMo's code as it is, its context too.

python nemo_on_cpu.py import|export KIND SOURCE TARGET SECONDS, a file that gets the seconds without NeMo's own import
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

KINDS = {"llama": ("LlamaModel", "Llama31Config8B"), "qwen2": ("Qwen2Model", "Qwen2Config7B"),
         "qwen3": ("Qwen3Model", "Qwen3Config8B")}  # fmt: skip


def enable() -> None:
    """Let NeMo build its models in this process, with the names of Transformer Engine's modules."""
    from slipway.training import cpu

    cpu.enable()
    from nemo.collections.llm.gpt.model import base

    base.local_layer_spec = dense_layers


def dense_layers(config: Any) -> Any:
    """Layers whose norms are inside the linear layers that follow, as Transformer Engine's are."""
    from megatron.core.transformer.identity_op import IdentityOp
    from slipway.training.cpu import local_layer_spec

    config.persist_layer_norm = config.gradient_accumulation_fusion = False
    block = local_layer_spec(config)
    block.layer_norm = Norm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.submodules.linear_qkv = norm_and_linear()
        parts.mlp.submodules.linear_fc1 = norm_and_linear()
        if config.qk_layernorm:
            attention = parts.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = Norm
        parts.sharded_state_dict_keys_map = {}
    return block


class Norm:
    """Megatron's plain norm, with its weight in the dtype of the others."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        return WrappedTorchNorm(config, hidden_size, eps).to(config.params_dtype)


def norm_and_linear() -> type:
    """A norm and a linear layer in one module, whose parameters are layer_norm_weight and weight."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear

    class NormAndLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.epsilon = config.layernorm_epsilon

        def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            size = (hidden.shape[-1],)
            normed = torch.nn.functional.rms_norm(hidden, size, self.layer_norm_weight, self.epsilon)
            return super().forward(normed, *arguments, **options)

    return NormAndLinear


def import_model(kind: str, source: str, target: str) -> None:
    """`llm.import_ckpt`, as NeMo's documentation has it."""
    from nemo.collections import llm

    model, config = (getattr(llm, name) for name in KINDS[kind])
    llm.import_ckpt(model=model(config()), source=f"hf://{source}", output_path=Path(target))


def export_model(kind: str, source: str, target: str) -> None:
    """`llm.export_ckpt`."""
    from nemo.collections import llm

    llm.export_ckpt(path=Path(source), target="hf", output_path=Path(target))


def main() -> None:
    verb, *words, seconds = sys.argv[1:]
    enable()
    from nemo.collections import llm  # noqa: F401 (its import takes long, and is no part of the work)

    began = time.monotonic()
    {"import": import_model, "export": export_model}[verb](*words)
    Path(seconds).write_text(str(time.monotonic() - began))


if __name__ == "__main__":
    main()
