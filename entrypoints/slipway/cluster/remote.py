"""One call of a cluster: bash on the login node over the user's own ssh, or here; the records that come back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from slipway.errors import PreflightError, UsageError
from slipway.untrusted import harmless

MARK = "slipway\t"  # what a record begins with; a login shell may print anything else
PATIENCE = 15  # seconds for a connection, not for a password
KEPT = "10m"  # how long a connection is kept, so that one prompt is enough
OF_SSH = 255  # ssh's own exit code where there is no connection

Record = list[str]


def call(host: str | None, text: str, said: Callable[[str], None] | None = None) -> list[Record]:
    """Run a text with bash on a host, and return the records that it prints.

    Args:
        host: as ssh calls it; None is this machine.
        said: gets every line that is no record, and records that begin with `heading` or `progress`, as they come.

    Errors: PreflightError where the host does not answer, and what the text refuses: UsageError or PreflightError.
    """
    words = [*_ssh(host), "bash -s"] if host else ["bash", "-s"]
    # A file, because the connection that is kept stays behind with whatever ssh has open.
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError:
            raise PreflightError(f"there is no {words[0]} on this machine; install it") from None
        records = _exchange(process, text, said)
        code = process.wait()
        errors.seek(0)
        last = _last_line(errors.read())
    for record in records:
        if record[0] == "refused":
            raise {"2": UsageError}.get(record[1], PreflightError)(f"submit: {record[2]}")
    if host and code == OF_SSH:
        raise PreflightError(f"submit: {host} does not answer: {last or 'ssh ended'}; `ssh {host} true` must work")
    if ["end"] not in records:
        where = host or "this machine"
        raise PreflightError(f"submit: bash on {where} ended with {code}: {last or 'no message'}; is bash there?")
    return records


def _exchange(process: subprocess.Popen[bytes], text: str, said: Callable[[str], None] | None) -> list[Record]:
    """Send the text, and read records to the end. The input stays open, for its end says that the client is gone."""
    assert process.stdin and process.stdout
    records = []
    with contextlib.suppress(BrokenPipeError):  # ssh has ended; its exit code says why
        process.stdin.write(text.encode())
        process.stdin.flush()
    try:
        for line in process.stdout:
            shown = line.decode(errors="replace").rstrip("\n")
            if shown.startswith(MARK):
                records.append(shown.removeprefix(MARK).split("\t"))
            if said and (not shown.startswith(MARK) or records[-1][0] in ("heading", "progress")):
                said(shown)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    return records


def _ssh(host: str) -> list[str]:
    """ssh with a connection that is kept, in a folder that only this user can enter."""
    options = {"ConnectTimeout": str(PATIENCE), "ServerAliveInterval": "15", "ServerAliveCountMax": "3"}
    with contextlib.suppress(OSError, RuntimeError):  # else every call connects anew
        folder = Path.home() / ".slipway" / "ssh"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and len(str(folder)) < 40:  # the path of a socket has 107 characters at most
            options |= {"ControlMaster": "auto", "ControlPersist": KEPT, "ControlPath": f"{folder}/%C"}
    return ["ssh", "-T", *(f"-o{name}={value}" for name, value in options.items()), "--", host]


def _last_line(errors: bytes) -> str:
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return harmless(lines[-1], 300) if lines else ""
