"""`slipway train` for real: NeMo under torchrun on the CPU, stopped and resumed, alone and in two processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slipway
import torch
from conftest import free_port, seconds_of_children
from forked import POLL, Cold, Commands, Gate
from printed import not_ours
from safetensors.torch import load_file
from slipway.commands.preprocess import preprocess
from slipway.tokens.lines import as_line
from slipway.training.run_folder import RunFolder
from slipway.training.whole import MARK

STEPS, SEQ_LENGTH, BATCH = 6, 64, 4
TOKENS = 62  # of a sequence: a sample has one token less, and its last one is only a label


@pytest.fixture(scope="module")
def data(nemo_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    preprocess(str(Path(slipway.__file__).parent), str(path), tokenizer=str(nemo_model), seq_length=SEQ_LENGTH)
    return path


def flags(model: Path, data: Path, out: Path, /, **changes: object) -> list[str]:
    chosen = {
        "model": model, "data": data, "out": out, "steps": STEPS, "seq_length": SEQ_LENGTH, "micro_batch_size": 2,
        "global_batch_size": BATCH, "lr": 2e-3, "warmup_steps": 2, "constant_steps": 1, "nproc_per_node": 1,
        "master_port": free_port(),
    }  # fmt: skip
    return ["train", *(f"--{key.replace('_', '-')}={value}" for key, value in (chosen | changes).items())]


def train(
    words: list[str],
    stop_after: int | None = None,
    by: signal.Signals = signal.SIGTERM,
    limits: dict[int, int] | None = None,
    commands: Commands | None = None,
    gate: Gate | None = None,
) -> tuple[int, str]:
    """Run the command; with `stop_after`, send the signal once that many steps are done; with `gate`, once the worker
    waits there, before the first step."""
    run = RunFolder(Path(next(word for word in words if word.startswith("--out="))[6:]))
    output = run.path.with_name(f"output-{time.monotonic_ns()}")
    process = commands.start(words, output, gate) if commands else Cold().start(words, output)
    for kind, most in (limits or {}).items():
        resource.prlimit(process.pid, kind, (most, most))

    def wait_for(event: Callable[[], bool]) -> None:
        while not event():
            assert process.poll() is None, process.output.read_text()
            time.sleep(POLL)

    if gate:
        wait_for(gate.is_reached)
        process.send_signal(by)
        wait_for(lambda: f"{by.name}: saving" in process.output.read_text())
        gate.open()
    if stop_after:
        wait_for(lambda: any(metrics["step"] >= stop_after - 1 for metrics in run.read_metrics()))
        process.send_signal(by)
    return process.finish()


@pytest.fixture(scope="module")
def whole(nemo_model, data, tmp_path_factory) -> RunFolder:
    """A run that nothing interrupts, in one process."""
    run = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    with seconds_of_children() as seconds:
        code, output = train(flags(nemo_model, data, run.path, save_every=2))
    assert code == 0 and "torch.distributed.run" not in output, output
    assert seconds[0] < 90, "most of it for the import of NeMo"
    assert re.search(r"worker: NeMo imported in [\d.]+ s", output), output
    assert re.search(r"worker: first step done [\d.]+ s after the start", output), output
    assert re.search(r"^worker: loaded \S+, [\d.]+ .?B in [\d.]+ s, [\d.]+ .?B/s$", output, re.MULTILINE), output
    assert re.search(r"^worker: saved step=\d+, [\d.]+ .?B in [\d.]+ s, [\d.]+ .?B/s$", output, re.MULTILINE), output
    assert not not_ours(output), "no library says anything to the person who reads this"
    return run


@pytest.fixture(scope="module")
def heads(whole, tmp_path_factory) -> Path:
    from slipway.commands.extract_heads import extract_heads

    folder = tmp_path_factory.mktemp("heads") / "heads"
    extract_heads(str(whole.checkpoints / f"step={STEPS}"), str(folder))
    return folder


def losses(run: RunFolder) -> list[float]:
    metrics = run.read_metrics()
    assert [entry["step"] for entry in metrics] == list(range(STEPS))
    return [entry["loss"] for entry in metrics]


def test_a_run_leaves_what_a_person_wants_to_see(whole):
    status = whole.read_status()
    assert (status["state"], status["step"], status["base_changed"]) == ("done", STEPS, False)
    most = STEPS * BATCH * TOKENS  # the last sample of each of our own sources, which are the data, is shorter
    assert 0.8 * most < status["tokens"] <= most and status["why"] == "all steps are done"
    assert status["loss"] == losses(whole)[-1]
    assert len(set(losses(whole))) == STEPS and whole.plot.read_bytes()[1:4] == b"PNG"
    assert list((whole.path / "tensorboard").rglob("events.out.tfevents.*"))
    assert sorted(folder.name for folder in whole.checkpoints.iterdir()) == ["step=4", "step=6"], (
        "the last two are kept"
    )
    marks = [json.loads((folder / MARK).read_text()) for folder in whole.checkpoints.iterdir()]
    assert all("weights/common.pt" in mark and "context/io.json" in mark for mark in marks)


def test_the_first_loss_is_the_definition_on_transformers(whole, mxfp4_model, data, tmp_path):
    """The same samples and first heads, with hidden states and logits from transformers and no chunking."""
    from slipway.commands.dequant import dequant
    from slipway.tokens.scan import open_units, scan
    from slipway.training.heads import DecodingHeads, distribution_features, token_losses
    from slipway.training.samples import Samples
    from transformers import AutoModelForCausalLM

    dequant(str(mxfp4_model), str(tmp_path / "bf16"))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    units = open_units(data, scan(data, SEQ_LENGTH, 512), SEQ_LENGTH)
    samples = Samples([units], STEPS * BATCH, SEQ_LENGTH, seed=1234)
    torch.manual_seed(1234)
    heads = DecodingHeads(model.config.hidden_size)
    total = count = 0.0
    with torch.no_grad():
        for number in range(BATCH):
            sample = samples[number]
            out = model(sample["tokens"].unsqueeze(0), output_hidden_states=True)
            hidden, logits = out.hidden_states[-1][0], out.logits[0]
            easy = logits.argmax(-1) == sample["labels"]
            keep = sample["loss_mask"].bool() & ~(easy & sample["drop_if_easy"])
            outputs = heads(hidden, lambda t, logits=logits: distribution_features(logits, t))
            each = token_losses(*outputs, logits, sample["labels"])
            total, count = total + (each * keep).sum().item(), count + keep.sum().item()
    assert losses(whole)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.fixture(scope="module")
def held_out(data, tmp_path_factory) -> Path:
    """So much that an evaluation on all of it would take minutes: a run that has begun one waits for the stop."""
    path = tmp_path_factory.mktemp("held_out") / "data.jsonl"
    path.write_bytes(data.read_bytes() * 10)
    return path


def test_stopped_at_any_time_and_resumed_is_the_same_run_to_the_bit(whole, nemo_model, data, held_out, tmp_path, warm):
    """Before the first step, and in evaluations, which change nothing."""
    run = RunFolder(tmp_path / "run")
    for after, by in ((0, signal.SIGTERM), (1, signal.SIGTERM), (3, signal.SIGUSR1)):
        gate = None if after else Gate(tmp_path / "gate")
        evaluations = {"eval_data": held_out, "eval_every": after, "eval_batches": 10**6} if after else {}
        words = flags(nemo_model, data, run.path, **evaluations)
        code, output = train(words, after, by, commands=warm, gate=gate)
        assert code == 75 and "Traceback" not in output, output
        status = run.read_status()
        assert (status["state"], status["why"], status["step"]) == ("stopped", by.name, after)
        most = after * BATCH * TOKENS
        assert 0.5 * most <= status["tokens"] <= most and not run.read_evaluations()
        saved = run.latest_checkpoint()
        assert saved[0] == after if after else saved is None and "step 1/" not in output
    words = flags(nemo_model, data, run.path)
    code, output = train(words, commands=warm)
    assert code == 0, output
    assert losses(run) == losses(whole)
    code, output = train(words, commands=warm)
    assert code == 0 and "torch.distributed.run" not in output, "there was nothing left to do"
    assert run.read_status()["base_checksum"] == whole.read_status()["base_checksum"]


def test_an_evaluation_that_was_cut_off_comes_first_when_the_run_goes_on(
    whole, nemo_model, data, held_out, tmp_path, warm
):
    """One that was done does not come again. The last step is followed by one as in a run that nobody stopped."""
    run = RunFolder(tmp_path / "run")
    evaluations = {"eval_data": held_out, "eval_every": 2}
    code, output = train(
        flags(nemo_model, data, run.path, **evaluations, eval_batches=10**6), stop_after=2, commands=warm
    )
    assert code == 75 and not run.read_evaluations(), output
    code, output = train(flags(nemo_model, data, run.path, **evaluations, eval_batches=1), commands=warm)
    assert code == 0 and output.index("evaluation after step 2:") < output.index("step 3/"), output
    assert losses(run) == losses(whole)
    longer = flags(nemo_model, data, run.path, **evaluations, eval_batches=1, steps=STEPS + 3)
    code, output = train(longer, commands=warm)
    assert code == 0 and [entry["step"] for entry in run.read_evaluations()] == [1, 3, 5, 7, 8], output


def own_terminal() -> None:
    """Of a child: its input is its terminal, and it ends with it, where these tests run under nohup too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY)


