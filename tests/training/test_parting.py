"""Heads parted, normed and turned by a kernel against Megatron's attention, in a process of its own."""

from __future__ import annotations

import os

from test_rotary import run

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
from slipway.training import parting
from small import PLAIN

torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)

def attention(layernorm=False, frozen=False, **changed):
    config = TransformerConfig(num_layers=1, num_attention_heads=6, num_query_groups=2, kv_channels=8,
                               apply_rope_fusion=False, **PLAIN, **changed)
    spec = get_gpt_layer_local_spec(qk_layernorm=layernorm).submodules.self_attention
    torch.manual_seed(3)
    made = SelfAttention(config, spec.submodules, 1, **spec.params)
    made.core_attention = Core()
    if frozen:
        for norm in (made.q_layernorm, made.k_layernorm):
            norm.weight.requires_grad_(False).uniform_(0.5, 2.0)
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
of_packs.append((attention(layernorm=True, frozen=True), packs[0], short))
cases = [(attention(layernorm=True, frozen=True), None, angles), (attention(), None, angles),
         (attention(), None, (angles, angles)), *of_packs]
narrow = angles[..., :4]
others = [(attention(layernorm=True), None, angles), (attention(rotary_interleaved=True), None, angles),
          (attention(), None, narrow), (attention(), None, (angles, angles + 1)), (attention(), None, None)]
before = [results(*case) for case in (*cases, *others)]
parting.has_kernels = lambda tensor: True
parting.part_in_one_kernel()
used, apply = [], parting.Parted.apply
parting.Parted.apply = lambda *arguments: used.append(1) or apply(*arguments)
for number, (case, wanted) in enumerate(zip((*cases, *others), before, strict=True)):
    used.clear()
    for one, other in zip(results(*case), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(used) == (number < len(cases)), number
    assert not hasattr(case[0], "heads")
print("equal")
"""


def test_heads_are_parted_normed_and_turned_as_megatron_does():
    run(PARTED, TRITON_INTERPRET="1", PYTHONPATH=os.path.dirname(__file__))
