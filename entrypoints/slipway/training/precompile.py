"""Kernels written in Triton, compiled while NeMo is imported and the checkpoint is read.

A new container has compiled none, and each takes up to 0.3 s, some five seconds of the first step in all. So the first
worker of a node starts another process, which calls them on a few numbers, of the types and widths that the first step
will have. Triton keeps what it compiles in files, where the workers find it. Left out are the kernels that need the
memory of other GPUs (exchange_gpu.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slipway.families.checks import head_dim
from slipway.launch.quiet import quiet
from slipway.launch.topology import gpus_here
from slipway.training import weights
from slipway.training.memory import ALL
from slipway.training.preflight import model_of
from slipway.training.recipe import Recipe
from slipway.untrusted import tell

NORMED_HEADS = ("qwen3",)
FLOAT32_ROUTERS = ("deepseek_v3",)  # in NeMo; the others route in the type of the model
ROWS = 16  # like a run's, a multiple of 16: Triton compiles anew for numbers that are none, and for 1
COLUMNS = 128


@dataclass(frozen=True)
class Kernels:
    """Which kernels a run has, and what they are compiled for.

    Args:
        heads: the run trains heads: nothing of the base is turned back, and their loss counts logits.
        columns: of the logits.
        turned: values of a head that rotary positions turn.
        by_pairs: neighbours are turned together, as DeepSeek's.
        queries: of each key, where all heads are parted and turned at once; else 0.
        normed: queries and keys come through a norm before they are turned.
        pack: several samples share a row.
        shares: of each sample, one for each context parallel rank.
        rank: of the adapters; 0 where there are none.
        between: both layers of a dense feed-forward block have adapters.
        fp8_rows: tokens of a micro batch where the gradients of adapters are in FP8; else 0.
        nf4: the base is unpacked from NF4.
        experts: that this rank has; 0 in a dense model.
        chosen: how many of them a token has at most.
        width: of an expert's activation.
        limited: the activation has a limit.
        float32_router: the router's probabilities are float32, and not the model's BF16.
        hidden: width of a token.
        tokens: that this rank sorts by expert at once.
    """

    heads: bool
    columns: int
    turned: int
    by_pairs: bool
    queries: int
    normed: bool
    pack: bool
    shares: int
    rank: int
    between: bool
    fp8_rows: int
    nf4: bool
    experts: int
    chosen: int
    width: int
    limited: bool
    float32_router: bool
    hidden: int
    tokens: int

    @classmethod
    def of(cls, recipe: Recipe, family: str, c: dict[str, Any]) -> Kernels:
        """Those of a run of a model with this config.json, in its canonical form."""
        experts, ranks = weights.experts_of(c), recipe.expert_parallel_size
        latent = "kv_lora_rank" in c
        rows = recipe.micro_batch_size * recipe.seq_length
        tokens = rows // recipe.tensor_parallel_size // recipe.context_parallel_size
        trains_norms = family in NORMED_HEADS and recipe.mode not in ("lora", "heads")
        adapts = recipe.mode == "lora" and recipe.tensor_parallel_size == 1
        return cls(
            heads=recipe.mode == "heads",
            columns=c["vocab_size"],
            turned=c["qk_rope_head_dim"] if latent else head_dim(c),
            by_pairs=latent,
            queries=0 if latent or trains_norms else c["num_attention_heads"] // c["num_key_value_heads"],
            normed=family in NORMED_HEADS,
            pack=bool(recipe.pack),
            shares=recipe.context_parallel_size,
            rank=recipe.lora_rank if adapts else 0,
            between=adapts and _adapts_both(recipe.lora_targets) and (not experts or "first_k_dense_replace" in c),
            fp8_rows=rows if adapts and recipe.precision == "fp8" else 0,
            nf4=recipe.base_precision == "nf4",
            experts=experts // ranks,
            chosen=min(c.get("num_experts_per_tok", 0), experts // ranks),
            width=next((c[key] for key in ("moe_intermediate_size", "intermediate_size") if key in c), 0),
            limited="swiglu_limit" in c,
            float32_router=family in FLOAT32_ROUTERS,
            hidden=c["hidden_size"],
            tokens=tokens * ranks,
        )


def _adapts_both(targets: str) -> bool:
    return targets == ALL or {"linear_fc1", "linear_fc2"} <= set(targets.split(","))


@contextmanager
def compiling(recipe: Recipe) -> Iterator[None]:
    """Let another process compile meanwhile what this node's GPUs will run, in the first worker of the node.

    Nobody waits for it. What it has not compiled when it is called for, the caller compiles as well.
    """
    found = model_of(Path(recipe.model)) if gpus_here() and os.environ.get("LOCAL_RANK") == "0" else None
    if found is None:
        yield
        return
    kernels = json.dumps(asdict(Kernels.of(recipe, *found)))
    process = subprocess.Popen([sys.executable, "-m", __name__, kernels], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()  # it may still be at work where the run ended early
        process.wait()


def know_compiler() -> None:
    """Let another thread sum up Triton's own files, 400 MB: the first kernel is looked up by that sum.

    Call it when Triton is imported: two threads that import it would get in each other's way.
    """
    from triton.runtime.cache import triton_key

    threading.Thread(target=triton_key, name="compiler", daemon=True).start()


def compile_all(kernels: Kernels, device: str = "cuda") -> None:
    """Call each kernel once, in the order of the first step; those of Transformer Engine last, which are imported."""
    for part in (_turning, _adding, _between, _unpacking, _activating, _losing, _counting, _sorting):
        part(kernels, device)


def _turning(kernels: Kernels, device: str) -> None:
    import torch

    from slipway.training.parting_gpu import Heads, joined, part
    from slipway.training.rotary_gpu import turn

    turns = tuple(torch.zeros(2, ROWS, 1, 1, kernels.turned, device=device).unbind())
    bounds = torch.zeros(2, dtype=torch.int32, device=device) if kernels.pack else None
    share = 0, kernels.shares if kernels.pack else 1
    if kernels.queries:
        mixed = torch.zeros(ROWS, 1, (kernels.queries + 2) * kernels.turned, dtype=torch.bfloat16, device=device)
        norms = (mixed.new_zeros(kernels.turned),) * 2 if kernels.normed else None
        heads = Heads(1, kernels.turned, turns, bounds, 1.0, share, norms)
        parts = part(mixed, heads)
        if not kernels.heads:
            joined(parts, mixed if norms else None, heads)
        return
    inputs = torch.zeros(ROWS, 1, 2, kernels.turned, dtype=torch.bfloat16, device=device)
    for back in (False,) if kernels.heads else (False, True):
        turn(inputs, turns, bounds, 1.0, share, by_pairs=kernels.by_pairs, back=back)


def _adding(kernels: Kernels, device: str) -> None:
    import torch

    from slipway.training.low_rank import LARGEST_RANK
    from slipway.training.low_rank_gpu import LEAST_ROWS, add_product_, product_with_peaks

    if not 0 < kernels.rank <= LARGEST_RANK:
        return
    weight = torch.zeros(COLUMNS, kernels.rank, dtype=torch.bfloat16, device=device)
    add_product_(weight.new_zeros(ROWS, COLUMNS), weight.new_zeros(ROWS, kernels.rank), weight, 1.0)
    if kernels.fp8_rows >= LEAST_ROWS:
        product_with_peaks(weight.new_zeros(kernels.fp8_rows, COLUMNS), weight, 1.0)


def _between(kernels: Kernels, device: str) -> None:
    import torch

    from slipway.training.adapted_activation import LARGEST_RANK
    from slipway.training.adapted_activation_gpu import backward, forward

    if not kernels.between or kernels.rank > LARGEST_RANK:
        return
    base = torch.zeros(ROWS, 2 * COLUMNS, dtype=torch.bfloat16, device=device)
    low, before = base.new_zeros(ROWS, kernels.rank), base.new_zeros(2 * COLUMNS, kernels.rank)
    active, after = base.new_zeros(ROWS, COLUMNS), base.new_zeros(kernels.rank, COLUMNS)
    noted = kernels.fp8_rows > 0
    forward(base, low, before, 1.0, active, noted=noted)
    backward(active, low, after, base, low, before, 1.0, noted=noted)


def _unpacking(kernels: Kernels, device: str) -> None:
    if not kernels.nf4:
        return
    import torch

    from slipway.checkpoint.nf4 import BLOCK
    from slipway.training.nf4_gpu import unpack_rows

    codes = torch.zeros(ROWS, BLOCK // 2, dtype=torch.uint8, device=device)
    unpack_rows(codes, torch.zeros(ROWS, 1, device=device), torch.zeros(16, device=device))


def _activating(kernels: Kernels, device: str) -> None:
    if not kernels.experts:
        return
    import torch

    from slipway.training.activations_gpu import Gate, gated, gradients

    inputs = torch.zeros(ROWS, 2 * kernels.width, dtype=torch.bfloat16, device=device)
    shares = torch.zeros(ROWS, 1, dtype=_type_of_shares(kernels), device=device)
    gate = Gate(1.0, limit=1.0 if kernels.limited else None)
    output = gated(inputs, shares, gate)
    if not kernels.heads:
        gradients(output, inputs, shares, gate)


def _losing(kernels: Kernels, device: str) -> None:
    if kernels.heads:
        return
    import torch

    from slipway.training.cross_entropy_gpu import sums, to_gradient_

    logits = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=device)
    to_gradient_(logits, labels, sums(logits, labels)[0])


def _counting(kernels: Kernels, device: str) -> None:
    if not kernels.heads:
        return
    import torch

    from slipway.training.counted import CountedRows

    rows = CountedRows(
        torch.zeros(ROWS, kernels.columns, dtype=torch.bfloat16, device=device),
        torch.zeros(ROWS, dtype=torch.int64, device=device),
    )
    ones = torch.ones(ROWS, device=device)
    rows.features(ones)
    rows.losses(ones, ones)


def _sorting(kernels: Kernels, device: str) -> None:
    if not kernels.experts:
        return
    from slipway.training.imports import import_less

    import_less(has_tokenizer=False)
    import torch
    from transformer_engine.pytorch import permutation
    from transformer_engine.pytorch.triton.permutation import make_row_id_map

    from slipway.training.experts import choose_blocks, let_sorting_compile

    let_sorting_compile()
    choose_blocks()
    # Compiled for the number of all tokens, the others for none.
    make_row_id_map(torch.zeros(kernels.tokens, kernels.experts, dtype=torch.bool, device=device),
                    kernels.tokens, kernels.experts)  # fmt: skip
    chosen = torch.zeros(ROWS, kernels.experts, dtype=torch.bool, device=device)
    chosen[:, : kernels.chosen] = True
    tokens = torch.zeros(ROWS, kernels.hidden, dtype=torch.bfloat16, device=device, requires_grad=not kernels.heads)
    shares = torch.zeros(*chosen.shape, dtype=_type_of_shares(kernels), device=device, requires_grad=not kernels.heads)
    rows, of_rows, places = permutation.moe_permute_with_probs(tokens, shares, chosen, ROWS * kernels.chosen)
    output = permutation.moe_unpermute(rows, places, restore_shape=tokens.shape, map_type="mask")
    if not kernels.heads:
        torch.autograd.backward([output, of_rows], [torch.zeros_like(output), torch.zeros_like(of_rows)])


def _type_of_shares(kernels: Kernels) -> Any:
    import torch

    return torch.float32 if kernels.float32_router else torch.bfloat16


def main() -> None:
    """The other process."""
    quiet()
    try:
        compile_all(Kernels(**json.loads(sys.argv[1])))
    except Exception as error:  # the first step compiles what is missing, and says what is wrong with it
        said = str(error).partition("\n")[0]
        tell(f"worker: kernels could not be compiled ahead, so the first step takes longer: {said}")


if __name__ == "__main__":
    main()
