"""Attach adapters by NeMo's own classes on two tensor parallel ranks, compute logits, and save them with megatron-core.

python adapters_in_parallel.py BASE JOBS.json, a list of {"name": FOLDER beside JOBS.json, "port": N, "method": NeMo's
class, "targets": [names], "options": {...}}. BASE is a NeMo checkpoint; the logits and their tokens go to
FOLDER/logits.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import fork_ranks, import_nemo
from slipway.training import cpu
from slipway.training.worker import quiet

RANKS = 2


def save(source: Path, target: Path, method: str, targets: list[str], options: dict[str, Any]) -> None:
    """One rank's part of a job."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from nemo.collections.llm import peft
    from nemo.collections.llm.fn.base import walk
    from nemo.lightning.io import load_context

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = load_context(source / "context", subpath="model").config
    cpu.configure_model(config)
    config.tensor_model_parallel_size = RANKS
    module = config.configure_model(tokenizer=None).eval()
    loaded = dist_checkpointing.load(module.sharded_state_dict(prefix="module."), str(source / "weights"))
    mine = {key.removeprefix("module."): value for key, value in loaded.items() if key.startswith("module.")}
    module.load_state_dict(mine)
    module = walk(module.float(), getattr(peft, method)(targets, **options).transform).eval()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for name, parameter in module.named_parameters():
        if name.endswith("magnitude"):
            parameter.data *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
        elif ".adapter." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    tokens = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        part = module(input_ids=tokens, position_ids=positions, attention_mask=None).float()
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(part)
    if torch.distributed.get_rank() == 0:
        (target / "weights").mkdir(parents=True)
        torch.save((tokens, logits), target / "logits.pt")
    torch.distributed.barrier()
    state = {k: v for k, v in module.sharded_state_dict(prefix="module.").items() if ".adapter." in k}
    dist_checkpointing.save(state, str(target / "weights"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    quiet()
    import_nemo()
    source, jobs = map(Path, sys.argv[1:])
    for job in json.loads(jobs.read_text()):
        folder, port = jobs.parent / job.pop("name"), job.pop("port")
        folder.mkdir()
        work = lambda job=job, folder=folder: save(source, folder, **job)  # noqa: E731
        end = fork_ranks(RANKS, port, folder, work)
        print(folder.name, end, (folder / "rank0.log").read_text() if end != "done" else "", flush=True)
