"""CONTRIBUTING.md says which files a new family, launcher or verb touches: here just those are added, and it works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILY = '''"""Mistral: like Llama, without scaling of the rotary positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slipway.families import checks, decoder, fields, llama31, rope
from slipway.families.checks import Config
from slipway.families.described import Described, decoder_config
from slipway.families.rules import Rules

NAME = "mistral"
MODEL_TYPES = ("mistral",)
REQUIRED = decoder.REQUIRED
ALIASES: dict[str, str] = {}
FIELDS = {**llama31.FIELDS, **fields.each(fields.only(None), "sliding_window")}
QUANTIZED = decoder.PROJECTIONS
FORM = llama31.FORM
defaults = llama31.defaults


def check(c: Config, where: Path) -> None:
    checks.check_heads(c, where)
    rope.check(c, where)


def rules(c: Config) -> Rules:
    return decoder.dense_rules(c)


def nemo_model(c: Config) -> tuple[str, str, dict[str, Any]]:
    module = "nemo.collections.llm.gpt.model.mistral"
    return f"{module}:MistralModel", f"{module}:MistralConfig7B", {**decoder.nemo_fields(c), "window_size": None}


MEGATRON: dict[str, Any] = {}


def hf_config(f: Described) -> dict[str, Any]:
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **decoder_config(f)}


def tiny_config() -> dict[str, Any]:
    config = {key: value for key, value in llama31.tiny_config().items() if key != "rope_scaling"}
    return {**config, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
'''
VERB = '''"""`slipway moo`."""


def moo(cow: str) -> str:
    """Greet.

    Args:
        cow: whom.
    """
    return f"moo {cow}"
'''
RECIPE = """family = "mistral"
parameters = 7.2e9

[heads]
steps = 40

[heads.80GB]
micro_batch_size = 2
"""


def files_of(what: str) -> list[str]:
    """The files that CONTRIBUTING.md lists for adding this."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.findall(rf"<!-- files of a {what} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)[0]
    return re.findall(r"- `(.+)`", section)


def committed() -> list[str]:
    """The files that are committed, and those that are about to be."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what is committed, and of what is about to be."""
    for name in committed():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *words: object) -> subprocess.CompletedProcess:
    """A Python command that sees the copy's package, not the installed one."""
    env = {**os.environ, "PYTHONPATH": f"{checkout / 'entrypoints'}"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def add(checkout: Path, what: str, **contents: str) -> None:
    """Write exactly the files that CONTRIBUTING.md lists for this; `contents`: by the last part of the name."""
    listed = [name.replace("NAME", "mistral").replace("MODEL", "mistral_7b") for name in files_of(what)]
    assert sorted(listed) == sorted(contents["paths"].split())
    for name in listed:
        assert not (checkout / name).exists()
        (checkout / name).write_text(contents[Path(name).suffix[1:] if "recipes" not in name else "recipe"])


def test_a_family_is_two_files_and_its_recipes(checkout):
    manifest = (ROOT / "images" / "llama31.toml").read_text().replace("llama31_8b", "mistral_7b")
    manifest = re.sub(r"(?m)^models = .*$", 'models = ["mistral_7b"]', manifest).replace("llama31", "mistral")
    paths = "entrypoints/slipway/families/mistral.py images/mistral.toml entrypoints/slipway/recipes/mistral_7b.toml"
    add(checkout, "family", paths=paths, py=FAMILY, toml=manifest, recipe=RECIPE)

    out = checkout / "demo"
    done = run(checkout, "-m", "slipway.cli", "demo", "--model", "mistral", "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found["checks"]) == 8 and all(check["passed"] for check in found["checks"])
    contents = run(checkout, "-m", "slipway.cli", "inspect", out / "nemo", "--json")
    assert contents.returncode == 0 and json.loads(contents.stdout)["problems"] == {}
    assert run(checkout, "-m", "slipway.cli", "verify", out / "bf16", out / "exported").returncode == 0

    plan = ["train", "--recipe", "mistral_7b", "--model", out / "nemo", "--data", out / "data.jsonl", "--out", "x"]
    assert '"micro_batch_size": 2' in run(checkout, "-m", "slipway.cli", *plan, "--dry-run").stdout
    shapeless = run(checkout, "-m", "slipway.cli", "bench", "mistral_7b")
    assert shapeless.returncode == 2 and "does not say the shape of its model; give --config" in shapeless.stderr
    assert "mistral" in run(checkout, "-m", "slipway.cli", "demo", "--help").stdout
    assert run(checkout, "docs/tables.py").returncode == 0
    assert "| mistral | `mistral` | `mistral_7b` |" in (checkout / "docs" / "recipes.md").read_text()
    code = "from images import manifest; print(manifest.read_manifest('mistral').recipe)"
    assert run(checkout, "-c", code).stdout.strip() == "mistral_7b"


def test_nothing_large_is_in_the_repository():
    """Data of a test that was left in the work tree, and then committed with everything else."""
    names = committed()
    assert len(names) > 100 and [name for name in names if (ROOT / name).stat().st_size > 1 << 20] == []


def test_a_launcher_is_one_file(checkout):
    (path,) = files_of("launcher")
    file, text = checkout / path, (ROOT / path).read_text()
    function = '''

def flock(env: Environment) -> Hints | None:
    """A launcher of this test."""
    return Hints("flock", nodes=_number(env, "FLOCK_SIZE")) if "FLOCK_SIZE" in env else None


LAUNCHERS = (*LAUNCHERS, flock)
'''
    file.write_text(text + function)
    code = (
        "from slipway.launch.topology import find_topology, Placement;"
        "print(find_topology(Placement(), {'FLOCK_SIZE': '1'}).source)"
    )
    assert run(checkout, "-c", code).stdout.strip() == "flock"


def test_a_verb_is_one_file_and_a_line(checkout):
    verb, cli = (checkout / path.replace("VERB", "moo") for path in files_of("verb"))
    verb.write_text(VERB)
    text = cli.read_text().replace('    "version": ', '    "moo": moo.moo,\n    "version": ', 1)
    cli.write_text(text.replace("import slipway\n", "import slipway\nfrom slipway.commands import moo\n", 1))
    assert run(checkout, "-m", "slipway.cli", "moo", "bess").stdout == "moo bess\n"
    assert "moo" in run(checkout, "-m", "slipway.cli", "--help").stdout


def test_the_files_of_a_pin_are_there():
    assert [name for name in files_of("pin") if not (ROOT / name).is_file()] == []
