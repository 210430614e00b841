"""A run that was stopped goes on as if nobody had stopped it: every mode, alone and in parallel.

It goes on with more processes or fewer too, with another micro batch of packed samples, and for more steps than it was
begun with.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest
from conftest import free_port, make_model
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.tokens.scan import scan
from slipway.training.recipe import Recipe
from slipway.training.run_folder import RunFolder
from test_parallel import LAYOUTS, write_data

STEPS, SEQ_LENGTH = 5, 32
MODES = ("heads", "lora", "sft", "pretrain")
# Layout → the kind of model that is trained in it.
KINDS = {"one": "llama31", "latent": "deepseek_v3", "sinks": "gpt_oss"}
KINDS |= {"dp2": "llama31", "tp2": "llama31", "ep2": "qwen3_moe"}
PACKED = {"packed": {"pack": True}, "packed_in_twos": {"pack": True, "micro_batch_size": 2}}
KINDS |= dict.fromkeys(PACKED, "llama31")
ALONE = ("one", "latent", "sinks", *PACKED)
EVERY = list(itertools.product(MODES, KINDS))
# Only adapters drop anything; those of DoRA drop twice.
DROPS = {"lora_dropout": 0.1}
DROPPED = {"dropout": DROPS, "dora_dropout": {**DROPS, "dora": True}, "dropout_dp2": DROPS, "dropout_tp2": DROPS}
KINDS |= dict.fromkeys(DROPPED, "llama31")
ALONE += ("dropout", "dora_dropout")
EVERY += [("lora", layout) for layout in DROPPED]
# Here every mode alone and in one layout.
IN_CI = [*((mode, "one") for mode in MODES), ("heads", "dp2"), ("lora", "tp2"), ("sft", "ep2"), ("pretrain", "dp2")]
IN_CI += [("sft", "latent"), ("lora", "sinks"), ("sft", "packed"), ("lora", "packed_in_twos")]
IN_CI += [("lora", "dropout"), ("lora", "dora_dropout"), ("lora", "dropout_dp2")]
CELLS = EVERY if os.environ.get("SLIPWAY_MATRIX") == "all" else IN_CI
KILLED = CELLS if CELLS == EVERY else [(mode, "one") for mode in MODES]
# mode, the layout that the run began in, and the one that it goes on in
MOVED = [(mode, *way) for mode in MODES for way in (("dp2", "one"), ("one", "dp2"))]
MOVED = MOVED if CELLS == EVERY else MOVED[::3]
MOVED += [("sft", "packed", "packed_in_twos"), ("lora", "packed_in_twos", "packed")]
LONGER = STEPS + 2


def job(root: Path, mode: str, layout: str, name: str, **more: object) -> dict:
    """What train_many.py runs."""
    recipe = {
        "model": str(root / KINDS[layout] / "nemo"), "data": str(root / "data.jsonl"),
        "out": str(root / "runs" / f"{mode}-{layout}-{name}"), "mode": mode, "steps": STEPS, "seq_length": SEQ_LENGTH,
        "micro_batch_size": 1, "global_batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "constant_steps": 1,
        "save_every": 2, "keep": 3, **LAYOUTS.get(layout.removeprefix("dropout_"), {}), **PACKED.get(layout, {}),
        **DROPPED.get(layout, {}),
    }  # fmt: skip
    indices = root / "packed" if layout in PACKED else root
    return {
        "recipe": recipe,
        "indices": str(indices),
        "ranks": 1 if layout in ALONE else 2,
        "port": free_port(),
        **more,
    }


def longer(job: dict) -> dict:
    job["recipe"]["steps"] = LONGER
    return job


def out(root: Path, mode: str, layout: str, name: str) -> Path:
    return root / "runs" / f"{mode}-{layout}-{name}"


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory) -> Path:
    """Of each cell a run that nobody stops; one that is asked to stop, and goes on; one that was killed in a save."""
    root = tmp_path_factory.mktemp("resume")
    for kind in sorted(set(KINDS.values())):
        make_model(root / kind / "hf", kind, quantized=False)
        import_checkpoint(str(root / kind / "hf"), str(root / kind / "nemo"))
    write_data(root)
    (root / "packed").mkdir()
    scan(root / "data.jsonl", SEQ_LENGTH, 512, packed=True).save(root / "packed" / "train.npz")
    first = [job(root, *cell, "whole") for cell in CELLS]
    first += [job(root, *cell, "stopped", stop_after=2) for cell in CELLS]
    warm.train_many(first, root)
    for cell in KILLED:
        killed_in_a_save(out(root, *cell, "whole"), out(root, *cell, "killed"))
    again = [job(root, *cell, "resumed", continues=str(out(root, *cell, "stopped"))) for cell in CELLS]
    again += [job(root, *cell, "restarted", continues=str(out(root, *cell, "killed"))) for cell in KILLED]
    again += [job(root, m, to, f"from-{one}", continues=str(out(root, m, one, "stopped"))) for m, one, to in MOVED]
    moved = job(root, "sft", "one", "moved", continues=str(out(root, "sft", "one", "stopped")))
    again += [{**moved, "recipe": {**moved["recipe"], "keep": 1}}]
    again += [
        longer(job(root, mode, "one", "longer", continues=str(out(root, mode, "one", "whole")))) for mode in MODES
    ]
    warm.train_many(again, root)
    return root


def killed_in_a_save(whole: Path, killed: Path) -> None:
    """The folder as kill -9 leaves it while step 4 is saved: step 2 is complete, half of step 4 is there."""
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("step=5*"))
    half = killed / "checkpoints" / "step=4"
    shutil.rmtree(half / "context")
    for file in sorted(half.rglob("*.distcp"))[:1]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (half.parent / "step=4-unfinished").touch()
    RunFolder(killed).remove_incomplete()


def losses(folder: Path) -> list[float]:
    logs = "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("rank*.log")))
    assert (folder / "end").read_text() == "done", logs
    metrics = RunFolder(folder).read_metrics()
    assert [entry["step"] for entry in metrics] == list(range(len(metrics)))
    return [entry["loss"] for entry in metrics]


@pytest.mark.parametrize("mode, layout", CELLS)
def test_a_stopped_run_goes_on_bit_for_bit(runs, mode, layout):
    stopped, whole = out(runs, mode, layout, "stopped"), losses(out(runs, mode, layout, "whole"))
    assert len(whole) == STEPS
    status = RunFolder(stopped).read_status()
    assert status["state"] == "stopped" and 2 <= status["step"] < STEPS
    resumed = RunFolder(out(runs, mode, layout, "resumed")).read_status()
    assert resumed["state"] == "done" and resumed["started_at_step"] == status["step"]
    assert losses(out(runs, mode, layout, "resumed")) == whole


def test_something_is_dropped_there(runs):
    assert losses(out(runs, "lora", "dropout", "whole")) != losses(out(runs, "lora", "one", "whole"))


@pytest.mark.parametrize("mode, layout", KILLED)
def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(runs, mode, layout):
    restarted = out(runs, mode, layout, "restarted")
    assert RunFolder(restarted).read_status()["started_at_step"] == 2
    assert losses(restarted) == losses(out(runs, mode, layout, "whole"))


@pytest.mark.parametrize("mode, began, goes_on", MOVED)
def test_a_stopped_run_goes_on_with_more_processes_or_fewer(runs, mode, began, goes_on):
    moved = out(runs, mode, goes_on, f"from-{began}")
    assert RunFolder(moved).read_status()["started_at_step"] >= 2
    assert losses(moved) == pytest.approx(losses(out(runs, mode, began, "whole")), rel=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_done_goes_on_for_more_steps(runs, mode):
    """From there on with the learning rates of the longer run."""
    folder = out(runs, mode, "one", "longer")
    found, whole = losses(folder), losses(out(runs, mode, "one", "whole"))
    assert len(found) == LONGER and found[:STEPS] == whole
    assert RunFolder(folder).read_status()["started_at_step"] == STEPS
    recipe = Recipe.load(RunFolder(folder).recipe)
    rates = [entry["lr"] for entry in RunFolder(folder).read_metrics()]
    assert rates[STEPS:] == pytest.approx([recipe.learning_rate(step) for step in range(STEPS, LONGER)])
    shorter = dataclasses.replace(recipe, steps=STEPS)
    assert rates[:STEPS] == pytest.approx([shorter.learning_rate(step) for step in range(STEPS)])


def test_older_checkpoints_of_a_run_that_was_moved_are_removed_too(runs):
    """NeMo knows the paths that they had."""
    assert RunFolder(out(runs, "sft", "one", "stopped")).complete_checkpoints()
    (last,) = (out(runs, "sft", "one", "moved") / "checkpoints").iterdir()
    assert last.name == f"step={STEPS}"