@pytest.mark.parametrize("processes, nohup", [(1, False), (2, False), (1, True)])
def test_a_closed_terminal_is_a_request_to_stop_unless_nohup_keeps_it_away(
    nemo_model, data, tmp_path, processes, nohup
):
    run = RunFolder(tmp_path / "run")
    words = flags(nemo_model, data, run.path, nproc_per_node=processes, steps=40 if nohup else 10**4)
    words = [*(["nohup"] if nohup else []), sys.executable, "-m", "slipway.cli", *words]
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=tmp_path,
        preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while not nohup and b"step 2/" not in shown:
        assert select.select([screen], [], [], 120)[0]
        shown += os.read(screen, 65536)
    while nohup and not run.metrics.exists():  # it writes to a file, and nothing to the terminal
        assert process.poll() is None
        time.sleep(POLL)
    os.close(screen)
    assert process.wait(120) == (0 if nohup else 75)
    status, saved = run.read_status(), run.latest_checkpoint()
    if nohup:
        assert status["state"] == "done" and saved[0] == 40
    else:
        assert (status["state"], status["why"]) == ("stopped", "SIGHUP") and saved[0] == status["step"] >= 2


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(whole, nemo_model, data, tmp_path, warm):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", tmp_path], check=True)
    try:
        run = RunFolder(tmp_path / "run")
        words = flags(nemo_model, data, run.path, save_every=1)
        code, output = train(words, commands=warm)
        assert code == 73 and "Traceback" not in output, output
        last = output.strip().splitlines()[-1]
        assert re.search(
            r"checkpoints/step=3 cannot be written, .* are free there .*: step=2 is complete; free", last
        ), last
        assert run.read_status()["state"] == "failed" and "cannot be written" in run.read_status()["why"]
        assert run.latest_checkpoint()[0] == 2
        subprocess.run(["mount", "-o", "remount,size=50m", tmp_path], check=True)
        code, output = train(words, commands=warm)
        assert code == 0 and losses(run) == losses(whole), output
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_too_little_memory_says_which_knobs_to_turn(nemo_model, tmp_path):
    """Attention over 80,000 tokens wants 100 GB more; the limit makes that fail on any machine."""
    data = tmp_path / "long.jsonl"
    data.write_bytes(as_line([5], [7] * 79_990))
    words = flags(nemo_model, data, tmp_path / "run", seq_length=80_000, nproc_per_node=2)
    code, output = train(words, limits={resource.RLIMIT_AS: 64 << 30})
    last = output.strip().splitlines()[-1]
    assert code == 78 and "Traceback" not in output, output
    assert re.match(
        r"slipway: out of memory: [\d.]+ GB more were requested than this machine has\. A pass has 160000", last
    )
    assert "--micro-batch-size 2 → 1" in last and "--seq-length 80000 → 40000" in last
    assert "--tensor-parallel-size 1 → 2" in last and re.search(r"\(rank [01] on node 0 \(.*\)\)$", last), last


