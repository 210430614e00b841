"""A person at a client of a bed, and what stand-ins have done there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bed import Bed

SLIPWAY = Path(sys.executable).parent / "slipway"


@dataclass
class Client:
    """A person at a client: a folder with a lab.toml, and the commands that are typed there."""

    bed: Bed
    folder: Path
    seconds: list[float] = field(default_factory=list)

    def lab(self, text: str) -> None:
        (self.folder / "lab.toml").write_text(text)

    def submit(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """`slipway submit` with these words."""
        begun = time.monotonic()
        command = [SLIPWAY, "submit", *map(str, words)]
        options = {"env": self.bed.client, "cwd": self.folder, "timeout": 300} | options
        done = subprocess.run(command, capture_output=True, text=True, **options)
        self.seconds.append(time.monotonic() - begun)
        return done

    def sent(self, *words: object) -> tuple[str, list[str]]:
        """(run, its jobs) of a chain that is submitted."""
        done = self.submit("--json", "--", *words)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["run"], list(found["jobs"].values())

    def wait_for_end(self, run: str) -> None:
        """Wait until `status` says that a run has ended; a job that is queued again starts at once."""
        self.bed.wait(lambda: self.status(run)["ended"], f"the end of {run}", hurry=True, pause=1.0)

    def status(self, run: str = "") -> dict[str, Any]:
        """What `status` says."""
        done = self.submit("status", "--json", *([run] if run else []))
        assert done.stdout, done.stderr
        return json.loads(done.stdout) | {"code": done.returncode}

    def states(self, run: str = "") -> list[str]:
        """The state of each step."""
        return [step["state"] for step in self.status(run)["steps"]]


def events(folder: Path) -> list[tuple[float, str, str, str, list[str]]]:
    """(time, start, rank, node, what) of everything that a stand-in did to a folder."""
    file = Path(f"{folder}.events")
    lines = file.read_text().splitlines() if file.exists() else []
    return [(float(a), b, c, d, rest) for a, b, c, d, *rest in map(str.split, lines)]


def person(bed: Bed, folder: Path) -> Client:
    """A client whose commands are stand-ins, with its lab.toml in a folder."""
    found = Client(bed, folder)
    found.lab(
        f'host = "login"\njob_dir = "{bed.shared}/jobs"\ncommand = "{install(bed)}"\nnodes = 2\ngpus_per_node = 1\n'
    )
    return found


def place(bed: Bed, name: str) -> Path:
    """A folder of one's own on the cluster."""
    folder = bed.shared / name
    folder.mkdir()
    shutil.chown(folder, bed.user)
    return folder


def install(bed: Bed) -> Path:
    """The stand-in, where the nodes of a bed find it."""
    tool = bed.shared / "stand-in"
    if not tool.exists():
        shutil.copy(Path(__file__).parent / "stand-in", tool)
        tool.chmod(0o755)
    return tool


def chain(out: Path, steps: int = 12) -> list[object]:
    """import → train → export of stand-ins, in a folder."""
    train = ["train", "--model", out / "nemo", "--data", "/data/x.jsonl", "--out", out / "run", "--steps", steps]
    return ["import", "/hf/model", out / "nemo", "then", *train, "then", "export", out / "run", out / "exported"]


def wait_for(bed: Bed, file: Path, text: str = "") -> None:
    bed.wait(lambda: file.exists() and text in file.read_text(), f"{file} with {text!r}")


def steps_done(out: Path) -> list[int]:
    """The steps of the training in the order in which they were done."""
    return [int(what[1]) for *_, what in events(out / "run") if what[0] == "step"]
