"""Load a NeMo checkpoint in parallel layouts and save it again, both by megatron-core's own code.

python save_in_parallel.py SOURCE JOBS.json, a list of {"name": FOLDER beside JOBS.json, "port": N, and the parallel
sizes "tensor", "pipeline", "expert", "virtual"}; each rank of each job is a fork.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import fork_ranks, import_nemo
from slipway.training import cpu
from slipway.training.worker import quiet


def save(source: Path, target: Path, tensor: int, pipeline: int, expert: int, virtual: int) -> None:
    """One rank's part of a job."""
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
    quiet()
    import_nemo()
    source, jobs = map(Path, sys.argv[1:])
    for job in json.loads(jobs.read_text()):
        folder, port = jobs.parent / job.pop("name"), job.pop("port")
        folder.mkdir()
        ranks = max(job["tensor"] * job["pipeline"], job["expert"])
        work = lambda job=job, target=folder / "weights": save(source, target, **job)  # noqa: E731
        fork_ranks(ranks, port, folder, work)  # a safety net: it takes seconds
