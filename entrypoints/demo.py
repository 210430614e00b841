"""`slipway demo`: the whole flow on a tiny model, through the shipped commands, with checks that can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import entrypoints
from entrypoints.demo_checks import Check, checks
from entrypoints.errors import SlipwayError, UsageError
from entrypoints.report import human_bytes
from entrypoints.training.run_folder import RunFolder

MARK = ".slipway-demo"  # a folder with this file in it may be thrown away
SEQ_LENGTH = 128
PROCESSES = 2


@dataclass
class Step:
    name: str
    seconds: float
    peak_memory: int
    bytes: int


@dataclass
class Demo:
    """What ran and what it proved."""

    folder: Path
    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps) + 2
        lines = [f"{'step':{width}}{'seconds':>8}{'peak memory':>13}{'written':>10}"]
        lines += [
            f"{s.name:{width}}{s.seconds:8.1f}{human_bytes(s.peak_memory):>13}"
            f"{human_bytes(s.bytes) if s.bytes else '':>10}"
            for s in self.steps
        ]
        lines += [f"{'total':{width}}{sum(s.seconds for s in self.steps):8.1f}", ""]
        lines += [f"{'ok  ' if c.passed else 'FAIL'} {c.what}: {c.found}" for c in self.checks]
        return "\n".join([*lines, "", f"plot: {RunFolder(self.folder / 'run').plot}"])

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "steps": [vars(step) for step in self.steps],
            "checks": [vars(check) for check in self.checks],
        }


Family = Literal["gpt_oss", "qwen3", "deepseek_v3", "qwen25", "llama31"]


def demo(*, model: Family = "gpt_oss", out: str = "slipway-demo", steps: int = 24) -> Demo:
    """Run the whole flow on a tiny model: no GPU needed, a few minutes.

    Makes a random model in the exact Hugging Face layout, then: dequant, import, preprocess, train with NeMo under
    torchrun with a stop and a resume in the middle, extract-heads, merge-heads, export. Ends with a table and checks.

    Args:
        model: family of the tiny model.
        out: folder for everything; one that an earlier demo made is replaced.
        steps: training steps, at least 4.
    """
    if steps < 4:
        raise UsageError(f"--steps is {steps}; the demo stops in the middle and needs at least 4")
    folder = _fresh_folder(Path(out).absolute())
    result = Demo(folder)
    with _timed(result, "make a tiny model"):
        _make_model(model, folder / "hf")
    for name, words in _commands(folder, steps):
        _run(result, name, words)
        if name == "import":
            _train(result, folder, steps)
    with _timed(result, "checks"):
        result.checks += [*checks(folder, steps)]
    if failed := [check.what for check in result.checks if not check.passed]:
        print(result)
        raise SlipwayError(f"demo: {len(failed)} of {len(result.checks)} checks failed: {'; '.join(failed)}")
    return result


def _commands(folder: Path, steps: int) -> Iterator[tuple[str, list[str]]]:
    f = str(folder)
    yield "dequant", ["dequant", f"{f}/hf", f"{f}/bf16"]
    yield "import", ["import", f"{f}/hf", f"{f}/nemo"]
    yield "extract-heads", ["extract-heads", f"{f}/run/checkpoints/step={steps}", f"{f}/heads"]
    yield "merge-heads", ["merge-heads", f"{f}/heads", f"{f}/bf16", f"{f}/merged"]
    yield "export", ["export", f"{f}/nemo", f"{f}/exported"]


def _fresh_folder(folder: Path) -> Path:
    if folder.exists():
        if not (folder / MARK).exists():
            raise UsageError(f"{folder} exists and no demo made it; choose another --out")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        (folder / MARK).touch()
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None
    return folder


def _texts() -> list[Path]:
    """Real text that is always there: this program's own source."""
    return sorted(Path(entrypoints.__file__).parent.rglob("*.py"))


def _make_model(family: str, folder: Path) -> None:
    from entrypoints.families import FAMILIES
    from entrypoints.families.fabricate import fabricate

    config = FAMILIES[family].tiny_config()
    fabricate(folder, config, [file.read_text() for file in _texts()], quantized=True)


# ---------------------------------------------------------------------------- running commands


class _timed:
    """Adds a step for work done in this process."""

    def __init__(self, result: Demo, name: str) -> None:
        self.result, self.name = result, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, kind: type | None, *_: object) -> None:
        import resource

        if kind is None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.result.steps.append(Step(self.name, time.monotonic() - self.started, peak, 0))


def _run(
    result: Demo,
    name: str,
    words: list[str],
    expect: int = 0,
    watch: Callable[[subprocess.Popen], None] | None = None,
) -> dict[str, Any]:
    """Run one command as a person would and add it as a step; returns its --json object."""
    print(f"$ slipway {' '.join(words)}", file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoints.cli", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if watch:
        watch(process)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not line.startswith("{"):
            print(line, end="", file=sys.stderr, flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expect:
        raise SlipwayError(f"demo: {name} ended with exit code {process.returncode}, not {expect}; see above")
    summary = json.loads(lines[-1]) if expect == 0 else {}
    seconds = time.monotonic() - started
    result.steps.append(Step(name, seconds, usage.ru_maxrss * 1024, summary.get("bytes", 0)))
    return summary


def _train(result: Demo, folder: Path, steps: int) -> None:
    """Preprocess, train with a stop in the middle, and go on to the end."""
    f = str(folder)
    text = str(Path(entrypoints.__file__).parent)
    words = [
        "preprocess",
        text,
        f"{f}/data.jsonl",
        "--tokenizer",
        f"{f}/nemo",
        "--seq-length",
        str(SEQ_LENGTH),
    ]
    _run(result, "preprocess", words)
    words = ["train", "--model", f"{f}/nemo", "--data", f"{f}/data.jsonl", "--out", f"{f}/run"]
    words += ["--steps", str(steps), "--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "2"]
    words += ["--global-batch-size", "8", "--lr", "2e-3", "--warmup-steps", "2", "--constant-steps", "2"]
    words += ["--nproc-per-node", str(PROCESSES)]

    def stop_in_the_middle(process: subprocess.Popen) -> None:
        import threading

        def watch() -> None:
            run = RunFolder(folder / "run")
            while process.poll() is None and run.read_status().get("step", 0) < steps // 2 - 1:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    _run(result, "train until SIGTERM", words, expect=75, watch=stop_in_the_middle)
    (folder / "stopped.json").write_bytes(RunFolder(folder / "run").status.read_bytes())
    _run(result, "train to the end", words)
