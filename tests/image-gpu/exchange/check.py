"""Rows for the experts and sums over the ranks beside NCCL's. Ends with 1 if one differs."""

from __future__ import annotations

import on_gpus
import torch
from slipway.training.exchange_gpu import Places, Shared
from slipway.training.experts import let_sorting_compile
from torch import distributed
from transformer_engine.pytorch.triton.permutation import make_row_id_map

RANKS = torch.cuda.device_count()
# Tokens of a rank, their width, experts of a rank, experts of a token.
SHAPES = [(1000, 2048, 64, 8), (4096, 2880, 16, 4), (3, 16, 2, 1)]
TIMES = 200
BOUND = 1e-3


def wrong_on(rank: int) -> int:
    let_sorting_compile()
    return sum(differences(rank, *shape) for shape in SHAPES)


def differences(rank: int, tokens: int, width: int, experts: int, of_token: int) -> int:
    """How often something is not what NCCL brings."""
    torch.manual_seed(5)  # the same routing on all ranks
    probs = torch.rand(RANKS * tokens, RANKS * experts, device="cuda")
    chosen = torch.rand_like(probs).argsort(1) < of_token
    mine = slice(rank * experts, (rank + 1) * experts)
    chosen, probs = chosen[:, mine].contiguous(), probs[:, mine].contiguous()
    of_rows = chosen.t().nonzero()[:, 1]
    torch.manual_seed(rank)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    shared = Shared(distributed.group.WORLD, tokens, width, torch.bfloat16)
    places = Places(shared, make_row_id_map(chosen, *chosen.shape), len(of_rows), tokens)
    # In float32: NCCL would round the sum of each two ranks.
    everyone, total = hidden.new_empty(RANKS * tokens, width), torch.empty_like(hidden, dtype=torch.float32)
    wrong = 0
    for number in range(TIMES):
        rows, found = places.spread(hidden * (number % 7 + 1), probs)
        if not number % 3:
            continue  # the next send comes right after this one
        sums = places.collect(rows)
        if number % 20 != 1:
            continue
        distributed.all_gather_into_tensor(everyone, hidden * (number % 7 + 1))
        parts = torch.zeros_like(everyone, dtype=torch.float32).index_add_(0, of_rows, rows.float())
        distributed.reduce_scatter_tensor(total, parts.bfloat16().float())
        wrong += not torch.equal(rows, everyone[of_rows])
        wrong += not torch.equal(found, probs.t()[chosen.t()])
        wrong += not torch.equal(places.of_tokens(found), probs * chosen)
        # In what order a token's rows are added up decides a last digit of some.
        wrong += bool((sums.float() - total.bfloat16().float()).norm() > BOUND * total.norm())
    print(f"{'ok' if not wrong else 'WRONG'}   rank {rank}: {tokens} tokens of {width}, {experts} experts", flush=True)
    return wrong


if __name__ == "__main__":
    on_gpus.check(wrong_on, RANKS)
