"""The command line: strict before anything happens, quick, and honest about errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from conftest import seconds_of_children
from slipway import cli
from slipway.errors import EXIT_CODES, SlipwayError, UsageError

SLIPWAY = Path(sys.executable).parent / "slipway"


def verb(src: str, *, nodes: int = 1, rate: float = 0.5, quick: bool = False, kind: Literal["a", "b"] = "a",
         name: str | None = None, set: list[str] | None = None, wide: bool | None = None) -> str:  # fmt: skip
    """A command."""
    return f"{src} {nodes} {rate} {quick} {kind} {name} {set} {wide}"


def parsed(*words: str) -> dict:
    return cli.parse("verb", verb, list(words))[1]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["x"], {"src": "x"}),
        (["--src", "x"], {"src": "x"}),
        (["x", "--nodes=3", "--rate", "1e-5"], {"src": "x", "nodes": 3, "rate": 1e-5}),
        (["x", "--quick"], {"src": "x", "quick": True}),
        (["x", "--no-quick"], {"src": "x", "quick": False}),
        (["--wide", "--name", "y", "x"], {"wide": True, "name": "y", "src": "x"}),
        (["x", "--no-wide"], {"src": "x", "wide": False}),
        (["x", "--quick=false"], {"src": "x", "quick": False}),
        # No number, tuple or comment is made of a name.
        (["97e1234", "--name=97e1234"], {"src": "97e1234", "name": "97e1234"}),
        (["a,b"], {"src": "a,b"}),
        (["run#3"], {"src": "run#3"}),
        (["-1"], {"src": "-1"}),
        (["--", "--odd-name"], {"src": "--odd-name"}),
        (["x", "--set", "a=1", "--set", "b=2"], {"src": "x", "set": ["a=1", "b=2"]}),
        (["x", "-n", "2"], None),  # -n could be --nodes or --name
        (["x", "-k", "b"], {"src": "x", "kind": "b"}),
    ],
)
def test_values_arrive_as_their_annotated_types(words, expected):
    if expected is None:
        with pytest.raises(UsageError, match="unknown flag"):
            parsed(*words)
    else:
        assert parsed(*words) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "SRC is missing"),
        ([""], "SRC is empty"),
        (["x", "y"], "unexpected argument 'y'"),
        (["x", "--nodez", "2"], "unknown flag --nodez, did you mean --nodes?"),
        (["x", "--nodes", "eight"], "--nodes takes a whole number; not 'eight'"),
        (["x", "--nodes=2.5"], "--nodes takes a whole number"),
        (["x", "--rate", "fast"], "--rate takes a number"),
        (["x", "--quick=maybe"], "--quick takes true or false; not 'maybe'"),
        (["x", "--kind", "c"], "--kind takes a, b; not 'c'"),
        (["x", "--nodes"], "--nodes needs a value"),
        (["x", "--nodes", "1", "--nodes", "2"], "--nodes is given twice"),
    ],
)
def test_what_is_wrong_is_said(words, message):
    with pytest.raises(UsageError) as error:
        parsed(*words)
    assert message in str(error.value)


def test_a_command_gets_exactly_what_was_parsed(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "verb", verb)
    assert cli.main(["verb", "97e1234", "--nodes", "2", "--set", "a=b,c"]) == 0
    assert capsys.readouterr().out.strip() == "97e1234 2 0.5 False a None ['a=b,c'] None"


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_is_quick_and_imports_no_torch(words):
    command = [sys.executable, "-X", "importtime", "-m", "slipway.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "nemo", "megatron", "transformers", "numpy"}
    with seconds_of_children() as seconds:
        subprocess.run([SLIPWAY, *words], capture_output=True, check=True)
    assert seconds[0] < 0.5


@pytest.mark.parametrize("name, function", cli.COMMANDS.items())
def test_every_argument_of_every_command_is_documented(name, function):
    text, (parameters, positional) = cli.help_text(name, function), cli.arguments_of(function)
    for parameter in parameters.values():
        shown = parameter.name.upper() if parameter.name in positional else parameter.flag
        assert parameter.about.help and f"\n  {shown}" in text, parameter.name
    assert "--json" in text


def test_help_lists_every_exit_code():
    codes = {error.exit_code for error in (SlipwayError, *SlipwayError.__subclasses__())}
    assert codes <= {code for code, *_ in EXIT_CODES} and {0, 69, 130} <= {code for code, *_ in EXIT_CODES}
    for code, meaning, again in EXIT_CODES:
        assert f"\n  {code:<4} {meaning} → {again}" in cli.overview()


def test_an_unknown_command_is_named_with_a_suggestion(slipway):
    done = slipway("dequnt", "a", "b")
    assert done.returncode == 2
    assert done.stderr == "slipway: there is no command 'dequnt', did you mean dequant?; `slipway --help` lists them\n"


def test_a_command_may_be_written_with_underscores(slipway):
    assert "extract_heads" not in slipway("extract_heads", "--help").stdout.splitlines()[1]


def test_a_link_with_a_commands_name_is_that_command(tmp_path):
    (tmp_path / "version").symlink_to(SLIPWAY)
    done = subprocess.run([tmp_path / "version", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["nemo"]["version"] == "2.7.3"


def test_version_names_every_pin_with_its_commit(slipway):
    found = json.loads(slipway("version", "--json").stdout)
    assert found["torch"]["version"].startswith("2.11.0")
    assert all(len(found[name]["commit"]) == 40 for name in ("nemo", "megatron-core", "transformer-engine", "apex"))
    assert "megatron-core" in slipway("version").stdout


def test_a_closed_pipe_is_no_error():
    command = f"{SLIPWAY} --help | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


# ---------------------------------------------------------------------------- where it prints to


def run_in_shell(line: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which $S is `slipway`, with streams as a person has them: not unbuffered."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    script = f"S='{sys.executable} -m slipway.cli'; {line}"
    return subprocess.run(["bash", "-c", script], env=environment | variables, capture_output=True)


@pytest.mark.parametrize(
    "line, code, errors",
    [
        (
            "$S version --json >/dev/full",
            73,
            b"slipway: standard output cannot be written (No space left on device); free",
        ),
        ("$S --help | true; exit ${PIPESTATUS[0]}", 0, b""),
        ("$S doctor --gpus 64 | true; exit ${PIPESTATUS[0]}", 78, b""),  # who has gone does not change what was found
        ("$S doctor >&-", 0, b""),
        ("$S version >&- 2>&-", 0, b""),
        ("$S nonsense 2>/dev/full", 2, b""),  # the log of a job on a full disk: what comes next goes by the code
        ("$S nonsense 2>&1 | true; exit ${PIPESTATUS[0]}", 2, b""),
        ("$S nonsense 2>&-", 2, b""),
    ],
)
def test_output_that_goes_nowhere_is_no_defect(line, code, errors):
    done = run_in_shell(line)
    assert done.returncode == code and done.stderr.startswith(errors) and len(done.stderr.splitlines()) == bool(errors)


WORK = """
import os, signal, sys
from pathlib import Path
from slipway.errors import Stopped
from slipway.report import say
from slipway import cli, signals
def work(out: str) -> None:
    "Work that prints, and is told to stop."
    with signals.StopRequests(Path(out), 60.0) as stop, stop.while_saving(lambda: None):
        for step in range(3000):
            say(f"step {step}")
        os.kill(os.getpid(), signal.SIGTERM)
    raise Stopped("saved")
