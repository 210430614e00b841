"""A home and a user name for a process that has neither.

Every Python of an image runs `prepare` at its start (a .pth file). So Triton, torch and NeMo find a place for their
caches and a name for the user, also where no entrypoint ran: pyxis and `kubectl exec` start programs without it.
"""

from __future__ import annotations

import os


def prepare() -> None:
    """Set HOME to a folder that can be written, and USER and LOGNAME to a name, unless they are so already."""
    if not os.access(os.environ.get("HOME") or "/nonexistent", os.W_OK | os.X_OK):
        os.environ["HOME"] = _own_folder(f"home-{os.getuid()}")
    # Without these, a UID that is in no passwd file makes getpass.getuser fail, which torch calls.
    for name in ("USER", "LOGNAME"):
        if not os.environ.get(name):
            os.environ[name] = f"user{os.getuid()}"


def _own_folder(name: str) -> str:
    """A folder in /tmp, if this user made it and nobody else may write to it; otherwise a new one with another name.

    /tmp may be that of the machine, where another user can have made the folder before.
    """
    import stat  # here, because every Python of an image reads this file at its start, and few need these
    import tempfile

    try:
        path = os.path.join(tempfile.gettempdir(), name)
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return path
        return tempfile.mkdtemp(prefix="home-")
    except OSError:
        return os.environ.get("HOME", "/")  # nothing can be written: what needs a cache will say so
