"""make audit: what is known against the packages of uv.lock. Without a network it says so and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from images import lock
from images.store import BuildError

UNREACHABLE = ("ServiceError", "ConnectionError", "Max retries exceeded", "Failed to resolve", "timed out", "HTTPError")


def audit() -> None:
    """Ask pip-audit about every locked package of an image; BuildError (65) where a vulnerability is known."""
    lines = lock.requirements("--no-default-groups", "--group", "te")
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text("".join(lines.values()))
        words = [lock.VENV / "bin" / "pip-audit", "--requirement", listed, "--disable-pip", "--require-hashes"]
        try:
            done = subprocess.run([*words, "--progress-spinner=off"], capture_output=True, text=True)
        except FileNotFoundError:
            raise BuildError("pip-audit is not installed; run `make setup`") from None
    if done.returncode == 0:
        print(f"audit: nothing is known against the {len(lines)} packages of the images")
    elif "known vulnerabilit" in done.stderr:
        print(done.stdout, end="")
        raise BuildError(f"{done.stderr.strip().splitlines()[0]}; raise the versions and `make lock`", exit_code=65)
    elif any(word in done.stderr for word in UNREACHABLE):
        unchecked = f"{len(lines)} packages are unchecked"
        print(f"audit: not done, the vulnerability service cannot be reached; {unchecked}", file=sys.stderr)
    else:
        raise BuildError(f"pip-audit failed:\n{done.stderr.strip()}", exit_code=1)
