"""Rotary positions as a kernel for a GPU against Megatron's own, in a process of their own: Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

KERNEL = """
import torch
from types import SimpleNamespace
from slipway.training import cpu
cpu.enable()
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from slipway.training.rotary import Turned, fits, share_of

alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
torch.manual_seed(0)
# Samples of no tokens stand at the end, more than a program looks at at once.
packed = torch.tensor([0, 5, 6, 13, *[20] * 70], dtype=torch.int32)
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    for by_pairs in (False, True):
        for heads, width, scale in ((3, 64, 1.0), (9, 24, 1.35), (1, 8, 1.0)):
            for bounds, shape in ((None, (20, 2)), (packed, (20,)), (packed[:5], (20,))):
                config = SimpleNamespace(
                    apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=by_pairs
                )
                half = 16 * torch.rand(20 if bounds is None else 9, 1, 1, width // 2)
                angles = torch.cat([half, half], -1)
                # A part of a larger tensor, as queries and keys are of their layer's output.
                whole = torch.randn(*shape, heads, 2 * width, dtype=dtype)
                inputs = whole[..., width:].requires_grad_()
                given = torch.randn(*shape, 2 * heads, width, dtype=dtype)[..., ::2, :]
                wanted = apply_rotary_pos_emb(inputs, angles, config, bounds, scale, alone)
                found = Turned.apply(inputs, angles, bounds, scale, by_pairs, (0, 1))
                assert fits(inputs, angles) and found.is_contiguous() and found.dtype == dtype
                of_wanted, of_found = (torch.autograd.grad(one, inputs, given)[0] for one in (wanted, found))
                for one, other in ((found, wanted), (of_found, of_wanted)):
                    torch.testing.assert_close(one, other, atol=bound, rtol=bound)
# Context parallel ranks with parts of every sample, and samples of no tokens at the end.
for ranks in (2, 4):
    bounds = torch.tensor([0, 8, 32, 40, *[64] * 3], dtype=torch.int32)
    half = 16 * torch.rand(24, 1, 1, 6)
    angles = torch.cat([half, half], -1)
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda ranks=ranks: ranks, rank=lambda rank=rank: rank)
        for by_pairs in (False, True):
            config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=by_pairs)
            inputs = torch.randn(64 // ranks, 3, 12, requires_grad=True)
            wanted = apply_rotary_pos_emb(inputs, angles, config, bounds, 1.35, group)
            assert share_of(group, bounds) == (rank, ranks) and share_of(group, None) == (0, 1)
            found = Turned.apply(inputs, angles, bounds, 1.35, by_pairs, share_of(group, bounds))
            given = torch.randn_like(found)
            of_wanted, of_found = (torch.autograd.grad(one, inputs, given)[0] for one in (wanted, found))
            for one, other in ((found, wanted), (of_found, of_wanted)):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
empty = torch.empty(0, 2, 4)
assert Turned.apply(empty, torch.ones(3, 1, 1, 4), packed, 1.0, False, (0, 1)).shape == empty.shape
angles = torch.ones(4, 1, 1, 6)
assert not fits(torch.ones(4, 1, 2, 8), angles) and not fits(torch.ones(4, 2, 2, 6), angles.expand(4, 2, 1, 6))
print("equal")
"""

WIRED = """
import torch
from types import SimpleNamespace
from slipway.training import cpu
cpu.enable()
from megatron.core.transformer import attention, multi_latent_attention
from slipway.training.rotary import turn_in_one_kernel
turn_in_one_kernel()
config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
for module in (attention, multi_latent_attention):  # without a GPU Megatron's own
    found = module.apply_rotary_pos_emb(torch.ones(3, 1, 2, 4), torch.zeros(3, 1, 1, 4), config, cp_group=alone)
    assert torch.equal(found, torch.ones(3, 1, 2, 4))
print("equal")
"""


def run(code: str, **environment: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.endswith("equal\n"), found.stderr[-2000:]


def test_the_kernel_turns_and_turns_back_as_megatron_does():
    run(KERNEL, TRITON_INTERPRET="1")


def test_without_a_gpu_megatrons_own_is_kept():
    run(WIRED)
