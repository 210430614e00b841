"""Processes that begin with NeMo imported, as forks of one that has done it: what they do then is no different.

Run as a program it is a server: each line of its input is {"words": [...], "output": PATH}, for a `slipway` command
that it forks; it answers with the process number, and PATH.code gets the exit code when the command has ended. With
"gate": PATH a worker of the command waits there, see Gate; "folder", "env" and "screen" are where it runs, what
variables it has, and a terminal for its output. With "python" the words are those of another program in Python, a file
or "-c" and its text. With "many": PATH it is the runs of training/train_many.py.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

POLL = 0.02  # seconds between two looks at processes
LIMIT = 1800.0  # seconds; a safety net, many times what anything here takes on a busy machine


def import_nemo() -> None:
    """What a worker imports, without a thread that would not outlive a fork."""
    from slipway.training import cpu

    cpu.enable()
    from slipway.training import callbacks, data, modes, repairs  # noqa: F401 (for the forks)

    repairs.hand_over_in_this_process()


def fork(work: Callable[[], int | None], output: Path) -> int:
    """Do `work` in a process that writes to `output`; its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work() or 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    util._exit_function()  # Megatron's helper processes end with this one
    os._exit(code)


def fork_ranks(ranks: int, port: int, logs: Path, work: Callable[[], None], may_hang: bool = False) -> str:
    """Do `work` as each rank of a world on this machine: "done" if all ended well, "failed", or "stuck".

    Args:
        logs: folder that gets rankN.log.
        may_hang: end it when the ranks wait for each other; else after LIMIT seconds, which no run comes near.
    """
    children, codes = [], {}
    for rank in range(ranks):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
        children.append(fork(work, logs / f"rank{rank}.log"))
    seen, deadline = Deadlock(children), time.monotonic() + LIMIT
    while len(codes) < ranks and not any(codes.values()) and time.monotonic() < deadline:
        if may_hang and seen.look():
            break
        for child in children:
            pid, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            codes |= {pid: status} if pid else {}
        time.sleep(POLL)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if any(codes.values()):
        return "failed"
    return "done" if len(codes) == ranks else "stuck"


class Deadlock:
    """Sees that processes wait for each other: their main threads sleep, look after look, and compute nothing.

    No time limit could say so on a busy machine, where a process that could go on has no processor for a while. But
    such a process is runnable, not asleep.
    """

    LOOKS = 200

    def __init__(self, pids: list[int]) -> None:
        self._pids, self._before, self._looks = pids, None, 0

    def look(self) -> bool:
        """Look once more; True when it has looked the same LOOKS times. The caller waits POLL seconds in between."""
        now = [_main_thread(pid) for pid in self._pids]
        asleep = all(state == "S" for state, *_ in now)
        self._looks = self._looks + 1 if asleep and now == self._before else 0
        self._before = now
        return self._looks >= self.LOOKS


