"""`slipway demo`: the whole flow on a tiny model, through the shipped commands, with checks that can fail."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from slipway import errors
from slipway.commands.demo.checks import Check, checks
from slipway.errors import SlipwayError, UsageError
from slipway.families import FAMILIES
from slipway.launch.topology import gpus_here
from slipway.options import option, take, with_options
from slipway.report import human_bytes
from slipway.training.run_folder import RunFolder

MARK = ".slipway-demo"  # a folder with this file in it may be thrown away
SEQ_LENGTH = 128
PROCESSES = 2  # where there are so many GPUs, or none


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


@dataclass(frozen=True)
class Wanted:
    """What the demo can be asked for."""

    model: str = option("gpt_oss", "family of the tiny model", choices=tuple(FAMILIES))
    out: str = option("slipway-demo", "folder for everything; a folder that an earlier demo made is replaced")
    steps: int = option(24, "training steps; it stops after the first ones and continues", low=12, high=10_000)


@with_options(Wanted)
def demo(**options: Any) -> Demo:
    """Run the whole flow on a tiny model: no GPU needed, a few minutes.

    Makes a random model in the exact Hugging Face layout, then: dequant, import, preprocess, train with NeMo under
    torchrun with a stop and a resume in the middle, extract-heads, merge-heads, export. Ends with a table and checks.
    """
    wanted = take(Wanted, options)
    steps, folder = wanted.steps, _fresh_folder(Path(wanted.out).absolute())
    result = Demo(folder)
    _in_fresh_process(result, "make a tiny model", _make_model, wanted.model, folder / "hf")
    for name, words in _commands(folder, steps):
        _run(result, name, words)
        if name == "import":
            _train(result, folder, steps)
    result.checks += _in_fresh_process(result, "checks", checks, folder, steps)
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
    return sorted(Path(errors.__file__).parent.rglob("*.py"))


def _make_model(family: str, folder: Path) -> None:
    from slipway.families.fabricate import fabricate

    config = FAMILIES[family].tiny_config()
    fabricate(folder, config, [file.read_text() for file in _texts()], quantized=True)


# ---------------------------------------------------------------------------- running commands


def _in_fresh_process(result: Demo, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Add a step for `function(*arguments)`; this process stays small, for children start with its peak memory."""
    started = time.monotonic()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, peak = pool.submit(_with_peak_memory, function, *arguments).result()
    result.steps.append(Step(name, time.monotonic() - started, peak, 0))
    return found


def _with_peak_memory(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    found = function(*arguments)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
        [sys.executable, "-m", "slipway.cli", *words, "--json"], stdout=subprocess.PIPE, text=True
    )
    if watch:
        watch(process)
    lines = []
    for line in cast(IO[str], process.stdout):
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


def _free_port() -> int:
    """A port that no other run on this machine has taken, below those that the kernel gives to other programs."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _train(result: Demo, folder: Path, steps: int) -> None:
    """Preprocess, train with a stop in the middle, and go on to the end."""
    f = str(folder)
    text = str(Path(errors.__file__).parent)
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
    words += ["--nproc-per-node", str(min(PROCESSES, gpus_here() or PROCESSES)), "--master-port", str(_free_port())]

    def stop_soon(process: subprocess.Popen) -> None:
        import threading

        def watch() -> None:
            run = RunFolder(folder / "run")
            with contextlib.suppress(ChildProcessError):  # it has ended, and was waited for
                # Neither poll() nor send_signal(): both take its exit status from the one who waits for it.
                while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    if run.read_status().get("step", 0):  # a busy machine may do ten more before the signal arrives
                        return os.kill(process.pid, signal.SIGTERM)
                    time.sleep(0.02)  # a step of so small a model is hardly longer, and the run calls nobody

        threading.Thread(target=watch, daemon=True).start()

    _run(result, "train until SIGTERM", words, expect=75, watch=stop_soon)
    (folder / "stopped.json").write_bytes(RunFolder(folder / "run").status.read_bytes())
    _run(result, "train to the end", words)
