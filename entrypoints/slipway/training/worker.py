"""One rank of a training run: builds NeMo's objects from the recipe and lets NeMo train.

torchrun starts it for every rank. If there is only one, it is called in the process of the command.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.checkpoint.nemo_context import has_tokenizer
from slipway.errors import PreflightError, SlipwayError
from slipway.launch.failure import leave_word
from slipway.launch.quiet import quiet
from slipway.report import say
from slipway.signals import heed_the_parent_alone
from slipway.training.patches import LIGHTNING, NEMO, replace, wrap
from slipway.training.precompile import compiling, know_compiler
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder
from slipway.training.troubles import explained
from slipway.untrusted import tell

if TYPE_CHECKING:
    from slipway.training.record import Record
    from slipway.training.throughput import Arithmetic


def run(recipe: Recipe, indices: Path, stop_file: Path, nodes: int, started: float, *, measured: bool = False) -> None:
    """Train from the newest checkpoint in the run's folder, else from the base.

    Args:
        recipe: what to compute.
        indices: folder with the indices of the data: train.npz, and eval.npz if there are evaluations.
        stop_file: training saves and stops soon after this file appears.
        nodes: number of nodes in the run.
        started: time.time() when the command began, for the time to the first step.
        measured: only the speed counts: weights stay random, nothing is saved, and the last step is profiled.

    Errors: PreflightError if memory runs out, WriteError if the disk is full.
    """
    try:
        with compiling(recipe):
            _train(recipe, indices, stop_file, nodes, started, measured)
    except Exception as error:
        if known := explained(error, recipe):
            raise known from None
        raise


def _train(recipe: Recipe, indices: Path, stop_file: Path, nodes: int, started: float, measured: bool) -> None:
    import_starts = time.monotonic()
    quiet()
    # NeMo's import creates millions of objects, and none of them is garbage. Looking for it takes a tenth of the time.
    gc.disable()
    import torch

    from slipway.training import preload
    from slipway.training.imports import import_less

    on_gpu = torch.cuda.is_available()
    libraries = preload.start() if on_gpu else None
    import_less(has_tokenizer(Path(recipe.model)))
    if not on_gpu:
        from slipway.training import cpu

        cpu.enable()
    import nemo.lightning as nl
    from nemo.collections.llm.api import finetune

    from slipway.training.changes import change_all
    from slipway.training.modes import MODES
    from slipway.training.record import Record

    gc.freeze()
    gc.enable()
    if libraries:
        know_compiler()
        libraries.join()
    change_all(recipe, on_gpu)
    if int(os.environ.get("RANK", 0)) == 0:
        say(f"worker: NeMo imported in {time.monotonic() - import_starts:.1f} s, {_where(on_gpu)}")

    MODES[recipe.mode].prepare()
    folder = RunFolder.of(recipe)
    # Asked only where it matters: it reads the lengths of all samples.
    even = recipe.expert_parallel_size > 1 and has_equal_lengths(recipe, indices)
    model = load_model(recipe, on_gpu, even)
    data = load_data(recipe, indices)
    record = Record(recipe, folder, arithmetic_of(recipe, model.config), data.samples, started)
    callbacks = _callbacks(recipe, record, stop_file, measured, draws(recipe, model.config))
    trainer = make_trainer(recipe, callbacks, nodes, on_gpu, measured)
    latest = folder.latest_checkpoint()
    finetune(
        model=model,
        data=data,
        trainer=trainer,
        log=make_logger(recipe, folder, measured),
        resume=nl.AutoResume(
            # The tokenizer came with the model: where NeMo looks for it on a resume without adapters there is none.
            restore_config=None if measured else nl.RestoreConfig(path=recipe.model, load_artifacts=False),
            resume_from_path=str(latest[1]) if latest else None,
        ),
        optim=make_optimizer(recipe, on_gpu),
        peft=MODES[recipe.mode].transform(recipe),
        tokenizer=None,  # the data are tokens already
    )
    # No rank ends before rank 0 has written the status, which the commands of all nodes read then.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _where(on_gpu: bool) -> str:
    if on_gpu:
        import torch

        return f"{torch.cuda.device_count()} GPUs ({torch.cuda.get_device_name()})"
    return "no GPU: running on the CPU with gloo, for small models only"


def _with_repairs(build: Callable[..., Any]) -> Callable[..., Any]:
    """Repair what NeMo builds, before Megatron wraps it."""
    from slipway.training.repairs import give_every_weight_a_value, keep_latent_epsilon, mark_experts

    return lambda *arguments, **options: mark_experts(
        keep_latent_epsilon(give_every_weight_a_value(build(*arguments, **options)))
    )


def load_model(recipe: Recipe, on_gpu: bool, equally_long: bool) -> Any:
    """NeMo's model from the checkpoint's context, configured for the mode and the machine. Its weights come later."""
    from slipway.training.activations import activate_in_one_kernel, add_without_compiler
    from slipway.training.context import model_of
    from slipway.training.dispatch import choose_dispatcher
    from slipway.training.modes import MODES
    from slipway.training.repairs import scale_auxiliary_loss
    from slipway.training.steps import TokenLoss, data_step

    model = model_of(Path(recipe.model))
    config = model.config
    config.seq_length = recipe.seq_length
    config.calculate_per_token_loss = True  # see TokenLoss
    scale_auxiliary_loss(config, recipe)
    wrap(config, "configure_model", _with_repairs, NEMO)
    if recipe.recompute == "full" and recipe.mode != "heads":
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    if recipe.is_frozen:  # a router's biases for balance are changed by counting, not by a gradient
        config.moe_router_bias_update_rate = 0.0
    config.data_step_fn = data_step
    config.forward_step_fn = MODES[recipe.mode].forward_step
    for name in ("_training_loss_reduction", "_validation_loss_reduction"):
        replace(model, name, TokenLoss(), NEMO)
    # Micro batches are as long as their longest sample, see steps.py; the stages tell each other.
    config.variable_seq_lengths = recipe.pipeline_parallel_size > 1 and not recipe.pack
    choose_dispatcher(config, recipe, equally_long)
    add_without_compiler(config)
    if on_gpu:
        activate_in_one_kernel(config)
        if isinstance(layers := config.transformer_layer_spec, functools.partial):  # DeepSeek's, maybe noted on a CPU
            config.transformer_layer_spec = functools.partial(layers, use_transformer_engine=True)
        config.moe_permute_fusion = bool(config.num_moe_experts)
        config.gradient_accumulation_fusion = not recipe.is_frozen and _adds_gradients_in_products()
    else:
        from slipway.training import cpu

        cpu.configure_model(config)
    return model


def _adds_gradients_in_products() -> bool:
    """Whether Apex is there, with which a product adds the gradient of a weight to Megatron's buffer itself."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def load_data(recipe: Recipe, indices: Path) -> Any:
    """NeMo's data module with the samples of the run, and those for evaluations."""
    from slipway.training.data import TokenData

    samples = _samples(recipe, recipe.data, indices, "train", recipe.steps)
    held_out = _samples(recipe, recipe.eval_data, indices, "eval", None) if recipe.eval_data else None
    return TokenData(samples, held_out, recipe.micro_batch_size, recipe.global_batch_size)


