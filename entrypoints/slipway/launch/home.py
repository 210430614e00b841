"""A home and a user name for a process that has neither.

Every Python of an image runs `prepare` at its start (a .pth file). So Triton, torch and NeMo find a place for their
caches and a name for the user, also where no entrypoint ran: pyxis and `kubectl exec` start programs without it.
"""

from __future__ import annotations

import os
import stat
import tempfile


def prepare() -> None:
    """Set HOME to a folder that can be written, and USER and LOGNAME to a name, unless they are so already."""
    if not os.access(os.environ.get("HOME") or "/nonexistent", os.W_OK | os.X_OK):
        os.environ["HOME"] = _own_folder(os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}"))
    # Without these, a UID that is in no passwd file makes getpass.getuser fail, which torch calls.
    for name in ("USER", "LOGNAME"):
        if not os.environ.get(name):
            os.environ[name] = f"user{os.getuid()}"


def _own_folder(path: str) -> str:
    """The folder, if this user made it and nobody else may write to it; otherwise a new one with another name.

    /tmp may be that of the machine, where another user can have made the folder before.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return path
        return tempfile.mkdtemp(prefix="home-")
    except OSError:
        return os.environ.get("HOME", "/")  # nothing can be written: what needs a cache will say so
