"""Where a model is from, by the name that other programs load it by."""

from __future__ import annotations

from pathlib import Path

from slipway.checkpoint.locate import HUB, locate
from slipway.checkpoint.nemo_context import SOURCE_CONFIG
from slipway.untrusted import read_object

NAME = "_name_or_path"  # transformers' own field for it in config.json


def name_of(given: str) -> str:
    """The hub's name of what a command was given as hf://org/name[@revision], else its absolute path."""
    if given.startswith(HUB) and not given.startswith(f"{HUB}/"):
        return given.removeprefix(HUB).partition("@")[0]
    return str(locate(given).absolute())


def source_of(context: Path) -> str:
    """The model that a NeMo checkpoint was imported from, as `import` noted it; "" where nothing is noted."""
    path = context / SOURCE_CONFIG
    return str(read_object(path).get(NAME) or "") if path.is_file() else ""
