"""What megatron-core, NeMo and Lightning do wrongly in one process, and how it is repaired.

Each test shows both. If the part about upstream fails, upstream has repaired it: delete the repair. What goes wrong in
parallel, or ends a run, is in test_parallel.py.
"""

from __future__ import annotations

import inspect
import multiprocessing
import queue
import signal
import subprocess
import sys
from multiprocessing.managers import BaseProxy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, make_model
from slipway.checkpoint.torch_dist import PREFIX
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.training import patches


class _Made(Exception):
    """A model is made, and its weights are not loaded yet."""


def _stop() -> None:
    raise _Made


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    from slipway.training import cpu

    cpu.enable()


def test_routers_keep_their_biases_in_float32(tmp_path):
    """As Megatron turns a model into BF16 once NeMo has loaded it."""
    from slipway.training import forward
    from slipway.training.repairs import keep_routers_counts

    import_checkpoint(str(make_model(tmp_path / "hf", "deepseek_v3")), str(tmp_path / "nemo"))

    def are_rounded() -> set[bool]:
        module = forward.load(tmp_path / "nemo")
        before = {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("expert_bias")}
        module.bfloat16()
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
        after = dict(module.named_buffers())
        return {not torch.equal(after[name].float(), bias) for name, bias in before.items()}

    assert are_rounded() == {True}, "upstream"
    keep_routers_counts()
    assert are_rounded() == {False}


