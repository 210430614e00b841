"""The words of a chain: the commands' own checks, and paths that the jobs will have. Nothing is sent before."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from slipway.cli import COMMANDS
from slipway.cluster import chain, settings
from slipway.commands.submit import STEPS
from slipway.errors import UsageError
from test_lab import SLURM, WHOLE, read

TRAIN = "train --model nemo://m --data /shared/x.jsonl --out /shared/run"


@pytest.fixture
def lab(tmp_path: Path) -> settings.Lab:
    return read(tmp_path, SLURM.replace("[env]", '[env]\nHF_HOME = "/shared/hf"'))


def steps(words: str, lab: settings.Lab) -> list[chain.Step]:
    return chain.steps_of(shlex.split(words), lab, STEPS)


def test_the_flow_of_a_client(lab):
    found = steps(f"import hf:///shared/DeepSeek-V3 nemo://m then {TRAIN} then export /shared/run /shared/hf-out", lab)
    assert [step.name for step in found] == ["1-import", "2-train", "3-export"]
    assert found[0].words == ["hf:///shared/DeepSeek-V3", "nemo://m"]
    assert found[1].words[-2:] == ["--grace", "540"] and found[1].keys.nodes == 5
    assert [(step.keys.nodes, step.keys.gpus_per_node) for step in found] == [(1, 0), (5, 8), (1, 0)]


@pytest.mark.parametrize(
    "words, said",
    [
        ("imprt a b", "'imprt' is no step, did you mean import?"),
        ("watch /shared/run", "'watch' is no step"),
        ("submit status", "'submit' is no step"),
        ("import hf://a/b nemo://m then", "a step is empty"),
        ("import hf://a/b", "step 1: import: DST is missing"),
        ("import hf://a/b nemo://m --mtpp", "step 1: import: unknown flag --mtpp, did you mean --mtp?"),
        (f"import hf://a/b nemo://m then {TRAIN} --steps many", "step 2: train: --steps takes a whole number"),
        (f"{TRAIN} --lr 20", "train: --lr is 20.0; it must be more than 0, at most 10"),
        (f"{TRAIN} --set stepz=3", "--set stepz=3 is not KEY=VALUE of a recipe"),
        (f"{TRAIN} --nodes 4", "--nodes is 4, but nodes in lab.toml is 5"),
        (f"{TRAIN} --master-addr x", "--master-addr is given by the cluster"),
        (f"{TRAIN} --node-rank 0", "--node-rank is given by the cluster"),
        ("doctor --nodes 4", "doctor: --nodes is 4, but nodes in lab.toml is 5"),
        ("doctor --master-addr x", "doctor: --master-addr is given by the cluster"),
        ("bench qwen3_30b_a3b --nodes 2", "bench: --nodes is 2, but this step has one node"),
        (f"{TRAIN} --resume never", "--resume never would end a run that was queued again"),
        (f"{TRAIN} --recipe gpt_os", "step 1: there is no recipe gpt_os, did you mean gpt_oss"),
        ("preprocess /shared/a /shared/x.jsonl --tokenizer /shared/t --recipe x", "step 1: there is no recipe x"),
        (f"{TRAIN} --grace 700", "--grace is 700 s, more than stop_before, 600 s"),
        ("import model /shared/nemo", "import: SRC is model; give the whole path, from /"),
        ("import /data/model /shared/nemo", "import: SRC is /data/model, which no mount of"),
        ("import /lustre/me/hf /shared/nemo", "the containers see it as /shared/hf"),
        ("import /shared/../etc /shared/nemo", "write it without .."),
        ("import /shared/a nemo:///data/model", "import: DST is /data/model, which no mount of"),
        ("import /shared/a nemo://../m", "import: DST is nemo://../m, which does not name a model"),
        (f"{TRAIN} --set eval_data=/data/e.jsonl", "train: --eval-data is /data/e.jsonl, which no mount of"),
        (f"{TRAIN} --eval-data /shared/a:1,/data/b:2", "train: --eval-data is /data/b, which no mount of"),
        ("bench qwen25_7b --set stepz=3", "--set stepz=3 is not KEY=VALUE of a recipe"),
        ("import hf:///data/model nemo://m", "import: SRC is /data/model, which no mount of"),
        ("import hf://a/b nemo://m --adapter /data/a", "--adapter is /data/a, which no mount of"),
        ("train --model nemo://m --data /shared/a.bin:1,/data/b.bin:2 --out /shared/r", "/data/b.bin, which no mount"),
        ("train --model nemo://m --data /shared/a --out run", "train: --out is run; give the whole path"),
        (f"{TRAIN} --config my.json", "train: --config is my.json; give the whole path"),
        ("import /shared/a /shared/b --config /my/config.json", "--config is /my/config.json, which no mount of"),
        ("export /shared/a /shared/b --config c", "export: --config is c; give the whole path"),
        ("inspect /shared/a --config c", "inspect: --config is c; give the whole path"),
        ("verify /shared/a /shared/b --config c", "verify: --config is c; give the whole path"),
        ("preprocess hf://datasets/a/b /shared/x.jsonl --tokenizer /t", "preprocess: --tokenizer is /t"),
        ("export https://me:pw@host/x /shared/y", "a URL has a password"),
        (f"{TRAIN} --nproc-per-node 9", "train: --nproc-per-node is 9, but gpus_per_node in lab.toml is 8"),
        ("export '/shared/a\nb' /shared/y", "has a character that no line of a script can have"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(lab, words, said):
    with pytest.raises(UsageError) as error:
        steps(words, lab)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_need_a_folder_that_outlives_the_container(tmp_path):
    lab = read(tmp_path, SLURM)
    with pytest.raises(UsageError, match=r"hf://a/b: set HF_HOME in \[env\] of .* to a folder under a mount"):
        steps("import hf://a/b nemo://m", lab)
    lab = read(tmp_path, SLURM.replace('"/nemo"', '"/lustre/me/nemo"'))
    with pytest.raises(UsageError, match="but NEMO_HOME is /lustre/me/nemo; the containers see it as /shared/nemo"):
        steps("import /shared/hf nemo://m", lab)


def test_without_an_image_every_path_of_the_cluster_will_do(tmp_path):
    lab = read(tmp_path, 'job_dir = "/jobs"\n')
    assert len(steps("import hf://a/b nemo://m then export /any/where /else/where", lab)) == 2


def test_every_command_is_a_step_or_known_to_be_none():
    assert COMMANDS.keys() - STEPS.keys() == {"watch", "submit", "demo", "version"}
    assert all(STEPS[verb].function is COMMANDS[verb] for verb in STEPS)
    assert {verb for verb in STEPS if WHOLE[verb]} == {"train", "doctor"}


@pytest.mark.parametrize("verb", STEPS)
def test_the_paths_of_every_step_are_arguments_of_it(verb):
    from slipway.arguments import arguments_of

    parameters, words = arguments_of(STEPS[verb].function)
    assert set(STEPS[verb].paths) <= parameters.keys()
    plain = {"config", "path", "src", "dst", "out", "ckpt", "heads", "base", "a", "b", "data", "model", "recipe"}
    assert set(words) <= set(STEPS[verb].paths) & plain
