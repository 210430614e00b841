#!/usr/bin/env python3
"""Slipway's build: `python3 build.py COMMAND`. Needs Python 3.11 and nothing installed."""

from __future__ import annotations

import argparse
import sys

from images import debian, engine, image, lock
from images.store import BuildError


def lock_all() -> None:
    """Resolve Python's and Debian's packages anew."""
    lock.lock()
    debian.lock()


COMMANDS = {
    "setup": (lock.setup, "make .venv from uv.lock"),
    "lock": (lock_all, "resolve anew and write uv.lock and images/debian.lock"),
    "check": (lock.check, "does uv.lock fit pyproject.toml?"),
    "fetch": (image.fetch, "bring everything that images are made of into the store"),
    "engine": (engine.start, "start a private Docker engine unless one answers"),
    "engine-stop": (engine.stop, "stop the private engine"),
    "image": (image.image, "build an image"),
    "docker": (engine.run_client, "run docker against the engine in use: build.py docker -- ps"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="build.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == "image":
            command.add_argument("--model", default="gpt_oss")
            command.add_argument("--variant", default="cpu")
        if name == "docker":
            command.add_argument("words", nargs="*")
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
