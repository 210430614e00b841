"""What a person can set: every range is checked before anything else, wherever the value comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from slipway import cli
from slipway.errors import UsageError
from slipway.launch.placement import Patience, Placement
from slipway.options import Option, check_group, option, parameters_of, table
from slipway.training import recipes
from slipway.training.recipe import Recipe

NOT_THERE = ["train", "--model", "not-there", "--data", "not-there", "--out", "not-there"]


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("--lr", "nan", "more than 0, at most 10"),
        ("--lr", "inf", "more than 0, at most 10"),
        ("--lr", "-1", "more than 0, at most 10"),
        ("--min-lr", "nan", "0 to 10"),
        ("--clip-grad", "nan", "0 or more"),
        ("--clip-grad", "inf", "0 or more"),
        ("--weight-decay", "-1", "0 to 1"),
        ("--lora-rank", "0", "1 to 65536"),
        ("--lora-dropout", "7", "0 or more, less than 1"),
        ("--lora-dropout", "1", "0 or more, less than 1"),
        ("--first-stage-layers", "-5", "0 or more"),
        ("--seed", "-1", "0 to 4294967295"),
        ("--steps", "1" + "0" * 30, "at most 1000000000"),
        ("--steps", "1" + "0" * 5000, "--steps takes a whole number"),
        ("--steps", "0", "1 or more"),
        ("--steps", "²", "--steps takes a whole number"),
        ("--grace", "nan", "0 to 10000000"),
        ("--grace", "-1", "0 to 10000000"),
        ("--rendezvous-timeout", "0", "more than 0, at most 10000000"),
        ("--master-port", "99999999", "1 to 65534"),
        ("--master-port", "65535", "1 to 65534"),
        ("--nproc-per-node", "-1", "1 to 1000000"),
        ("--nodes", "0", "--nodes is 0; it must be 1 to 1000000"),
        ("--node-rank", "-1", "0 to 1000000"),
        ("--master-addr", "n1:29500", "without a port: give the port with --master-port"),
        ("--master-addr", "[fe80::1]:29500", "without a port"),
        ("--master-addr", "", "without a port"),
        ("--recompute", "som", "it must be one of none, full"),
        ("--mode", "hedas", "did you mean heads?"),
        ("--set", "lr=nan", "--set lr is nan; it must be more than 0, at most 10"),
        ("--set", "steps=0", "--set steps is 0; it must be 1 or more"),
        ("--set", "lrr=1", "did you mean lr?"),
        ("--seed", "4294967296", "0 to 4294967295"),
        ("--gpu-memory", "0", "1 to 100000"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["train", "dry-run"])
def test_what_is_out_of_range_is_refused_before_anything_is_looked_for(capsys, flag, value, said, more):
    assert cli.main([*NOT_THERE, f"{flag}={value}", *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and flag in error


@pytest.mark.parametrize("address", ["n1", "10.0.0.1", "fe80::1", "job-0.service.namespace.svc.cluster.local"])
def test_addresses_without_a_port_pass(address):
    Placement(master_addr=address).check()


def test_a_schedule_longer_than_the_run_is_refused_where_it_was_asked_for():
    with pytest.raises(UsageError, match=r"are 30 steps, more than --steps 20; lower them or increase --steps"):
        Recipe("m", "d", "o", steps=20, warmup_steps=10, constant_steps=20).check(1)


def test_a_learning_rate_that_would_rise_at_the_end_is_refused():
    with pytest.raises(UsageError, match="lower --min-lr"):
        Recipe("m", "d", "o", lr=1e-6, min_lr=1e-5).check(1)


@pytest.mark.parametrize("group", [Recipe, Placement, Patience, recipes.Layout])
def test_every_default_is_allowed_and_every_option_says_what_it_is(group):
    for name, parameter in parameters_of(group).items():
        assert len(parameter.about.help) > 5 and parameter.about.help[-1] != ".", name
        if parameter.default not in (..., None):
            assert parameter.about.problem(parameter.default) == "", name


def test_a_number_without_a_range_would_be_noticed():
    """Every number that a person can set has a smallest value: nan and infinity are refused for all."""
    for group in (Recipe, Placement, Patience, recipes.Layout):
        for name, parameter in parameters_of(group).items():
            about = parameter.about
            if parameter.kind in (int, float):
                assert about.low is not None or about.above is not None, name


def test_a_recipes_file_is_checked_by_the_same_ranges(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('family = "gpt_oss"\n[heads]\nlr = nan\n[heads.80GB]\nnodes = 1\n')
    with pytest.raises(UsageError, match=r"\[heads\]: lr is nan; it must be more than 0, at most 10"):
        recipes.load(str(file), "heads", 80)
    file.write_text('family = "gpt_oss"\n[heads]\nsteps = "many"\n[heads.80GB]\nnodes = 0\n')
    with pytest.raises(UsageError, match="steps is 'many'; it must be a whole number"):
        recipes.load(str(file), "heads", 80)
    file.write_text('famly = "gpt_oss"\n[heads]\n[heads.80GB]\n')
    with pytest.raises(UsageError, match="unknown key famly, did you mean family"):
        recipes.load(str(file), "heads", 80)
    file.write_text('family = "gpt_oss"\n[heads]\n[heads.80gb]\n')
    with pytest.raises(UsageError, match="unknown table 80gb, did you mean 80GB"):
        recipes.load(str(file), "heads", 80)


@dataclass
class Some:
    count: int = option(3, "how many", unit="things", low=1)
    share: float = option(0.5, "how much", low=0, below=1)
    kind: str = option("a", "which", choices=("a", "b"))
    name: str | None = option(None, "what it is called", otherwise="its own")


def test_one_declaration_gives_help_checks_and_docs():
    assert parameters_of(Some)["count"].describe() == "how many (things; 1 or more; default: 3)"
    assert parameters_of(Some)["name"].describe() == "what it is called (default: its own)"
    assert "| `--share` | how much |  | 0 or more, less than 1 | 0.5 |" in table(Some)
    assert "| `kind` | which |  | a, b | a |" in table(Some, flags=False)
    check_group(Some())
    for change in (
        {"count": 0},
        {"share": 1.0},
        {"share": float("nan")},
        {"kind": "c"},
        {"count": True},
        {"count": 2.5},
    ):
        with pytest.raises(UsageError):
            check_group(dataclasses.replace(Some(), **change))


@pytest.mark.parametrize(
    "about, words",
    [
        (Option("x"), ""),
        (Option("x", low=1), "1 or more"),
        (Option("x", low=0, high=1), "0 to 1"),
        (Option("x", above=0), "more than 0"),
        (Option("x", above=0, high=10), "more than 0, at most 10"),
        (Option("x", high=5), "at most 5"),
        (Option("x", low=0, below=1), "0 or more, less than 1"),
        (Option("x", low=1, high=10**9), "1 or more"),
    ],
)
def test_a_range_in_words(about, words):
    assert about.range() == words


def test_the_docs_are_those_of_the_code():
    import subprocess
    import sys

    script = Path(__file__).parent.parent / "docs" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
