"""Passes of a small model by graphs, see tape.py, beside the same without. Started once for each rank.

python graphs_on_cpu.py RANK RANKS STORE
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch
from slipway.training import cpu

cpu.enable()

import tape  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from slipway.training import graphs, partial_graphs  # noqa: E402
from slipway.training.dispatch import Dispatcher  # noqa: E402
from slipway.training.padding import ignore_padding  # noqa: E402
from slipway.training.steps import hidden_states  # noqa: E402
from small import PLAIN  # noqa: E402

TOKENS, SEQUENCES, VOCABULARY = 24, 2, 50
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
}


def model(ranks: int, **options) -> GPTModel:
    config = TransformerConfig(
        num_layers=3,
        num_attention_heads=4,
        expert_model_parallel_size=ranks if options else 1,
        **PLAIN,
        **options,
    )
    config.seq_length = TOKENS
    layers = get_gpt_layer_local_spec(config.num_moe_experts, False, normalization="RMSNorm")
    torch.manual_seed(torch.distributed.get_rank())
    gpt = GPTModel(config, layers, VOCABULARY, TOKENS, position_embedding_type="rope").train()
    for name, weight in gpt.named_parameters():
        weight.requires_grad_("layers.1.self_attention.linear_proj" not in name and "embedding" not in name)
    return gpt


def batch(seed: int) -> graphs.Batch:
    generator = torch.Generator().manual_seed(100 * torch.distributed.get_rank() + seed)
    place = torch.arange(TOKENS)[None].expand(SEQUENCES, -1)
    lengths = torch.randint(3, TOKENS, (SEQUENCES,), generator=generator)
    return {
        "tokens": torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=generator),
        "position_ids": place,
        "cu_seqlens": None,
        "is_real": place < lengths[:, None],
        "lengths": lengths,
    }


def add_up(weight: torch.Tensor) -> None:
    """As Megatron: what is in `grad` is memory of a graph, which the next pass writes over."""
    if weight.grad is not None:
        weight.main_grad.add_(weight.grad)
    weight.grad = None


def with_gradients(pass_, gpt, batches) -> list[torch.Tensor]:
    """Hidden states of all micro batches, the counts of the routers, and the sums of the gradients."""
    weights = [weight for weight in gpt.parameters() if weight.requires_grad]
    counts = [layer.mlp.router.local_tokens_per_expert for layer in gpt.decoder.layers if hasattr(layer.mlp, "router")]
    sums = [torch.zeros_like(weight) for weight in weights]
    for weight, place in zip(weights, sums, strict=True):
        weight.main_grad = place
    for count in counts:
        count.zero_()
    found = []
    for one in batches:
        output = pass_(gpt, functools.partial(hidden_states, gpt), one)
        output.square().sum().backward()
        found.append(output.detach().clone())
    return [*found, *map(torch.clone, counts), *sums]


def check(kind, options: dict[str, Any], refused: int | None) -> None:
    """Over two runs of the same micro batches, of which the first one records.

    Args:
        refused: the recording that fails, on the last rank alone; None = none.
    """
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    gpt, batches, pairs = model(ranks, **options), [batch(seed) for seed in range(6)], graphs.Pairs(kind)
    for weight in gpt.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(add_up)
    numbers = itertools.count()

    def recording(pool: Any) -> Any:
        if next(numbers) == refused and rank == ranks - 1:
            raise RuntimeError("out of memory")
        return tape.recording(pool)

    partial_graphs.recording = graphs.recording = recording
    # What is noted in the first one is computed as well, which a GPU does not do: only the routers' counts show it.
    for run in range(2):
        found = with_gradients(pairs, gpt, batches)
        wanted = with_gradients(lambda gpt, run, one: run(one, None), gpt, batches)
        apart = [float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)]
        counts = range(len(batches), len(batches) + (len(gpt.decoder.layers) if options else 0))
        assert not any(one for number, one in enumerate(apart) if run or number not in counts), apart
        assert sum(bool(one.any()) for one in found) >= len(found) - 1
    assert isinstance(pairs._pair, kind) == (refused is None or rank < ranks - 1)
    print(kind.__name__, options.get("moe_token_dispatcher_type"), refused, "alike", flush=True)


def main(rank: int, ranks: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(0)
    init_num_microbatches_calculator(0, None, 2, 1, 2 // ranks)
    ignore_padding()
    moe_layer.MoEAllGatherTokenDispatcher = Dispatcher
    torch.cuda.graph_pool_handle = lambda: None
    check(graphs.Pair, {}, None)
    gathered = EXPERTS | {"moe_token_dispatcher_type": "allgather", "moe_shared_expert_intermediate_size": 48}
    for options in [EXPERTS, gathered][:ranks]:
        for refused in (None, 1, 4):  # of three forward and three backward passes
            check(graphs.Parts, options, refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