@pytest.mark.parametrize("kind", ["llama31", "gpt_oss", "qwen3_moe"])
def test_a_loaded_weight_lies_where_the_model_has_it(tmp_path, monkeypatch, kind):
    """Else a model takes half of its memory more while it is loaded."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import experts
    from slipway.training import forward, repairs

    import_checkpoint(str(make_model(tmp_path / "hf", kind)), str(tmp_path / "nemo"))
    read = dist_checkpointing.load
    kept = {}

    def keeping(*arguments):
        kept["loaded"] = read(*arguments)
        return dict(kept["loaded"])

    monkeypatch.setattr(dist_checkpointing, "load", keeping)

    def elsewhere() -> set[str]:
        weights = dict(forward.load(tmp_path / "nemo").named_parameters())
        loaded = {key.removeprefix(PREFIX): value for key, value in kept["loaded"].items()}
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
        return {name for name, weight in weights.items() if loaded[name].data_ptr() != weight.data_ptr()}

    repairs.join_in_place()
    with monkeypatch.context() as upstream:
        for module in (mlp, experts):
            name = "apply_swiglu_sharded_factory"
            upstream.setattr(module, name, patches.APPLIED[patches.full_name(module, name)].before)
        upstream.setattr(repairs, "join_in_place", lambda: None)
        assert any("linear_fc1" in name for name in elsewhere()), "upstream"
    assert elsewhere() == set()


def cut(*sizes: int) -> list[torch.Tensor]:
    return [*torch.arange(sum(sizes) * 3.0).view(-1, 3).split(sizes)]


@pytest.mark.parametrize(
    ("parts", "in_place"),
    [
        (cut(2, 2), True),
        (cut(4, 1, 2), True),
        (cut(4), True),
        (cut(2, 2)[::-1], False),
        (cut(1, 1, 1)[::2], False),
        ([part.clone() for part in cut(2, 2)], False),
        ([part[:, :2] for part in cut(2, 2)], False),
        ([cut(2)[0], cut(2)[0].double()], False),
    ],
)
def test_parts_are_joined_without_a_copy_only_where_they_follow_each_other(parts, in_place):
    from slipway.training.repairs import joined

    found = joined(parts, torch.cat)
    assert torch.equal(found, torch.cat(parts))
    assert (found.data_ptr() == parts[0].data_ptr()) == in_place


def test_parts_of_another_class_are_left_to_megatron():
    from slipway.training.repairs import joined

    parts = [part.as_subclass(torch.nn.Buffer) for part in cut(2, 2)]
    assert joined(parts, lambda given: [id(one) for one in given]) == [id(one) for one in parts]
    assert joined({"one": 1}, lambda given: given) == {"one": 1}


def test_norms_in_latent_attention_have_an_epsilon_of_their_own(tmp_path, monkeypatch):
    from slipway.families.decoder import LATENT_EPSILON
    from slipway.training import forward, repairs

    import_checkpoint(str(make_model(tmp_path / "hf", "moonlight", quantized=False)), str(tmp_path / "nemo"))

    def epsilons() -> set[float]:
        modules = forward.load(tmp_path / "nemo").named_modules()
        return {module.eps for name, module in modules if name.endswith(("q_layernorm", "kv_layernorm"))}

    assert epsilons() == {LATENT_EPSILON}
    monkeypatch.setattr(repairs, "keep_latent_epsilon", lambda module: module)
    assert epsilons() == {1e-5}, "upstream"


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_begins_with_a_value_whatever_the_memory_was(tmp_path, monkeypatch, kind):
    from slipway.training import forward, repairs

    import_checkpoint(str(make_model(tmp_path / "hf", kind)), str(tmp_path / "nemo"))
    as_made = []
    monkeypatch.setattr(repairs, "keep_latent_epsilon", lambda module: as_made.append(module) or _stop())
    torch.use_deterministic_algorithms(True)  # with this torch fills what torch.empty gives with NaN
    try:
        with pytest.raises(_Made):
            forward.load(tmp_path / "nemo")
    finally:
        torch.use_deterministic_algorithms(False)

    def without_value() -> set[str]:
        return {name.split(".")[-2] for name, value in as_made[0].named_parameters() if value.isnan().any()}

    assert without_value() == ({"router", "core_attention"} if KINDS[kind][0] == "gpt_oss" else set()), "upstream"
    repairs.give_every_weight_a_value(as_made[0])
    assert without_value() == set()


def test_sinks_of_transformer_engine_begin_at_zero():
    from slipway.training.repairs import give_every_weight_a_value

    attention = torch.nn.Module()  # Transformer Engine's, which is made on a GPU
    attention.softmax_offset = torch.nn.Parameter(torch.full((4,), torch.nan))
    plain = torch.nn.Module()
    plain.softmax_offset = None
    assert give_every_weight_a_value(torch.nn.ModuleList([attention, plain])) is not None
    assert attention.softmax_offset.tolist() == [0, 0, 0, 0] and plain.softmax_offset is None


def test_a_logged_number_is_moved_only_to_another_device(monkeypatch):
    from lightning.pytorch.trainer.connectors.logger_connector import result
    from slipway.training.repairs import leave_metrics_in_place

    moved = []
    move = result.move_data_to_device
    monkeypatch.setattr(result, "move_data_to_device", lambda *given: moved.append(given) or move(*given))
    metric = result._ResultMetric(result._Metadata("f", "loss", on_step=True, on_epoch=False), is_tensor=True)
    metric.to(torch.device("cpu"))
    assert moved, "upstream"
    moved.clear()
    leave_metrics_in_place()
    assert metric.to(torch.device("cpu")) is metric and not moved
    assert metric.to(torch.device("meta")) is metric and moved and metric.value.device.type == "meta"


def test_packed_samples_with_yarn_have_the_angles_of_all_positions():
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from slipway.training.repairs import turn_packed_positions

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    plain = RotaryEmbedding(8, 1.0, cp_group=group)
    angles = YarnRotaryEmbedding(8, original_max_position_embeddings=4096, cp_group=group)
    source = inspect.getsource(GPTModel._preprocess)
    assert "self.rotary_pos_emb(rotary_seq_len)" in source, "upstream asks YaRN without saying what is packed"
    assert len(plain(16, packed_seq=True)) == 16 and len(angles(16)[0]) == 8, "upstream"
    turn_packed_positions()
    assert len(angles(16)[0]) == 16
    alone = YarnRotaryEmbedding(8, original_max_position_embeddings=4096)
    assert torch.equal(angles(16)[0], alone(16)[0])


def test_weights_stay_where_they_are_when_a_run_ends():
    from lightning.pytorch import LightningModule
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from slipway.training.repairs import leave_weights_in_place

    def ended(module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        strategy = SingleDeviceStrategy("cpu", accelerator=CPUAccelerator())
        strategy.connect(module)
        strategy.optimizers = [optimizer]
        strategy.teardown()

    module = LightningModule()
    module.weight = torch.nn.Parameter(torch.ones(2, device="meta"))  # cannot be copied to another device
    plain = torch.optim.SGD(module.parameters(), lr=1)
    adam = torch.optim.Adam(module.parameters())
    adam.state[module.weight]["exp_avg"] = torch.ones(2, device="meta")
    # Upstream copies both, which torch says of such a weight that it cannot.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        ended(module, plain)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        ended(LightningModule(), adam)
    leave_weights_in_place()
    ended(module, plain)
    ended(module, adam)
    assert module.weight.is_meta and adam.state[module.weight]["exp_avg"].is_meta


def test_results_of_a_save_need_no_other_process(monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from slipway.training.repairs import hand_over_in_this_process

    monkeypatch.setattr(filesystem_async, "_results_queue", None)  # as it is before the first save
    before = multiprocessing.active_children()
    assert isinstance(filesystem_async._get_write_results_queue(), BaseProxy), "upstream"
    assert len(multiprocessing.active_children()) == len(before) + 1, "upstream"
    hand_over_in_this_process()
    assert isinstance(filesystem_async._get_write_results_queue(), queue.SimpleQueue)


def test_a_window_hides_what_a_mask_hides_too():
    """The mask of packed samples, where no token sees one of another sample."""
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.utils import attention_mask_func

    softmax = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, False, attention_mask_func, True, None, (2, 0))
    apart = torch.ones(6, 6, dtype=torch.bool).tril()
    apart[3:, :3] = False
    scores = torch.zeros(1, 1, 6, 6)

    def weights(of) -> list[float]:
        return of(softmax, scores.clone(), ~apart[None, None])[0, 0, 3].tolist()

    upstream = patches.APPLIED["megatron.core.fusions.fused_softmax.FusedScaleMaskSoftmax.forward_torch_softmax"].before
    assert weights(upstream) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 0]), "upstream"
    assert weights(FusedScaleMaskSoftmax.forward_torch_softmax) == pytest.approx([0, 0, 0, 1, 0, 0])


LESS = """
import sys
from pathlib import Path
from slipway.training import cpu
from slipway.training.imports import import_less
import_less()
cpu.enable()
from megatron.core import msc_utils
from nemo.collections import llm
assert "import multistorageclient" in Path(msc_utils.__file__).read_text(), "upstream"
assert not msc_utils.MultiStorageClientFeature.is_enabled()
assert "wandb.sdk" not in sys.modules and "jsonschema" not in sys.modules
import wandb
assert wandb.Settings and "wandb.sdk" in sys.modules
"""


def test_what_no_run_uses_is_not_imported_and_what_few_use_when_they_do():
    """The client for object stores, through which Megatron would open every file, and that of Weights & Biases."""
    done = subprocess.run([sys.executable, "-c", LESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_compiled_when_megatron_is_imported():
    """Its allocator for inference takes a quarter of a minute, where there is a compiler."""
    from megatron.core.inference import unified_memory
    from torch.utils import cpp_extension

    assert "load_inline(" in Path(unified_memory.__file__).read_text() and not unified_memory.has_unified_memory
    with pytest.raises(RuntimeError, match="needs no CUDA extension"):
        cpp_extension.load_inline(name="x", cpp_sources=[""])


def test_the_states_of_random_numbers_are_set():
    """Megatron leaves that to CUDA, which is never initialised here: the state of dropout would never be another."""
    patch = patches.APPLIED["megatron.core.tensor_parallel.random._set_cuda_rng_state"]
    state = torch.Generator().manual_seed(5).get_state()
    before = torch.get_rng_state()
    patch.before(state)
    assert torch.equal(torch.get_rng_state(), before), "upstream"
    patch.after(state)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_lightning_leaves_the_signals_alone(tmp_path):
    import lightning.pytorch as pl
    from slipway.training.worker import leave_signals_alone

    def handled(trainer: pl.Trainer) -> bool:
        trainer._signal_connector.register_signal_handlers()
        found = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return found is not signal.SIG_DFL

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert handled(trainer), "upstream"
    leave_signals_alone(trainer)
    assert not handled(trainer)


def test_weights_in_fp8_are_built_without_copies():
    """As Megatron asks for it: it looks whether Transformer Engine knows the parameter."""
    from slipway.training import repairs

    def fp8_model_init(enabled: bool = True, recipe: object = None, preserve_high_precision_init_val: bool = False):
        return enabled, recipe, preserve_high_precision_init_val

    changed = repairs._without_copies(fp8_model_init)
    assert "preserve_high_precision_init_val" in inspect.signature(changed).parameters
    assert changed(enabled=True, recipe="r", preserve_high_precision_init_val=True) == (True, "r", False)
