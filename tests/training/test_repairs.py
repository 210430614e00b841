"""What megatron-core gets wrong and training mends; what goes wrong in parallel is in test_parallel.py."""

from __future__ import annotations

import torch
from conftest import make_model
from slipway.commands.import_checkpoint import import_checkpoint


def test_routers_keep_their_biases_in_float32(tmp_path):
    """As Megatron turns a model into BF16 once NeMo has loaded it."""
    from slipway.training import forward
    from slipway.training.repairs import keep_routers_counts

    import_checkpoint(str(make_model(tmp_path / "hf", "deepseek_v3")), str(tmp_path / "nemo"))
    module = forward.load(tmp_path / "nemo")
    keep_routers_counts()
    before = {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("expert_bias")}
    assert before and all((bias != bias.bfloat16()).any() for bias in before.values())
    module.bfloat16()
    found = dict(module.named_buffers())
    assert all(torch.equal(found[name], bias) for name, bias in before.items())
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
