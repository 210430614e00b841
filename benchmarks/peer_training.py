"""What transformers and peft make of the same model, mode and lengths as `slipway bench`, on the same GPU.

python -m benchmarks.peer_training RECIPE [--mode lora|sft] [--layers N] [--lengths full|chat] [--micro-batch-size N]
    [--targets all|attention] [--liger]

Weights and tokens are random. Experts use torch's grouped product, the quickest that transformers 5 has. With --lengths
chat the samples of a micro batch are padded to the longest of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from slipway.training import recipes
from slipway.training.bench import chat_lengths, config_for

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
WARM_UP = 2


def build(options: argparse.Namespace) -> tuple[Any, int]:
    """(the model in BF16 on the GPU with its adapters, size of its vocabulary)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**config_for(options.recipe, None, options.layers)[1], "max_position_embeddings": options.seq_length}
    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)
    described = AutoConfig.for_model(**{**config, "use_cache": False})
    attention = "eager" if config["model_type"] == "gpt_oss" else "sdpa"
    experts = {"experts_implementation": "grouped_mm"} if "num_experts_per_tok" in config else {}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            described, dtype=torch.bfloat16, attn_implementation=attention, **experts
        )
    model.train()
    if options.mode == "lora":
        from peft import LoraConfig, get_peft_model

        wanted = ATTENTION + (FEED_FORWARD if options.targets == "all" else ())
        there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        lora = LoraConfig(r=32, lora_alpha=32, target_modules=[name for name in wanted if name in there])
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model, config["vocab_size"]


def batches(options: argparse.Namespace, vocabulary: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, labels) of each micro batch of a step; labels are -100 where there is padding."""
    count, longest = options.global_batch_size, options.seq_length - 1
    sizes = chat_lengths(count, longest, step) if options.lengths == "chat" else np.full(count, longest)
    found = []
    for part in np.split(sizes, options.global_batch_size // options.micro_batch_size):
        tokens = torch.randint(5, vocabulary, (len(part), int(part.max())), device="cuda")
        labels = tokens.clone()
        for row, size in zip(labels, part, strict=True):
            row[size:] = -100
        found.append((tokens, labels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=recipes.names())
    parser.add_argument("--mode", default="lora", choices=["lora", "sft"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lengths", default="full", choices=["full", "chat"])
    parser.add_argument("--targets", default="all", choices=["all", "attention"])
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--liger", action="store_true")
    options = parser.parse_args()
    import transformers

    model, vocabulary = build(options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    rates = []
    for step in range(options.steps + WARM_UP):
        parts = batches(options, vocabulary, step)
        torch.cuda.synchronize()
        started = time.monotonic()
        for tokens, labels in parts:
            (model(input_ids=tokens, labels=labels).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        rates.append(sum(int((labels >= 0).sum()) for _, labels in parts) / (time.monotonic() - started))
    print(
        f"transformers {transformers.__version__}{' with Liger' if options.liger else ''}, {options.recipe}"
        f"{f' with {options.layers} layers' if options.layers else ''}, {options.mode}, {options.targets}, "
        f"{options.lengths} lengths, micro batch {options.micro_batch_size}: "
        f"{statistics.median(rates[WARM_UP:]):,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
        f"{sum(map(torch.Tensor.numel, trained)) / 1e6:.1f} million weights trained"
    )


if __name__ == "__main__":
    main()
