"""The paths of docs/training.md from a download to an exported model, command by command, on tiny models and data."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import slipway
import torch
from conftest import make_model

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
TASKS = [("Name the number after {}.", "It is {}."), ("Double {}.", "That makes {}.")]


def paths() -> list[list[list[str]]]:
    """The commands of each block of the section."""
    section = PAGE.read_text().partition("## From a download to an exported model")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [[shlex.split(line) for line in block.splitlines()] for block in blocks]


def alpaca(folder: Path) -> Path:
    """A data set as the hub has it."""
    rows = [
        {"instruction": ask.format(n), "input": "", "output": answer.format(n + 1), "text": "all of it once more"}
        for n in range(240)
        for ask, answer in TASKS
    ]
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text("# Alpaca\n")
    return folder


def chats(file: Path) -> None:
    turns = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}]
    file.write_text(json.dumps([{"messages": turns * (1 + n % 2)} for n in range(48)], indent=1))


def corpus(folder: Path) -> None:
    folder.mkdir()
    for number, file in enumerate(sorted(Path(slipway.__file__).parent.rglob("*.py"))[:12]):
        (folder / f"{number}.txt").write_text(file.read_text())


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    """What the docs name → the tiny stand-in, and the values that only cost time here."""
    root = tmp_path_factory.mktemp("hub")
    kinds = {"deepseek-ai/DeepSeek-V3-Base": "deepseek_v3", "meta-llama/Llama-3.1-8B-Instruct": "llama31"}
    kinds["Qwen/Qwen2.5-0.5B"] = "qwen25_tied"
    found = {f"hf://{name}": str(make_model(root / kind, kind)) for name, kind in kinds.items()}
    found["hf://datasets/tatsu-lab/alpaca"] = str(alpaca(root / "alpaca"))
    return found | {"2%": "45%", "1024": "128", "1000": "2", "num_hidden_layers=12": "num_hidden_layers=3"}


@pytest.mark.parametrize("commands", paths(), ids=lambda commands: commands[0][2].rpartition("/")[2])
def test_a_path_as_it_is_written(commands, names, tmp_path, warm):
    """Each command in turn, and transformers loads what comes out."""
    assert len(commands) <= 6
    here = {"folder": tmp_path, "env": {"NEMO_HOME": str(tmp_path / "home")}}
    chats(tmp_path / "chats.json")
    corpus(tmp_path / "corpus")
    for number, (program, *words) in enumerate(commands):
        assert program == "slipway"
        words = [names.get(word, word) for word in words]
        code, output = warm.start(words, tmp_path / f"output{number}", **here).finish()
        assert code == 0 and "Traceback" not in output, output
    exported = tmp_path / commands[-1][3]
    base = names[commands[0][2]]
    logits = logits_of(exported, base if "--adapter" in commands[-1] else None)
    assert torch.isfinite(logits).all()


def logits_of(folder: Path, base: str | None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(5, 25)[None]
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    from slipway.commands.dequant import dequant

    dequant(base, str(folder.parent / "bf16"))
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "bf16", dtype=torch.float32)
    plain = model(tokens).logits
    adapted = PeftModel.from_pretrained(model, folder)(tokens).logits
    assert not torch.equal(plain, adapted)
    return adapted


def test_there_are_the_three_paths():
    assert [commands[0][1] for commands in paths()] == ["import", "import", "init"]
