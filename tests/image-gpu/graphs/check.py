"""Layers with adapters as CUDA graphs beside the same without, outputs and gradients. Ends with 1 if one differs."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from beside_torch import Both, run, with_gradients
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from nemo.collections.llm.fn.base import walk
from nemo.collections.llm.peft import LoRA
from slipway.training import graphs
from slipway.training.activations import bring_activations
from slipway.training.adapted_activation import activate_between_adapters
from slipway.training.experts import group_products
from slipway.training.low_rank import add_in_place
from slipway.training.padding import ignore_padding
from slipway.training.parting import part_in_one_kernel
from slipway.training.quantised import quantise_once
from slipway.training.rotary import turn_in_one_kernel
from slipway.training.sinks import attend_with_sinks
from slipway.training.steps import hidden_states
from torch.nn import functional

BOUND = 2e-3  # attention's backward pass adds up in another order each time
TOKENS, VOCABULARY = 512, 1000
PACKED = [[0, 100, 130, 400, TOKENS], [0, 1, 300, TOKENS]]
DENSE: dict[str, Any] = {"ffn_hidden_size": 1024}
EXPERTS = {
    **DENSE,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 256,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
}
SHARED = {**EXPERTS, "moe_shared_expert_intermediate_size": 384}
FP8 = {**DENSE, "fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}
Kind = type[graphs.Pair | graphs.Parts]
SINKS = {**DENSE, "softmax_type": "learnable"}


def model(options: dict[str, Any]) -> GPTModel:
    """A small model of which only adapters are trained."""
    config = TransformerConfig(
        num_layers=3,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        **options,
    )
    config.seq_length = TOKENS
    layers = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, config.moe_grouped_gemm)
    gpt = GPTModel(config, layers, VOCABULARY, TOKENS, position_embedding_type="rope").cuda().bfloat16()
    for weight in gpt.parameters():
        weight.requires_grad_(False)
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    walk(gpt, LoRA(target_modules=targets, dim=16, alpha=32, dropout=0.0).transform)
    gpt.cuda()
    for weight in gpt.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.02)
    return gpt.train()


def batch(bounds: list[int] | None) -> graphs.Batch:
    place = torch.arange(TOKENS, device="cuda")[None]
    return {
        "tokens": torch.randint(VOCABULARY, (1, TOKENS), device="cuda"),
        "position_ids": place,
        "cu_seqlens": None if bounds is None else torch.tensor([bounds], dtype=torch.int32, device="cuda"),
        "is_real": place < TOKENS - 40,
        "lengths": torch.tensor([TOKENS - 40], device="cuda"),
    }


def beside_no_graph(kind: Kind, options: dict[str, Any], packed: bool) -> Both:
    """Of the last of several micro batches, which is not the one that was recorded."""
    gpt = model(options)
    run_ = functools.partial(hidden_states, gpt)
    weights = [weight for weight in gpt.parameters() if weight.requires_grad]
    pairs = graphs.Pairs(kind)
    for number in range(6):
        last = batch(PACKED[number % 2] if packed else None)
        found = with_gradients(pairs(gpt, run_, last), *weights)
    assert pairs._pair is not None, "no graph was recorded"
    # Copies: the next pass would write over them.
    return [one.clone() for one in found], with_gradients(run_(last, None), *weights)


def all_trained(kind: Kind, options: dict[str, Any]) -> Both:
    """With all weights, whose experts add their gradients to Megatron's buffers: here one for each layer of them."""
    gpt = model(options)
    run_, pairs, found = functools.partial(hidden_states, gpt), graphs.Pairs(kind), []
    weights = [weight.requires_grad_() for weight in gpt.parameters() if weight.is_floating_point()]
    buffers = [buffer_of(part) for part in gpt.modules() if isinstance(part, TEGroupedLinear)]
    batches = [batch(PACKED[number % 2]) for number in range(6)]
    for pass_ in (pairs, lambda gpt, run, given: run(given, None)):
        for number, given in enumerate(batches):
            if number in (0, len(batches) - 1):  # the last one alone counts
                for buffer in buffers:
                    buffer.zero_()
            output = pass_(gpt, run_, given)
            gradients = torch.autograd.grad(output.float().square().sum(), weights, allow_unused=True)
        found.append([one.clone() for one in (output, *gradients, *buffers) if one is not None])
    assert pairs._pair is not None, "no graph was recorded"
    assert all(buffer.any() for buffer in buffers), "no gradient is in a buffer"
    return found[0], found[1]


def buffer_of(layer: TEGroupedLinear) -> torch.Tensor:
    weights = [layer.get_parameter(f"weight{number}") for number in range(layer.num_gemms)]
    buffer = torch.zeros(len(weights), *weights[0].shape, device="cuda")
    for weight, part in zip(weights, buffer, strict=True):
        weight.main_grad, weight.grad_added_to_main_grad = part, False
    return buffer


def twice_without(options: dict[str, Any], packed: bool) -> Both:
    """How far two passes without graphs are apart."""
    gpt, last = model(options), batch(PACKED[0] if packed else None)
    weights = [weight for weight in gpt.parameters() if weight.requires_grad]
    first, second = (with_gradients(hidden_states(gpt, last), *weights) for _ in range(2))
    return first, second


def prepare() -> None:
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    init_num_microbatches_calculator(0, None, 2, 1, 1)
    for change in (
        group_products,
        turn_in_one_kernel,
        part_in_one_kernel,
        bring_activations,
        add_in_place,
        activate_between_adapters,
        ignore_padding,
        attend_with_sinks,
        quantise_once,
    ):
        change()


CASES = [("dense", DENSE), ("experts", EXPERTS), ("dense, fp8", FP8), ("sinks", SINKS)]
WAYS = [
    (", twice without", twice_without, CASES),
    ("", functools.partial(beside_no_graph, graphs.Pair), CASES),
    (
        ", up to the experts",
        functools.partial(beside_no_graph, graphs.Parts),
        [("experts", EXPERTS), ("shared", SHARED)],
    ),
]
CHECKS = [
    (f"{name}, {'packed' if packed else 'one sample'}{said}", functools.partial(check, options, packed), 0, BOUND)
    for said, check, cases in WAYS
    for name, options in cases
    for packed in (False, True)
]
CHECKS += [
    (f"experts, all trained{said}", functools.partial(all_trained, kind, EXPERTS), 0, BOUND)
    for said, kind in (("", graphs.Pair), (", up to the experts", graphs.Parts))
]


if __name__ == "__main__":
    prepare()
    sys.exit(run(CHECKS))