def test_without_time_to_save_it_says_so(nemo_model, data, tmp_path, warm):
    words = flags(nemo_model, data, tmp_path / "run", steps=10**6, save_every=10**6, grace=0)
    code, output = train(words, 1, commands=warm)
    assert code == 1 and "Traceback" not in output, output
    assert "no checkpoint was saved within --grace; the last one is at step 0: increase --grace" in output


def test_two_processes_compute_what_one_does(whole, nemo_model, data, tmp_path):
    run = RunFolder(tmp_path / "run")
    code, output = train(flags(nemo_model, data, run.path, nproc_per_node=2))
    assert code == 0, output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_the_heads_come_out_and_merge(heads, whole, mxfp4_model, tmp_path, slipway):
    found = load_file(heads / "heads.safetensors")
    assert sorted(found) == sorted(
        f"{head}.mlp.{layer}.{kind}"
        for head in ("temp_head", "top_p_head")
        for layer in (0, 2)
        for kind in ("weight", "bias")
    )
    config = json.loads((heads / "config.json").read_text())
    assert config["use_enhanced_features"] and config["temperature_hidden_size"] == 64
    slipway("dequant", mxfp4_model, tmp_path / "bf16")
    done = slipway("merge-heads", heads, tmp_path / "bf16", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    base = {k: v for file in (tmp_path / "bf16").glob("*.safetensors") for k, v in load_file(file).items()}
    merged = {k: v for file in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(file).items()}
    wanted = {f"llm.{name}": tensor for name, tensor in base.items()} | {n: t.bfloat16() for n, t in found.items()}
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "autodeco"


def test_what_cannot_be_heads_is_refused(heads, mxfp4_model, nemo_model, tmp_path, slipway):
    done = slipway("extract-heads", nemo_model, tmp_path / "a")
    assert done.returncode == 65 and "holds no trained heads" in done.stderr
    done = slipway("merge-heads", heads, mxfp4_model, tmp_path / "b")
    assert done.returncode == 65 and "is quantised; run `slipway dequant`" in done.stderr
    done = slipway("merge-heads", mxfp4_model, mxfp4_model, tmp_path / "c")
    assert done.returncode == 65 and "has no heads.safetensors" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_only_as_what_it_was(whole, nemo_model, data, slipway):
    before = sorted(whole.path.rglob("*"))
    for change, message in (
        ({"lr": 1e-3}, "--lr was 0.002 and is 0.001"),
        ({"resume": "never"}, f"holds a run at step {STEPS}"),
    ):
        done = slipway(*flags(nemo_model, data, whole.path, **change))
        assert done.returncode == 2 and message in done.stderr
    assert sorted(whole.path.rglob("*")) == before


@pytest.mark.parametrize("mode", ["heads", "lora", "sft", "pretrain"])
def test_what_changes_only_the_speed_may_change_and_is_said(mode, nemo_model, data, tmp_path, warm):
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    code, output = train(flags(nemo_model, data, whole.path, mode=mode), commands=warm)
    assert code == 0, output
    begun = flags(nemo_model, data, run.path, mode=mode, save_every=1)
    code, output = train(begun, stop_after=2, commands=warm)
    assert code == 75, output
    step = run.read_status()["step"]
    assert len(run.complete_checkpoints()) == 2
    others = {
        "mode": mode,
        "micro_batch_size": 1,
        "recompute": "full",
        "cuda_graphs": False,
        "save_every": 3,
        "keep": 1,
    }
    code, output = train(flags(nemo_model, data, run.path, **others), commands=warm)
    assert code == 0, output
    for said in (
        "--micro-batch-size was 2 and is 1",
        "--recompute was none and is full",
        "--cuda-graphs was True and is False",
    ):
        assert f"{said}: from step {step} on time and memory are others" in output, output
    for said in ("--save-every was 1 and is 3", "--keep was 2 and is 1"):
        assert f"{said}: from step {step} on\n" in output, output
    assert [folder.name for folder in run.checkpoints.iterdir()] == [f"step={STEPS}"]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(
    "change, code, message",
    [
        ({"model": "none"}, 2, "--model none does not exist"),
        ({"model": "MXFP4"}, 65, "NeMo checkpoint (weights/metadata.json and context/ are missing); `slipway import`"),
        ({"data": "none"}, 2, "--data none does not exist"),
        ({"global_batch_size": 3}, 2, "--global-batch-size 3 is not a multiple of"),
        ({"tensor_parallel_size": 2}, 2, "1 processes cannot be split into tensor 2"),
        ({"steps": 0}, 2, "--steps is 0; it must be 1 or more"),
        ({"nodes": 2}, 2, "2 nodes need --node-rank"),
        ({"data": "FOREIGN"}, 65, "a token id is 100000, the model's vocabulary has 512"),
        ({"data": "GARBLED"}, 65, "garbled.jsonl:1: not a sample"),
        ({"data": "LONG", "seq_length": 2}, 65, "no sample is left"),
        ({"out": "/proc/run"}, 73, "cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_any_work(change, code, message, nemo_model, mxfp4_model, data, tmp_path, slipway):
    (tmp_path / "foreign.jsonl").write_text('{"inputs": {"p_ids": [], "r_ids": [1, 100000]}}\n')
    (tmp_path / "garbled.jsonl").write_text('{"inputs"\n')
    (tmp_path / "long.jsonl").write_text('{"inputs": {"p_ids": [1], "r_ids": [2, 3]}}\n')
    paths = {
        "MXFP4": mxfp4_model,
        "LONG": tmp_path / "long.jsonl",
        "FOREIGN": tmp_path / "foreign.jsonl",
        "GARBLED": tmp_path / "garbled.jsonl",
    }
    change = {key: paths.get(value, value) for key, value in change.items()}
    done = slipway(*flags(nemo_model, data, tmp_path / "run", **change))
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and message in error and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_everything_and_does_nothing(nemo_model, data, tmp_path, slipway):
    with seconds_of_children() as seconds:
        done = slipway(*flags(nemo_model, data, tmp_path / "run"), "--dry-run")
    assert seconds[0] < 2 and done.returncode == 0
    assert '"seq_length": 64' in done.stdout and "topology: 1 node × 1" in done.stdout
    assert "torch.distributed.run --nnodes=1" in done.stdout and not (tmp_path / "run").exists()
