"""Which lines of an output are Slipway's own, so that a test can ask that nobody else has printed anything."""

from __future__ import annotations

import re

from slipway.cli import COMMANDS

# A command's name before its lines; steps and evaluations of a run; "  | " before a sample that preprocess shows.
NAMES = "|".join([*COMMANDS, "slipway", "topology", "worker"])
OURS = re.compile(rf"({NAMES}): |\$ slipway |step \d+/\d+ loss |evaluation after step \d+: |  \| |$")


def not_ours(output: str) -> list[str]:
    """The lines that a library has printed."""
    return [line for line in output.splitlines() if not OURS.match(line)]