def _main_thread(pid: int) -> tuple[str, str, str]:
    """(state, ticks in the program, ticks in the kernel) of a process's main thread, see proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "S", "", ""  # it has ended, and nobody waits for it to do more
    return fields[0], fields[11], fields[12]


class Commands:
    """`slipway` commands that need not wait for NeMo's import; a context manager."""

    def __enter__(self) -> Commands:
        words = [sys.executable, "-W", "ignore", __file__]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self._server = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT)

    def start(
        self,
        words: list[str],
        output: Path,
        gate: Gate | None = None,
        folder: Path | None = None,
        env: dict[str, str] | None = None,
        screen: str = "",
    ) -> Command:
        """Begin a command; what it prints goes to `output`.

        Args:
            folder, env: where it runs, and variables that it has beside those of this process.
            screen: a terminal that gets its standard output.
        """
        about = {"gate": str(gate.path) if gate else "", "folder": str(folder or ""), "env": env or {}}
        about["screen"] = screen
        return self._ask({"words": words, **about}, output)

    def python(self, words: list[object], output: Path, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Run `python WORDS` to its end: (exit code, everything it printed), which goes to `output` too."""
        about = {"python": True, "words": [str(word) for word in words], "folder": "", "env": env or {}}
        return self._ask(about, output).finish()

    def train_many(self, jobs: list[dict[str, Any]], folder: Path) -> None:
        """Do the runs of training/train_many.py, and wait for their end; each leaves how it ended in its own folder."""
        file = (
            folder / f"jobs-{len(list(folder.glob('jobs-*.json')))}.json"
        )  # a name of its own, as its code's file has
        file.write_text(json.dumps(jobs))
        code, printed = self._ask({"many": str(file)}, file.with_suffix(".log")).finish()
        assert code == 0, printed

    def _ask(self, job: dict[str, Any], output: Path) -> Command:
        self._server.stdin.write(json.dumps({**job, "output": str(output)}) + "\n")
        self._server.stdin.flush()
        return Command(int(self._server.stdout.readline()), output)


class Gate:
    """Where a worker waits, after the run has begun and before it loads the model, until it is opened: a folder.

    It looks again and again: in one long wait a signal that comes just before would be heeded at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def is_reached(self) -> bool:
        """Somebody waits."""
        return (self.path / "reached").exists()

    def open(self) -> None:
        """Let the worker go on."""
        (self.path / "open").touch()

    @staticmethod
    def put_before_the_model(path: Path) -> None:
        """In the process of the worker."""
        from slipway.training import worker

        load_model = worker.load_model

        def wait_and_load(*arguments: Any) -> Any:
            (path / "reached").touch()
            while not (path / "open").exists() and path.exists():
                time.sleep(POLL)
            return load_model(*arguments)

        worker.load_model = wait_and_load


class Cold:
    """`slipway` commands as a person starts them."""

    def start(self, words: list[str], output: Path) -> Command:
        """Begin a command; what it prints goes to `output`."""
        with output.open("w") as file:
            process = subprocess.Popen([sys.executable, "-m", "slipway.cli", *words], stdout=file, stderr=file)
        command = Command(process.pid, output)
        command.poll = process.poll
        return command


class Command:
    """A command that runs, with what is used here of subprocess.Popen."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self.output = pid, output

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        code = Path(f"{self.output}.code")
        return int(code.read_text()) if code.exists() else None

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing, after its end."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self) -> tuple[int, str]:
        """(exit code, everything it printed)."""
        deadline = time.monotonic() + LIMIT
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(self.output.read_text())
            time.sleep(POLL)
        return code, self.output.read_text()


def serve() -> None:
    """Until the input ends."""
    from slipway.training.imports import import_less

    import_less()  # as in a worker; who saves by NeMo's own code has the whole of it
    import_nemo()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    answers = os.dup(1)
    for line in sys.stdin:
        job = json.loads(line)
        if not os.fork():
            _keep(_work_of(job), Path(job["output"]), answers)


def _work_of(job: dict[str, Any]) -> Callable[[], int | None]:
    if "many" in job:
        from training.train_many import run_all

        return lambda: run_all(Path(job["many"]))
    os.chdir(job["folder"] or ".")
    os.environ.update(job["env"])
    if "python" in job:
        return lambda: _run_python(job["words"])
    if job["gate"]:
        Gate.put_before_the_model(Path(job["gate"]))
    from slipway import cli

    def work() -> int:
        if job["screen"]:
            os.dup2(os.open(job["screen"], os.O_WRONLY | os.O_NOCTTY), 1)
        return cli.main(job["words"])

    return work


def _run_python(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _keep(work: Callable[[], int | None], output: Path, answers: int) -> None:
    """Start the command and write its exit code when there is one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = fork(work, output)
    os.write(answers, f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    part = Path(f"{output}.part")
    part.write_text(str(code))
    part.rename(f"{output}.code")
    os._exit(0)


if __name__ == "__main__":
    serve()
