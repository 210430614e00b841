"""make audit: known vulnerabilities of the packages in uv.lock, and Debian packages that were updated since the lock.

Without a network it says so and changes nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from images import debian, lock, setup
from images.store import BuildError
from images.target import TARGETS, here

# pip-audit has one exit code for all failures: words in its message tell "no network" from the rest.
UNREACHABLE = ("ServiceError", "ConnectionError", "Max retries exceeded", "Failed to resolve", "timed out", "HTTPError")


def audit(packages: list[str] | None = None) -> None:
    """Check Python and Debian packages; BuildError (65) if a vulnerability or an update is known.

    Args:
        packages: lists of packages of Debian's suites, carried from a machine with a network.
    """
    found = [*_debian([Path(path) for path in packages or ()]), *_python()]
    if found:
        raise BuildError("\n".join(found), exit_code=65)


def _debian(lists: list[Path]) -> list[str]:
    """What to say about Debian packages that are behind their suites."""
    targets = [here()] if lists else list(TARGETS.values())  # a list is of one processor
    try:
        lines = [line for target in targets for line in debian.newer(target, lists)]
    except BuildError as error:
        if error.exit_code != 78:
            raise
        print(f"audit: skipped for Debian packages: {error}", file=sys.stderr)
        return []
    behind = list(dict.fromkeys(lines))  # most packages have one version on all processors
    locked = f"Debian packages of {debian.locked_on(targets[0])}"
    if not behind:
        print(f"audit: no updates for the {locked}")
        return []
    return [*behind, f"{len(behind)} {locked} have updates; run `make lock`"]


def _python() -> list[str]:
    """What pip-audit says about every locked package of an image."""
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
        print(f"audit: no known vulnerabilities in the {len(lines)} Python packages of the images")
    elif "known vulnerabilit" in done.stderr:
        first = done.stderr.strip().splitlines()[0]
        return [done.stdout.rstrip(), f"{first}; raise the versions in pyproject.toml, then run `make lock`"]
    elif any(word in done.stderr for word in UNREACHABLE):
        unchecked = f"{len(lines)} Python packages are unchecked"
        print(f"audit: skipped, cannot connect to the vulnerability service; {unchecked}", file=sys.stderr)
    else:
        raise BuildError(f"pip-audit failed:\n{done.stderr.strip()}", exit_code=1)
    return []
