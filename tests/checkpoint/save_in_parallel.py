"""Run under torchrun: load a NeMo checkpoint in a parallel layout and save it again, both by megatron-core's own code.

Usage: save_in_parallel.py SOURCE TARGET TENSOR PIPELINE EXPERT VIRTUAL
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from entrypoints.training import cpu
from entrypoints.training.worker import quiet


def main(source: Path, target: Path, tensor: int, pipeline: int, expert: int, virtual: int) -> None:
    quiet()
    cpu.enable()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from nemo.lightning.io import load_context

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = load_context(source / "context", subpath="model")
    config = model.config
    cpu.configure_model(config)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tensor, pipeline
    config.expert_model_parallel_size = expert
    config.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    stages = {"vp_stage": 0} if virtual > 1 else {}
    names = [f"model{stage}" for stage in range(virtual)] if virtual > 1 else ["model"]
    modules = {}
    for stage, name in enumerate(names):
        modules[name] = config.configure_model(tokenizer=None, **{key: stage for key in stages})

    def state() -> dict:
        return {name: module.sharded_state_dict(prefix="module.") for name, module in modules.items()}

    loaded = dist_checkpointing.load(state(), str(source / "weights"))
    for name, module in modules.items():
        module.load_state_dict({key.removeprefix("module."): value for key, value in loaded[name].items()})
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state(), str(target))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7]))
