"""make audit: known vulnerabilities of the packages in uv.lock. Without a network it says so and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from images import lock, setup
from images.store import BuildError

# pip-audit has one exit code for all failures: words in its message tell "no network" from the rest.
UNREACHABLE = ("ServiceError", "ConnectionError", "Max retries exceeded", "Failed to resolve", "timed out", "HTTPError")


def audit() -> None:
    """Ask pip-audit about every locked package of an image; BuildError (65) if a vulnerability is known."""
    lines = lock.requirements("--no-default-groups", "--group", "te")
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text("".join(lines.values()))
        words = ["--requirement", str(listed), "--disable-pip", "--require-hashes", "--progress-spinner=off"]
        try:
            done = subprocess.run([str(setup.VENV / "bin" / "pip-audit"), *words], capture_output=True, text=True)
        except FileNotFoundError:
            raise BuildError("pip-audit not found; run `make setup` to install it") from None
    if done.returncode == 0:
        print(f"audit: no known vulnerabilities in the {len(lines)} packages of the images")
    elif "known vulnerabilit" in done.stderr:
        print(done.stdout, end="")
        found = done.stderr.strip().splitlines()[0]
        raise BuildError(f"{found}; raise the versions in pyproject.toml, then run `make lock`", exit_code=65)
    elif any(word in done.stderr for word in UNREACHABLE):
        unchecked = f"{len(lines)} packages are unchecked"
        print(f"audit: skipped, cannot connect to the vulnerability service; {unchecked}", file=sys.stderr)
    else:
        raise BuildError(f"pip-audit failed:\n{done.stderr.strip()}", exit_code=1)
