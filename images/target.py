"""What an image is built for: the processor, as Docker, Debian, Python and wheels name it."""

from __future__ import annotations

import platform as machines
from dataclasses import dataclass

from images.store import BuildError


@dataclass(frozen=True)
class Target:
    """A processor: `machine` as uname, Python's markers and wheels name it, `debian` as Debian and Docker do."""

    machine: str
    debian: str

    @property
    def platform(self) -> str:
        """Docker's name."""
        return f"linux/{self.debian}"

    @property
    def marker(self) -> str:
        """The condition of uv.lock that is true on this processor."""
        return f"platform_machine == '{self.machine}'"


X86_64 = Target("x86_64", "amd64")
AARCH64 = Target("aarch64", "arm64")
TARGETS = {target.platform: target for target in (X86_64, AARCH64)}


def of_platform(name: str | None) -> Target:
    """The target with Docker's name, or this machine's.

    Errors: BuildError for another name (2), or another machine (78).
    """
    if name in TARGETS:
        return TARGETS[name]
    if name is not None:
        raise BuildError(f"--platform {name}: images are made for {' and '.join(TARGETS)}; use one of them", 2)
    return here()


def here() -> Target:
    """This machine's; BuildError for a processor that nothing is locked for."""
    found = machines.machine()
    for target in TARGETS.values():
        if found in (target.machine, target.debian):
            return target
    raise BuildError(
        f"this machine is {found}, and packages are locked for {' and '.join(t.machine for t in TARGETS.values())}; "
        "use a machine of these"
    )