def broken() -> None:
    "A pipe to a process of its own breaks."
    raise BrokenPipeError
cli.COMMANDS |= {"work": work, "broken": broken}
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "line",
    ["$W | head -1; exit ${PIPESTATUS[0]}", "$W >/dev/full", "$W 2>/dev/full", "$W >/dev/full 2>&1", "$W >&- 2>&-"],
)
def test_work_goes_on_where_nobody_reads_it_and_ends_as_it_would(tmp_path, line):
    """`train | head` ended with 0, though it had not trained; a full disk of a log ended it, or lost the code 75."""
    (tmp_path / "work.py").write_text(WORK)
    done = run_in_shell(line, W=f"{sys.executable} {tmp_path}/work.py work {tmp_path}/stop", PYTHONWARNINGS="ignore")
    assert done.returncode == 75, done
    assert (tmp_path / "stop").read_text() == "SIGTERM" and b"Traceback" not in done.stderr


def test_a_pipe_of_the_commands_own_is_no_reader_that_has_gone(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    done = subprocess.run([sys.executable, tmp_path / "work.py", "broken"], capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_a_working_folder_that_was_removed_is_named(tmp_path):
    done = run_in_shell(f"mkdir {tmp_path}/x && cd {tmp_path}/x && rmdir {tmp_path}/x && $S doctor --out run")
    assert done.returncode == 2
    assert done.stderr == b"slipway: the folder that this was started in has been removed; cd to another one\n"


def test_an_encoding_that_lacks_a_character_is_no_defect():
    """Of another locale, and of an image without one: what cannot be shown is spelled out."""
    latin = run_in_shell("$S doctor", PYTHONIOENCODING="latin-1")
    assert latin.returncode == 0 and rb"\u2192 " in latin.stdout
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for words in ("version", "doctor", "watch --help"):
        done = run_in_shell(f"$S {words}", **ascii_alone)
        assert done.returncode == 0 and not done.stderr, done.stderr
