"""build.py sqsh: an image as a squashfs file in the form of `enroot import`, for `srun --container-image=FILE`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from images import engine, process
from images.image import inspect
from images.manifest import check_variant, read_manifest
from images.request import tag
from images.store import BuildError
from images.target import of_platform

# enroot keeps what it knows of an image in files of its root file system. /etc/rc is the script that starts a command.
RC = """mkdir -p "{workdir}" 2> /dev/null
cd "{workdir}" && unset OLDPWD || exit 1

if [ -s /etc/rc.local ]; then
    . /etc/rc.local
fi

if [ $# -gt 0 ]; then
    exec {entrypoint} "$@"
else
    exec {entrypoint} {command}
fi
"""


def sqsh(model: str, variant: str, out: str, platform: str | None = None) -> None:
    """Write the image's file system to the file `out`; enroot then starts the image's entrypoint and command.

    Errors: BuildError 78 without root, 73 if the file cannot be written.
    """
    check_variant(variant)
    read_manifest(model)
    engine.require()
    name = tag(model, variant, of_platform(platform))
    inspect(name)
    target = Path(out).absolute()
    if not target.parent.is_dir():
        raise BuildError(f"--out {out}: folder {target.parent} not found; create it first", exit_code=73)
    if os.getuid() != 0:
        raise BuildError(
            f"sqsh needs root, to write files of other owners; run it as root, or run `enroot import dockerd://{name}`"
        )
    if not shutil.which("mksquashfs"):
        engine.apt_get("install", "-y", "--no-install-recommends", "squashfs-tools")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".sqsh-") as scratch:
            root = Path(scratch) / "root"
            root.mkdir()
            _export(name, root)
            configure(root, _config(name))
            _squash(root, Path(scratch) / "image.sqsh")
            os.replace(Path(scratch) / "image.sqsh", target)
    except OSError as error:
        reason = f"{error.strerror}; free disk space or use another disk"
        raise BuildError(f"--out {target}: {reason}", exit_code=73) from None
    print(f"sqsh: {target}, {target.stat().st_size / 1e9:.2f} GB")


def _config(name: str) -> dict:
    done = engine.docker("image", "inspect", "--format", "{{json .Config}}", name, capture_output=True, text=True)
    return json.loads(done.stdout)


def _export(name: str, root: Path) -> None:
    """Unpack the image's file system. docker exports containers only, so a container is made; it never runs."""
    container = f"slipway-sqsh-{os.getpid()}"
    try:
        # An interrupt during `docker create` would leave the container after `docker rm` below.
        with process.held():
            created = engine.docker("create", "--name", container, name, capture_output=True, text=True)
        if created.returncode:
            raise BuildError(f"{name}: {created.stderr.strip().splitlines()[-1]}", exit_code=1)
        command = [engine.client(), "export", container]
        # Without devices, as enroot's own importer has it: nobody but root can unpack them, and enroot makes its own.
        words = ["tar", "--extract", "--numeric-owner", "--same-permissions", "--exclude=dev/*", f"--directory={root}"]
        with subprocess.Popen(command, env=engine.environment(), stdout=subprocess.PIPE) as export:
            unpacked = subprocess.run(words, stdin=export.stdout, capture_output=True, text=True)
        if unpacked.returncode or export.returncode:
            reason = (unpacked.stderr.strip().splitlines() or ["docker export failed"])[-1]
            raise BuildError(f"{root.parent.parent}: cannot unpack the image ({reason}); free disk space", exit_code=73)
    finally:
        engine.docker("rm", "--force", container, capture_output=True)


def configure(root: Path, config: dict) -> None:
    """Write the files that enroot reads: /etc/rc, /etc/environment, /etc/fstab, /etc/rc.local."""
    rc = RC.format(
        workdir=config["WorkingDir"] or "/",
        entrypoint=shlex.join(config["Entrypoint"] or []),
        command=shlex.join(config["Cmd"] or ["/bin/sh"]),
    )
    etc = root / "etc"
    (etc / "rc").write_text(rc)
    (etc / "rc").chmod(0o755)
    (etc / "environment").write_text("".join(f"{line}\n" for line in config["Env"]))
    (etc / "fstab").touch()
    (etc / "rc.local").touch()
    (root / ".dockerenv").unlink(missing_ok=True)


def _squash(root: Path, target: Path) -> None:
    words = ["mksquashfs", str(root), str(target), "-comp", "zstd", "-Xcompression-level", "3", "-noappend", "-quiet"]
    done = subprocess.run([*words, "-no-progress", "-mkfs-time", "0", "-all-root"], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"mksquashfs failed: {done.stderr.strip().splitlines()[-1]}; free disk space", exit_code=73)
