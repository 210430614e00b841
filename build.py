#!/usr/bin/env python3
"""Slipway's build: `python3 build.py COMMAND`. Needs Python 3.11 and nothing installed."""

from __future__ import annotations

import argparse
import signal
import sys

from images import audit, debian, engine, image, lock, publish, sbom, size, sqsh, verify
from images.store import BuildError


def lock_all() -> None:
    """Resolve Python's and Debian's packages anew."""
    lock.lock()
    debian.lock()


COMMANDS = {
    "setup": (lock.setup, "make .venv from uv.lock"),
    "lock": (lock_all, "resolve anew and write uv.lock and images/debian.lock"),
    "check": (lock.check, "does uv.lock fit pyproject.toml?"),
    "audit": (audit.audit, "known vulnerabilities of what uv.lock names"),
    "fetch": (image.fetch, "bring everything that images are made of into the store"),
    "engine": (engine.start, "start a private Docker engine unless one answers"),
    "engine-stop": (engine.stop, "stop the private engine"),
    "image": (image.image, "build an image"),
    "images": (image.images, "build every family's image"),
    "verify": (verify.verify, "build an image twice without cache and compare"),
    "size": (size.size, "what an image's layers hold"),
    "sbom": (sbom.sbom, "print an image's bill of materials (CycloneDX)"),
    "push": (publish.push, "push an image, its layers compressed, to a registry that docker is logged in to"),
    "archive": (publish.archive, "write an image, its layers compressed, as one OCI archive"),
    "wheels": (publish.wheels, "write the wheels that an image's sources are built into"),
    "sqsh": (sqsh.sqsh, "write an image as a squashfs for enroot and pyxis"),
    "docker": (engine.run_client, "run docker against the engine in use: build.py docker -- ps"),
}
BUILDING = ("image", "images", "verify", "push", "archive", "wheels")
OF_A_MODEL = ("image", "verify", "size", "sbom", "push", "archive", "wheels", "sqsh")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="build.py", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in OF_A_MODEL:
            command.add_argument("--model", default="gpt_oss")
        if name in (*OF_A_MODEL, "images"):
            command.add_argument("--variant", default="full")
        if name == "fetch":
            command.add_argument("--variant", action="append", help="cpu and index if none is named")
        if name in (*BUILDING, "fetch"):
            command.add_argument("--source", action="append", metavar="NAME=PLACE", help="a clone or a mirror")
        if name in BUILDING:
            command.add_argument("--context", action="append", metavar="NAME=PLACE", help="a named build context")
        if name in ("archive", "wheels", "sqsh"):
            command.add_argument("--out", required=True, help="the file, or for wheels the folder, to write")
        if name == "wheels":
            command.add_argument("--anew", action="store_true", help="compile again, without a cache")
        if name == "push":
            command.add_argument("--to", required=True, metavar="HOST/NAME:TAG", help="where to push it")
        if name in ("push", "archive"):
            command.add_argument("--compression", default="zstd", help="of the layers: zstd or gzip")
        if name == "docker":
            command.add_argument("words", nargs="*")
    return top


def main() -> int:
    arguments = vars(parser().parse_args())
    function, _ = COMMANDS[arguments.pop("command")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as on Ctrl-C
    try:
        function(**arguments)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("build.py: interrupted; the same command goes on with what is there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
