#!/usr/bin/env python3
"""Slipway's build: `python3 build.py COMMAND`. It needs Python 3.11 and no installed package."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from images import audit, debian, engine, image, lock, publish, sbom, setup, signing, size, sqsh, transformers5, verify
from images.store import BuildError


def lock_all() -> None:
    """Resolve the Python and the Debian packages again."""
    lock.lock()
    transformers5.lock()
    debian.lock()
    debian.lock_hashes()


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "setup": (setup.setup, "install what uv.lock names into .venv"),
    "lock": (lock_all, "resolve all dependencies again and write uv.lock and the locks of Debian packages"),
    "transformers5": (transformers5.setup, "make .venv-transformers5, for the tests that compare with that major"),
    "check": (lock.check, "check that uv.lock fits pyproject.toml"),
    "audit": (audit.audit, "list known vulnerabilities of Python packages, and updates of Debian packages"),
    "fetch": (image.fetch, "fetch everything that images are made of into the store"),
    "engine": (engine.start, "start a private Docker engine, unless an engine answers"),
    "engine-stop": (engine.stop, "stop the private engine"),
    "image": (image.image, "build an image"),
    "images": (image.images, "build the images of all families"),
    "verify": (verify.verify, "build an image twice without cache and compare the two"),
    "size": (size.size, "show how large each layer of an image is and what it holds"),
    "sbom": (sbom.sbom, "print an image's bill of materials (CycloneDX)"),
    "push": (publish.push, "push an image with compressed layers to a registry that docker is logged in to"),
    "archive": (publish.archive, "write an image with compressed layers to one file, an OCI archive"),
    "wheels": (publish.wheels, "write the wheels that an image's sources are built into"),
    "sign": (signing.sign, "sign an image's provenance with a private key"),
    "verify-signature": (signing.verify_signature, "check a signed provenance, and that it is of an image or archive"),
    "sqsh": (sqsh.sqsh, "write an image to a squashfs file for enroot and pyxis"),
    "docker": (engine.run_client, "run docker with the engine in use, for example: build.py docker -- ps"),
}
BUILDING = ("image", "images", "verify", "push", "archive", "wheels")
OF_A_MODEL = ("image", "verify", "size", "sbom", "push", "archive", "wheels", "sqsh", "sign")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="build.py", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        _add_arguments(name, commands.add_parser(name, help=text, description=text))
    return top


def _add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    """The flags of one command."""
    add = command.add_argument
    if name in OF_A_MODEL:
        add("--model", default="gpt_oss", help="a family with a manifest in images/ (default: gpt_oss)")
    if name in (*OF_A_MODEL, "images"):
        add("--variant", default="full", help="full, index or cpu (default: full)")
    if name == "fetch":
        add("--variant", action="append", help="full, index or cpu; repeat it for several (default: cpu and index)")
    if name in (*BUILDING, "fetch"):
        add("--source", action="append", metavar="NAME=PLACE", help="take a source from this clone or mirror")
    if name in (*BUILDING, "fetch"):
        add("--context", action="append", metavar="NAME=PLACE", help="replace a stage or a source tree")
    if name in (*OF_A_MODEL, "images", "fetch"):
        add("--platform", metavar="linux/arm64", help="the processor: linux/amd64 or linux/arm64 (default: this one's)")
    if name in BUILDING:
        add(
            "--architecture",
            action="append",
            metavar="9.0",
            help="compile for these GPUs only, not all of the manifest",
        )
    if name in ("archive", "sqsh"):
        add("--out", required=True, metavar="FILE", help="the file to write")
    if name == "wheels":
        add("--out", required=True, metavar="FOLDER", help="the new folder to write")
        add("--no-cache", action="store_true", help="compile everything again")
    if name == "push":
        add("--to", required=True, metavar="HOST/NAME:TAG", help="the name in the registry")
    if name in ("push", "archive"):
        add("--compression", help="of the layers: zstd or gzip (default: zstd; gzip where the engine has no other)")
    if name == "sign":
        add("--key", required=True, metavar="FILE", help="a private EC or RSA key in PEM")
        add("--statement", metavar="FILE", help="a statement (default: the one of the image's last build)")
    if name == "verify-signature":
        add("file", help="the signed statement, FILE.dsse.json")
        add("--key", required=True, metavar="FILE", help="the public key in PEM")
        add("--image", metavar="NAME", help="the image that the statement must be of")
        add("--archive", metavar="FILE", help="the OCI archive that the statement must be of")
    if name == "audit":
        add("--packages", action="append", metavar="FILE", help="a carried list of packages of a Debian suite")
    if name == "docker":
        add("words", nargs="*", help="words for docker, after --")


def main() -> int:
    arguments = vars(parser().parse_args())
    function, _ = COMMANDS[arguments.pop("command")]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up as Ctrl-C does
    try:
        function(**arguments)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        where = "check this path, and SLIPWAY_STORE and SLIPWAY_LOCAL where they are set"
        print(f"build.py: {error.filename}: {error.strerror}; {where}", file=sys.stderr)
        return 73
    except KeyboardInterrupt:
        print("build.py: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
