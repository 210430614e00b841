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

PARTED = """
import torch
from types import SimpleNamespace
from slipway.training import cpu
cpu.enable()
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from slipway.training import rotary
from small import PLAIN

torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)

def attention(layernorm=False, **changed):
    config = TransformerConfig(num_layers=1, num_attention_heads=6, num_query_groups=2, kv_channels=8,
                               apply_rope_fusion=False, **PLAIN, **changed)
    spec = get_gpt_layer_local_spec(qk_layernorm=layernorm).submodules.self_attention
    torch.manual_seed(3)
    made = SelfAttention(config, spec.submodules, 1, **spec.params)
    made.core_attention = Core()
    return made

class Core(torch.nn.Module):  # shows what it is given
    def forward(self, query, key, value, *arguments, **options):
        key, value = (one.repeat_interleave(3, -2) for one in (key, value))
        out = query * torch.arange(query.numel()).view(query.shape).cos() + key * 2 - value * 3 * key
        return out.reshape(len(out), -1 if out.dim() == 4 else 1, query.shape[-2] * 8)[:, : query.shape[1]]

def results(layer, packed, angles):
    layer.zero_grad()
    torch.manual_seed(4)
    hidden = torch.randn(20, 1 if packed else 2, 32, requires_grad=True)
    output, _ = layer(hidden, None, rotary_pos_emb=angles, packed_seq_params=packed)
    output.square().sum().backward()
    return [output, hidden.grad, layer.linear_qkv.weight.grad.clone()]

bounds = torch.tensor([0, 5, 6, 13, 20], dtype=torch.int32)
given = dict(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
packs = [PackedSeqParams(**given, **more)
         for more in ({}, dict(cu_seqlens_q_padded=bounds, cu_seqlens_kv_padded=bounds))]
half = 16 * torch.rand(20, 1, 1, 4)
angles = torch.cat([half, half], -1)
short = angles[:9]  # of as many positions as there are tokens Megatron takes those of each token
of_packs = [(attention(), packed, one) for packed in packs for one in (short, (short, short))]
cases = [(attention(), None, one) for one in (angles, (angles, angles))] + of_packs
narrow = angles[..., :4]
others = [(attention(layernorm=True), None, angles), (attention(rotary_interleaved=True), None, angles),
          (attention(), None, narrow), (attention(), None, (angles, angles + 1)), (attention(), None, None)]
before = [results(*case) for case in (*cases, *others)]
rotary.has_kernels = lambda tensor: True
rotary.turn_in_one_kernel()
used, apply = [], rotary.Parted.apply
rotary.Parted.apply = lambda *arguments: used.append(1) or apply(*arguments)
for number, (case, wanted) in enumerate(zip((*cases, *others), before, strict=True)):
    used.clear()
    for one, other in zip(results(*case), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(used) == (number < len(cases)), number
    assert not hasattr(case[0], "turning")
print("equal")
"""


def run(code: str, **environment: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.endswith("equal\n"), found.stderr[-2000:]


def test_the_kernel_turns_and_turns_back_as_megatron_does():
    run(KERNEL, TRITON_INTERPRET="1")


def test_queries_keys_and_values_are_turned_while_they_are_parted():
    run(PARTED, TRITON_INTERPRET="1", PYTHONPATH=os.path.dirname(__file__))


def test_without_a_gpu_megatrons_own_is_kept():
    run(WIRED)
