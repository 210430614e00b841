"""A small model with sinks, windows and YaRN on packed samples, of which each rank has parts. Started once a rank.

python sinks_in_parts.py RANK RANKS FOLDER

Saves what this rank finds: hidden states of its tokens, and the gradients of all weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from slipway.training import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from slipway.training import sinks  # noqa: E402
from slipway.training.repairs import turn_packed_positions  # noqa: E402
from slipway.training.samples import share_of_samples  # noqa: E402
from small import PLAIN  # noqa: E402
from test_sinks import SHARED, plain_backward, plain_forward  # noqa: E402

HEADS, VOCABULARY, LAYERS = 8, 50, 4
YARN = {
    "rotary_scaling_factor": 32.0,
    "original_max_position_embeddings": 4,  # fewer than the samples have
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "correction_range_round_to_int": False,
}


def model() -> GPTModel:
    config = TransformerConfig(
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_query_groups=2,
        kv_channels=8,
        apply_rope_fusion=False,
        softmax_type="learnable",
        window_size=(3, 0),
        window_attn_skip_freq=2,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=32,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        **PLAIN,
    )
    for name, value in YARN.items():
        setattr(config, f"yarn_{name}", value)
    layers = get_gpt_layer_local_spec(config.num_moe_experts, False, normalization="RMSNorm")
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)
    gpt = GPTModel(config, layers, VOCABULARY, 64, position_embedding_type="yarn", post_process=False).train()
    for number, layer in enumerate(gpt.decoder.layers, 1):
        attention = layer.self_attention.core_attention
        del attention.attention_dropout  # a module, where Transformer Engine's attention has a number
        attention.softmax_type, attention.attention_dropout = config.softmax_type, 0.0
        attention.window_size = (sinks.UNLIMITED, 0) if number % 2 == 0 else config.window_size
        torch.nn.init.normal_(attention.softmax_offset)
    return gpt


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / f'meeting{ranks}'}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    sinks.forward_without_sinks, sinks.backward_from_sums = plain_forward, plain_backward
    DotProductAttention.forward = sinks._packed_with_sinks(DotProductAttention.forward)
    turn_packed_positions()
    gpt = model()
    tokens = torch.randint(VOCABULARY, (1, int(SHARED[-1])), generator=torch.Generator().manual_seed(1))
    mine = share_of_samples(SHARED, ranks, rank)
    longest = int(SHARED.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=SHARED, cu_seqlens_kv=SHARED, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    hidden = gpt(tokens[:, mine], tokens[:, mine], attention_mask=None, packed_seq_params=packed)
    hidden.square().sum().backward()
    gradients = {name: weight.grad for name, weight in gpt.named_parameters() if weight.grad is not None}
    torch.save((hidden.detach(), gradients), folder / f"{ranks}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
