"""What the README and the docs say exists, exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from slipway import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_make_target_is_there():
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))
    asked = {word for words in commands() if "make" in words for word in words[words.index("make") + 1 :]}
    asked |= {word for page in PAGES for word in re.findall(r"`make ([a-z0-9-]+)", page.read_text())}
    assert {word for word in asked if "=" not in word} <= targets


def test_every_slipway_command_shown_is_understood():
    shown = [words[1:] for words in commands() if words[0] == "slipway"]
    shown += [words[words.index("slipway/gpt_oss:cpu") + 1 :] for words in commands() if "slipway/gpt_oss:cpu" in words]
    assert len(shown) >= 5
    for words in shown:
        cli.parse(words[0], cli.COMMANDS[words[0]], words[1:])


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in cli.COMMANDS if f"slipway {name}" not in text and f"make {name}" not in text] == []
