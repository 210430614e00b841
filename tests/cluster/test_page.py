"""docs/launching.md: every lab.toml that it shows is read, and its chain is one that can be sent."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from slipway.cluster import chain
from slipway.commands.submit import STEPS
from test_lab import read

PAGE = (Path(__file__).parents[2] / "docs" / "launching.md").read_text()


def test_every_file_and_the_chain_below_it_are_good(tmp_path):
    parts = re.split(r"```toml\n(.*?)```", PAGE, flags=re.S)
    files, below = parts[1::2], parts[2::2]
    assert len(files) == 3
    for text, after in zip(files, below, strict=True):
        lab = read(tmp_path, text)
        (command,) = re.findall(r"(?m)^slipway submit --[\w-]+ -- (.*)$", after.partition("```toml")[0])
        steps = chain.steps_of(shlex.split(command), lab, STEPS)
        assert steps[0].verb == "import" and any(step.saves for step in steps)


def test_what_submit_asks_of_wrong_words_is_told():
    from slipway.cluster.submission import VERBS

    assert all(f"slipway submit {verb}" in PAGE for verb in VERBS)
