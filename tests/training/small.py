"""What the small models of tests have in common, as fields of Megatron's configuration: nothing is dropped or fused."""

from __future__ import annotations

from torch.nn import functional

PLAIN = {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_dropout_fusion": False,
}
