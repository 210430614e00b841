"""Checkpoints that NeMo makes in parallel layouts, with its model, its strategy, its checkpoints and its context.

python save_by_nemo.py JOBS.json, a list of {"kind": of conftest.KINDS, "changes": of its config.json, "name": FOLDER
beside JOBS.json, "port": N, and the sizes "tensor", "pipeline", "expert"}; each rank of each job is a fork.
FOLDER.logits.pt are the model's. Or of {"import": llama or qwen2, "source": a model of Hugging Face, "name": FOLDER,
"port": N}: NeMo's own importer makes FOLDER of it, and its exporter FOLDER.hf of that.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import nemo_on_cpu
from conftest import config_of
from forked import fork_ranks, import_nemo
from parallel_logits import parallel_logits
from slipway.families import understood
from slipway.families.decoder import Symbol
from slipway.training import cpu
from slipway.training.repairs import keep_latent_epsilon
from slipway.training.worker import quiet


def found(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def model_of(kind: str, changes: dict[str, Any]) -> Any:
    """NeMo's model of a kind, as a program of NeMo's user makes it."""
    family, config = understood(config_of(kind, **changes), Path(kind))
    model, config_class, fields = family.nemo_model(config)
    fields = {name: found(value.target) if isinstance(value, Symbol) else value for name, value in fields.items()}
    made = found(config_class)(**fields, init_method_std=0.1)
    cpu.configure_model(made)
    return found(model)(made)


def shake(module: torch.nn.Module) -> None:
    """Give all vectors values of their own: norms and biases begin with 1 and 0, which hides mistakes, and Megatron
    leaves some with whatever was in the memory."""
    buffers = [(name, value) for name, value in module.named_buffers() if name.endswith("expert_bias")]
    for name, value in [*module.named_parameters(), *buffers]:
        if value.dim() == 1:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            noise = 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            # To an expert of a group that is not chosen transformers gives the score 0: more than a negative one has.
            value.data[:] = noise.abs() if name.endswith("expert_bias") else noise + ("norm" in name)


def save(job: dict[str, Any], target: Path) -> None:
    """One rank's part of a job."""
    from lightning.pytorch.trainer.states import TrainerFn
    from megatron.core import parallel_state
    from nemo.lightning import MegatronStrategy, Trainer
    from nemo.lightning.io.connector import ModelConnector

    model = model_of(job["kind"], job["changes"])
    strategy = MegatronStrategy(
        tensor_model_parallel_size=job["tensor"],
        pipeline_model_parallel_size=job["pipeline"],
        expert_model_parallel_size=job["expert"],
        expert_tensor_parallel_size=1,
        ckpt_save_optimizer=False,
        ckpt_async_save=False,
        always_save_context=True,
        pipeline_dtype=torch.float32,
        sequence_parallel=job["tensor"] > 1 and job["expert"] > 1,  # Megatron insists on it
    )
    strategy._process_group_backend = "gloo"
    trainer = Trainer(devices=ranks_of(job), accelerator="cpu", strategy=strategy)
    trainer.state.fn = TrainerFn.FITTING
    strategy.connect(model)
    strategy.setup_environment()
    model.configure_model()
    shake(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    ModelConnector().nemo_save(target, trainer)
    module = model.module
    while not hasattr(module, "decoder"):
        module = module.module
    logits = parallel_logits([keep_latent_epsilon(module.float())])
    ranks = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank())
    if logits is not None and ranks == (0, 0):  # of the other groups NeMo does not save what all have
        torch.save(logits, f"{target}.logits.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def convert(job: dict[str, Any], target: Path) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None  # NeMo saves by another process, which Slipway's runs need not
    nemo_on_cpu.enable()
    nemo_on_cpu.import_model(job["import"], job["source"], str(target))


def convert_back(job: dict[str, Any], target: Path) -> None:
    nemo_on_cpu.enable()
    nemo_on_cpu.export_model(job["import"], str(target), f"{target}.hf")


def ranks_of(job: dict[str, Any]) -> int:
    return max(job["tensor"], job["expert"]) * job["pipeline"]


if __name__ == "__main__":
    quiet()
    import_nemo()
    jobs = Path(sys.argv[1])
    for job in json.loads(jobs.read_text()):
        logs = jobs.parent / f"{job['name']}.logs"
        logs.mkdir()
        target = jobs.parent / job["name"]
        if "import" not in job:
            fork_ranks(ranks_of(job), job["port"], logs, lambda job=job, target=target: save(job, target))
            continue
        for work in (convert, convert_back):
            if fork_ranks(1, job["port"], logs, lambda job=job, target=target, work=work: work(job, target)) != "done":
                break