def has_equal_lengths(recipe: Recipe, indices: Path) -> bool:
    """Whether every micro batch of every rank computes as many positions: packed ones, or windows of texts."""
    import numpy as np

    from slipway.tokens.blend import parts_of
    from slipway.tokens.scan import Index
    from slipway.training.preflight import index_file
    from slipway.training.samples import computed_positions

    if recipe.pack:
        return True
    files = [index_file(indices, "train", number) for number in range(len(parts_of(recipe.data)))]
    files += [index_file(indices, "eval", 0)] if recipe.eval_data else []
    lengths = np.concatenate([Index.load(file).lengths for file in files])
    shares = recipe.tensor_parallel_size * recipe.shares_of_samples
    least, most = (
        computed_positions(int(one) - 1, recipe.seq_length, shares) for one in (lengths.min(), lengths.max())
    )
    return least == most


def _samples(recipe: Recipe, data: str, indices: Path, purpose: str, batches: int | None) -> Any:
    """`batches` global batches in random order; None is for an evaluation, in the order of the file."""
    from slipway.tokens.blend import parts_of
    from slipway.tokens.scan import Index, open_units
    from slipway.training.preflight import index_file
    from slipway.training.samples import Samples

    parts = parts_of(data)
    units = [
        open_units(part.path, Index.load(index_file(indices, purpose, number)), recipe.seq_length)
        for number, part in enumerate(parts)
    ]
    shuffled = batches is not None
    batches = batches or min(recipe.eval_batches, len(units[0]) // recipe.global_batch_size)
    return Samples(
        units,
        batches * recipe.global_batch_size,
        recipe.seq_length,
        recipe.seed,
        shares=[part.share for part in parts],
        packed=bool(recipe.pack),
        joined=recipe.micro_batch_size if recipe.pack else 1,
        multiple=recipe.shares_of_samples if recipe.pack else 1,
        learn_prompts=recipe.mode == "pretrain",
        shuffled=shuffled,
    )


def make_optimizer(recipe: Recipe, on_gpu: bool) -> Any:
    """Adam, with the recipe's learning rate of each step (schedule.py)."""
    import nemo.lightning as nl
    from megatron.core.optimizer import OptimizerConfig

    from slipway.training.schedule import Schedule

    config = OptimizerConfig(
        optimizer="adam",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        clip_grad=recipe.clip_grad,
        bf16=on_gpu,
        use_distributed_optimizer=on_gpu,
    )
    return nl.MegatronOptimizerModule(config=config, lr_scheduler=Schedule(recipe))


def arithmetic_of(recipe: Recipe, config: Any) -> Arithmetic:
    """The floating-point operations of this run's model, for the log."""
    from slipway.checkpoint.torch_dist import Reader
    from slipway.training.throughput import arithmetic

    return arithmetic(Reader(Path(recipe.model)).tensors, config)


def draws(recipe: Recipe, config: Any) -> bool:
    """Whether a step depends on random numbers: something is dropped or disturbed."""
    if recipe.mode == "heads":  # on a base in evaluation mode
        return False
    of_adapters = recipe.mode == "lora" and recipe.lora_dropout
    return bool(of_adapters or config.attention_dropout or config.hidden_dropout or config.moe_input_jitter_eps)


def _callbacks(recipe: Recipe, record: Record, stop_file: Path, measured: bool, draws: bool) -> list[Any]:
    from slipway.training.callbacks import Evaluations, Finite, FrozenBase, OwnDraws, StopOnRequest

    if measured:
        from slipway.training.profile import Profile

        return [Profile(recipe.steps, RunFolder.of(recipe).path), record]
    return [
        *([OwnDraws(recipe.seed)] if draws else []),
        StopOnRequest(stop_file, record),
        *([FrozenBase(record)] if recipe.is_frozen else []),
        record,
        *([Evaluations(recipe, record.folder)] if recipe.eval_data else []),  # the record has forgotten later ones
        Finite(recipe),  # the last: the record of a step is written before the run ends because of it
    ]


def make_trainer(recipe: Recipe, callbacks: list[Any], nodes: int, on_gpu: bool, measured: bool) -> Any:
    """NeMo's trainer with the run's parallel sizes and callbacks. torchrun's variables tell it its rank."""
    import nemo.lightning as nl
    import torch
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    from slipway.training.checkpoint_times import saying_loaded

    options = {
        "tensor_model_parallel_size": recipe.tensor_parallel_size,
        "pipeline_model_parallel_size": recipe.pipeline_parallel_size,
        "expert_model_parallel_size": recipe.expert_parallel_size,
        "expert_tensor_parallel_size": 1,  # else Megatron would split experts by the tensor parallel size
        "context_parallel_size": recipe.context_parallel_size,
        "num_layers_in_first_pipeline_stage": recipe.first_stage_layers or None,
        "num_layers_in_last_pipeline_stage": recipe.last_stage_layers or None,
        "sequence_parallel": recipe.tensor_parallel_size > 1,
        "pipeline_dtype": torch.bfloat16 if on_gpu else torch.float32,
        "save_ckpt_format": "torch_dist",
        "ckpt_async_save": False,  # else the command could end while a checkpoint is still being written
    }
    if not on_gpu:
        options["process_group_backend"] = "gloo"  # NCCL needs GPUs
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=nodes,
        max_steps=recipe.steps,
        strategy=nl.MegatronStrategy(**options),
        # Lightning would guess: it finds Slurm's variables, although torchrun has started this process.
        plugins=[TorchElasticEnvironment(), *([precision(recipe)] if on_gpu else [])],
        callbacks=callbacks,
        enable_checkpointing=not measured,  # else Lightning would bring a callback of its own
        **_evaluations(recipe),
        num_sanity_val_steps=0,  # no evaluation before the first step
        log_every_n_steps=1,
        use_distributed_sampler=False,  # TokenData has Megatron's
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    leave_signals_alone(trainer)
    wrap(trainer.strategy, "load_checkpoint", saying_loaded, NEMO)
    return trainer


def leave_signals_alone(trainer: Any) -> None:
    """Lightning would end the run at SIGTERM without a checkpoint; the launcher and StopOnRequest stop it instead."""
    replace(trainer._signal_connector, "register_signal_handlers", lambda: None, LIGHTNING)


def _evaluations(recipe: Recipe) -> dict[str, Any]:
    if not recipe.eval_data:
        return {"limit_val_batches": 0}
    # The interval counts steps, in whatever epoch. The limit is a share: a number would count micro batches. `_samples`
    # has already taken as many as the recipe says.
    return {"val_check_interval": recipe.eval_every, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}


def precision(recipe: Recipe) -> Any:
    """Weights in BF16 from the beginning (without params_dtype they are created in float32), gradients in float32.

    With FP8 the factors of large products are FP8, with a scale for each tensor; a frozen base is kept so.
    """
    import nemo.lightning as nl
    import torch

    in_fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param_gather": recipe.is_frozen}
    return nl.MegatronMixedPrecision(
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
        **(in_fp8 if recipe.precision == "fp8" else {}),
    )


def make_logger(recipe: Recipe, folder: RunFolder, measured: bool = False) -> Any:
    """NeMo's logger: TensorBoard, and checkpoints; none of these where only the speed counts."""
    import nemo.lightning as nl
    from lightning.pytorch.loggers import TensorBoardLogger

    from slipway.training.callbacks import Checkpoints

    logs = {
        "explicit_log_dir": str(folder.path / "logs"),
        "tensorboard": TensorBoardLogger(save_dir=str(folder.path), name="tensorboard", version=""),
        "update_logger_directory": False,
    }
    if measured:
        return nl.NeMoLogger(ckpt=None, **logs)
    from slipway.training.record import STEPS_DONE

    checkpoint = Checkpoints(
        recipe=recipe,
        dirpath=folder.checkpoints,
        filename=f"step={{{STEPS_DONE}:.0f}}",
        auto_insert_metric_name=False,
        monitor=STEPS_DONE,
        mode="max",
        verbose=False,
        save_top_k=-1,  # Checkpoints removes older ones itself
        save_last=False,
        every_n_train_steps=recipe.save_every,
        save_optim_on_train_end=True,
        save_on_train_epoch_end=False,
    )
    return nl.NeMoLogger(ckpt=checkpoint, wandb=_wandb(recipe, folder) if recipe.wandb_project else None, **logs)


def _wandb(recipe: Recipe, folder: RunFolder) -> Any:
    """The log for Weights & Biases; PreflightError where its server refuses.

    Its client prints what the server says. In this process that is made harmless (torchrun.run_here, torchrun.Screen);
    its helper writes to the terminal itself, so it is told to be silent.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from wandb.errors import term

    logger = WandbLogger(
        project=recipe.wandb_project,
        name=folder.path.name,
        save_dir=str(folder.path),
        config=vars(recipe),
        settings=wandb.Settings(silent=True),
    )
    try:
        run = logger.experiment
    except wandb.Error as error:
        said = " ".join(str(error).split())[:300]
        raise PreflightError(
            f"Weights & Biases: {said}; set WANDB_MODE=offline to keep the log in OUT, or leave out --wandb-project"
        ) from None
    if isinstance(run, wandb.Run):  # on the first rank
        term.termsetup(wandb.Settings(), None)  # what goes wrong later is shown
        tell(f"worker: the log for Weights & Biases is {run.settings.sync_dir if run.offline else run.url}")
    return logger


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--indices", type=Path, required=True)
    parser.add_argument("--stop-file", type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--measured", action="store_true")
    given = parser.parse_args()
    heed_the_parent_alone()
    try:
        recipe = Recipe.load(given.recipe)
        run(recipe, given.indices, given.stop_file, given.nodes, given.started, measured=given.measured)
    except SlipwayError as error:
        leave_word(given.stop_file.parent, int(os.environ["LOCAL_RANK"]), error)
        tell(f"slipway: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
