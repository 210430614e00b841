"""Load NeMo checkpoints in parallel layouts and save them as Megatron-LM does, by megatron-core's own code.

python save_by_megatron.py JOBS.json, a list of {"source": NEMO, "name": FOLDER beside JOBS.json, "port": N, "form":
classic or torch_dist, "apart": one key for each layer, and the parallel sizes "tensor", "pipeline", "expert",
"virtual"}; each rank of each job is a fork. FOLDER/logits.pt are those of the model that was saved.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import fork_ranks, import_nemo
from parallel_logits import parallel_logits
from slipway.training import cpu
from slipway.training.worker import quiet

# NeMo's names of fields → Megatron-LM's names of arguments, where they differ.
RENAMED = {"layernorm_epsilon": "norm_epsilon", "num_moe_experts": "num_experts", "gated_linear_unit": "swiglu"}
LEFT_OUT = ("vocab_size", "seq_length")  # Megatron-LM has padded_vocab_size, and max_position_embeddings


def arguments_of(config: object, sizes: dict[str, int]) -> Namespace:
    """What Megatron-LM's command line would have for this model."""
    plain = (int, float, str, bool, type(None), list)
    found = {
        RENAMED.get(name, name): value
        for name, value in vars(config).items()
        if isinstance(value, plain) and name not in LEFT_OUT and name[0] != "_"
    }
    found |= {
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "max_position_embeddings": config.seq_length,
        "seq_length": 16,
        "tensor_model_parallel_size": sizes["tensor"],
        "pipeline_model_parallel_size": sizes["pipeline"],
        "expert_model_parallel_size": sizes["expert"],
        "expert_tensor_parallel_size": 1,
        "attention_backend": torch.bfloat16,  # any object of torch's
        "window_size": config.window_size,
        "num_layers_per_virtual_pipeline_stage": (
            config.num_layers // sizes["pipeline"] // sizes["virtual"] if sizes["virtual"] > 1 else None
        ),
    }
    if scaling := getattr(config, "scale_factor", None):
        found |= {"use_rope_scaling": True, "rope_scaling_factor": scaling}
    return Namespace(**found)


def save(job: dict, target: Path) -> None:
    """One rank's part of a job."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from nemo.lightning.io import load_context

    sizes = {name: job[name] for name in ("tensor", "pipeline", "expert", "virtual")}
    source = Path(job["source"])
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tensor"],
        pipeline_model_parallel_size=sizes["pipeline"],
        expert_model_parallel_size=sizes["expert"],
        expert_tensor_parallel_size=1,
        virtual_pipeline_model_parallel_size=sizes["virtual"] if sizes["virtual"] > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = load_context(source / "context").model.config  # the whole context, as NeMo's exporters load it
    cpu.configure_model(config)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = sizes["tensor"], sizes["pipeline"]
    config.expert_model_parallel_size = sizes["expert"]
    config.virtual_pipeline_model_parallel_size = sizes["virtual"] if sizes["virtual"] > 1 else None
    config.microbatch_group_size_per_vp_stage = sizes["pipeline"]
    chunks = range(sizes["virtual"])
    names = [f"model{chunk}" for chunk in chunks] if sizes["virtual"] > 1 else ["model"]
    stages = [{"vp_stage": chunk} if sizes["virtual"] > 1 else {} for chunk in chunks]
    modules = {n: config.configure_model(tokenizer=None, **stage) for n, stage in zip(names, stages, strict=True)}
    wanted = {name: module.sharded_state_dict(prefix="module.") for name, module in modules.items()}
    loaded = dist_checkpointing.load(wanted, str(source / "weights"))
    for name, module in modules.items():
        module.to(torch.bfloat16)
        module.load_state_dict({key.removeprefix("module."): value for key, value in loaded[name].items()})
        for key, value in module.named_buffers():
            if key.endswith("expert_bias"):  # rounded by .to, which Megatron keeps in float32
                value.data = loaded[name][f"module.{key}"].float()
    args = arguments_of(config, sizes)
    if job["form"] == "classic":
        _save_classic(modules, args, sizes, target, parallel_state)
    else:
        _save_torch_dist(modules, args, job.get("apart", False), target, dist_checkpointing)
    logits = parallel_logits([module.float() for module in modules.values()])
    if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(logits, target / "logits.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _save_classic(modules: dict, args: Namespace, sizes: dict, target: Path, parallel_state: object) -> None:
    """megatron/training/checkpointing.py: get_checkpoint_name and generate_state_dict."""
    folder = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if sizes["pipeline"] > 1:
        folder += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if sizes["expert"] > 1:
        folder += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "rng_state": [torch.zeros(3)]}
    state |= {name: module.state_dict_for_save_checkpoint() for name, module in modules.items()}
    file = target / "iter_0000007" / folder / "model_optim_rng.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    (target / "latest_checkpointed_iteration.txt").write_text("7")


def _save_torch_dist(modules: dict, args: Namespace, apart: bool, target: Path, dist_checkpointing: object) -> None:
    metadata = {"non_homogeneous_layers": True} if apart else {}
    state = {name: module.sharded_state_dict(metadata=metadata) for name, module in modules.items()}
    folder = target / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (target / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    dist_checkpointing.save({**state, "args": args, "checkpoint_version": 3.0, "iteration": 7}, str(folder))


if __name__ == "__main__":
    quiet()
    import_nemo()
    jobs = Path(sys.argv[1])
    for job in json.loads(jobs.read_text()):
        folder = jobs.parent / job["name"]
        folder.mkdir()
        ranks = max(job["tensor"] * job["pipeline"], job["expert"] * job["pipeline"])
        fork_ranks(ranks, job["port"], folder, lambda job=job, folder=folder: save(job, folder))
