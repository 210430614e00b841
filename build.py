#!/usr/bin/env python3
"""Slipway's build: `python3 build.py COMMAND`. Needs Python 3.11 and nothing installed."""

from __future__ import annotations

import argparse
import sys

from images import lock
from images.store import BuildError

COMMANDS = {
    "setup": (lock.setup, "make .venv from uv.lock"),
    "lock": (lock.lock, "resolve anew and write uv.lock"),
    "check": (lock.check, "does uv.lock fit pyproject.toml?"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    arguments = vars(parser.parse_args())
    function, _ = COMMANDS[arguments.pop("command")]
    try:
        function(**arguments)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
