"""Where attacks are tried: a command in a process of its own, with limits, and what came of it.

Run as a program it is a server, which imports what commands share once and forks a process for each attempt. Each line
of its input is {"words": [...], "environment": {...}, "stdin": FILE}.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10  # of the processor: what an input may take
PATIENCE = 120  # seconds on the clock, for what waits and computes nothing; a safety net on a busy machine
MEMORY = 600 << 20  # bytes beyond what the imports take


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Args:
        code: the exit code; negative is the signal that ended it.
        memory: bytes that it took beyond the imports.
        seconds: of the processor.
    """

    code: int
    out: str
    err: str
    memory: int
    seconds: float

    def check(self, *codes: int, lines: int | None = 1) -> str:
        """What it said; AssertionError unless it ended with one of the codes, in that many lines and no traceback."""
        assert self.code in codes, (self.code, self.seconds, self.memory, self.err[-2000:])
        assert "Traceback" not in self.err + self.out, self.err[-2000:]
        said = self.err.strip().split("\n")
        assert lines is None or len(said) == lines, self.err
        assert self.memory < MEMORY, f"{self.memory >> 20} MB"
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in self.err.replace("\n", "")), repr(self.err)
        return said[-1]


class Arena:
    """Runs commands with limits; a context manager."""

    def __enter__(self) -> Arena:
        words = [sys.executable, "-W", "ignore", __file__]
        self._server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def run(self, *words: object, environment: dict[str, str] | None = None, stdin: str | None = None) -> Outcome:
        """One command."""
        job = {"words": list(map(str, words)), "environment": environment or {}, "stdin": stdin or "/dev/null"}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))


def run_that_goes_on(arena: Arena, nemo: Path, samples: Path, run: Path) -> tuple[list[object], Path]:
    """The words of a run that goes on from a foreign checkpoint (somebody could write to its folder), and that one."""
    words = ["train", "--model", nemo, "--data", samples, "--out", run, "--steps", "100", "--warmup-steps", "1"]
    shown = arena.run(*words, "--dry-run").out
    newest = run / "checkpoints" / "step=2"
    shutil.copytree(nemo, newest)
    (newest / "context" / ".complete").touch()
    (run / "recipe.json").write_text(shown[shown.index("{") : shown.index("\n}") + 2])
    return words, newest


def serve() -> None:
    """Until the input ends."""
    import numpy  # noqa: F401 (for the forks)
    from slipway import cli  # noqa: F401
    from slipway.checkpoint import compare, convert, handover, inspection, locate, peft_import  # noqa: F401
    from slipway.tokens import tokenise  # noqa: F401
    from slipway.training import start  # noqa: F401

    with contextlib.suppress(ImportError):
        import jinja2.ext  # noqa: F401
        import pyarrow.parquet  # noqa: F401
        import tokenizers  # noqa: F401
    answers = os.dup(1)
    for line in sys.stdin:
        os.write(answers, json.dumps(attempt(json.loads(line))).encode() + b"\n")


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        # Not this process's maximum: that one came with it through exec, from whoever started it.
        before = _pages()[1]
        if not (child := os.fork()):
            _play(job, out, err)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(PATIENCE)
        _, status, used = os.wait4(child, 0)
        signal.alarm(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read_text(errors="replace")[:100_000],
            "err": err.read_text(errors="replace")[:100_000],
            "memory": max(0, (used.ru_maxrss << 10) - before),
            "seconds": used.ru_utime + used.ru_stime,
        }


def _pages() -> tuple[int, int]:
    """Bytes of this process: (its address space, what of it is in memory)."""
    space, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(space) * resource.getpagesize(), int(resident) * resource.getpagesize()


def _handover(checkpoint: str) -> None:
    from slipway.checkpoint import handover

    handover.check(Path(checkpoint))


def _topology() -> None:
    from slipway.launch.placement import Placement
    from slipway.launch.topology import find_topology

    print(find_topology(Placement()))


def _packet(file: str) -> None:
    """What a stranger says to node 0, and what a member says once it has proven that it is one."""
    from slipway.launch.channel import Broken, Channel
    from slipway.launch.failure import Failure
    from slipway.untrusted import NotJson, parse_json

    content = Path(file).read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0])
    threading.Thread(target=lambda: (stranger.sendall(content), stranger.close()), daemon=True).start()
    with contextlib.suppress(Broken):
        channel.prove_to_guest(b"secret", time.monotonic() + 5)
    with contextlib.suppress(NotJson, TypeError, ValueError):
        str(Failure.of(parse_json(content)))


def _run_folder(folder: str) -> None:
    from slipway.errors import PreflightError
    from slipway.training.claim import Claim
    from slipway.training.recipe import Recipe
    from slipway.training.run_folder import RunFolder

    run = RunFolder(Path(folder))
    with contextlib.suppress(PreflightError), Claim(run.owner, beat=0.001, silent=0.002):
        run.read_status(), run.read_metrics(), run.latest_checkpoint()
        Recipe.load(run.recipe)


def _scan(*files: str) -> None:
    """Token data, as `train` reads it before anything else."""
    from slipway.training.preflight import scan_data

    for file in files:
        scan_data(file, "", 16, 1000, file.endswith(".jsonl"))


def _told(lab: str, file: str) -> None:
    """What a cluster says of a run: records, with the run's status among them."""
    from slipway import untrusted
    from slipway.cluster import remote, submission

    status = base64.b64encode((Path(file).parent / "status.json").read_bytes()).decode()
    lines = Path(file).read_bytes().decode(errors="replace").replace("STATUS", status).splitlines()
    remote.call = lambda *_: [line.split("\t") for line in lines]
    print(untrusted.harmless_lines(str(submission.submit(["status"], submission.Wanted(lab), {}))))


READERS = {
    "@handover": _handover, "@topology": _topology, "@packet": _packet, "@run": _run_folder, "@scan": _scan,
    "@told": _told,
}  # fmt: skip


def _play(job: dict[str, Any], out: Path, err: Path) -> None:
    for number, file, flags in ((0, job["stdin"], os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(file, flags | (os.O_CREAT if number else 0), 0o600), number)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    now = _pages()[0]
    # Address space, which threads and mappings take too: only what runs away meets this limit.
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30),) * 2)
    os.environ.update(job["environment"])
    code = 99
    try:
        from slipway import cli

        words = job["words"]
        if words[0].startswith("@"):  # a reader that no command has for itself
            cli._run = lambda _: READERS[words[0]](*words[1:]) or 0
        code = cli.main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
