"""Training the heads on one GPU: ours, the published way, and the bare forward pass of the same model in one run.

python -m benchmarks.heads_training [--model RECIPE] [--seq-length 4096] [--layers N]

The published way keeps the frozen base in the autograd graph (a pipeline stage receives hidden states that want a
gradient) and computes the loss on whole [sequence, vocabulary] tensors in float32. Weights are random: time and memory
do not depend on them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from slipway.families import by_model_type
from slipway.training import recipes
from slipway.training.bench import config_for
from torch import Tensor

WARM_UP, TIMES = 3, 10


@dataclass
class Measured:
    name: str
    seconds: float
    peak_bytes: int


def build(model: str, seq_length: int, layers: int | None) -> Any:
    """Megatron's model of this shape in BF16 on the GPU, frozen, with the heads as `adapter`."""
    from slipway.training.imports import import_less

    import_less(has_tokenizer=False)  # as `train` does
    from megatron.core import parallel_state, tensor_parallel
    from slipway.training.heads_on_nemo import HeadsTransform

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", 0))
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = {**config_for(model, None, layers)[1], "max_position_embeddings": seq_length}
    _, target, fields = by_model_type()[config["model_type"]].nemo_model(config)
    module, name = target.split(":")
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    made = getattr(importlib.import_module(module), name)(**{**fields, **bf16, "seq_length": seq_length})
    gpt = made.configure_model(tokenizer=None).cuda().bfloat16().eval()
    gpt.requires_grad_(False)
    HeadsTransform(base="").transform(gpt)
    gpt.adapter.float()
    return gpt


def some_batch(seq_length: int, vocabulary: int) -> dict[str, Tensor]:
    """One sample of random tokens, all of them learned."""
    tokens = torch.randint(0, vocabulary, (1, seq_length + 1), device="cuda")
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(seq_length, device="cuda").unsqueeze(0),
        "is_real": torch.ones(1, seq_length, dtype=torch.bool, device="cuda"),
        "lengths": torch.tensor([seq_length], device="cuda"),
        "loss_mask": torch.ones(1, seq_length, device="cuda"),
        "drop_if_easy": torch.rand(1, seq_length, device="cuda") < 0.6,
    }


def bare(gpt: Any, batch: dict[str, Tensor]) -> None:
    """A forward pass to the logits."""
    with torch.no_grad():
        gpt(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)


def ours(gpt: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """A step as `slipway train --mode heads` takes it."""
    from slipway.training.heads_on_nemo import heads_step

    total, count = heads_step(gpt, batch)
    for parameter in gpt.adapter.parameters():
        parameter.grad /= count
    return _finish(total / count, optimizer)


def published(gpt: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """The same step with the base in the graph and the loss on whole tensors."""
    from slipway.training.heads import Rows, distribution_features

    hidden = []
    hooks = [
        gpt.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_()),
        gpt.output_layer.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0])),
    ]
    logits = gpt(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)[0]
    for hook in hooks:
        hook.remove()
    rows = Rows(logits, batch["labels"][0])
    outputs = gpt.adapter(hidden[0][:, 0].float(), lambda t: distribution_features(rows.logits, t))
    keep = ~(batch["drop_if_easy"][0] & rows.is_easy)
    loss = (rows.losses(*outputs) * keep).sum() / keep.sum()
    loss.backward()
    return _finish(loss, optimizer)


def _finish(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure(name: str, step: Callable[[], Any]) -> Measured:
    """Median seconds of TIMES steps, and the peak of what they held."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    found = Measured(name, statistics.median(times), torch.cuda.max_memory_allocated())
    torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama31_8b", choices=recipes.names())
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    options = parser.parse_args()
    gpt = build(options.model, options.seq_length, options.layers)
    batch = some_batch(options.seq_length, gpt.vocab_size)
    optimizer = torch.optim.Adam(gpt.adapter.parameters(), lr=0.0)
    losses = [step(gpt, batch, optimizer).item() for step in (ours, published)]
    weights = sum(part.numel() * part.element_size() for part in gpt.parameters())
    print(f"{options.model}, {options.seq_length} tokens, weights {weights / 1e9:.1f} GB, torch {torch.__version__}")
    print(f"loss: ours {losses[0]:.6f}, published {losses[1]:.6f}")
    found = [
        measure("bare forward pass", lambda: bare(gpt, batch)),
        measure("heads, ours", lambda: ours(gpt, batch, optimizer)),
        measure("heads, published", lambda: published(gpt, batch, optimizer)),
    ]
    print(f"{'':20}{'tokens/s':>10}{'of bare':>9}{'peak':>10}{'over weights':>14}")
    for one in found:
        rate = options.seq_length / one.seconds
        print(
            f"{one.name:20}{rate:10.0f}{found[0].seconds / one.seconds:9.2f}"
            f"{one.peak_bytes / 1e9:7.1f} GB{(one.peak_bytes - weights) / 1e9:11.1f} GB"
        )


if __name__ == "__main__":
    main()
