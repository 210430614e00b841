"""Errors that a user can cure, each with the exit code that scripts can rely on.

The message of every one of them is a single line that names the thing, the place and the cure.
"""

from typing import NamedTuple


class ExitCode(NamedTuple):
    """What an exit code means.

    Args:
        again: whether, and when, it is of use to start the same command again.
    """

    code: int
    meaning: str
    again: str


# The one list: `slipway --help` and docs/launching.md show it.
EXIT_CODES = (
    ExitCode(0, "all is done, or was done already", "no"),
    ExitCode(1, "anything else, which the message says; also models that `verify` finds to differ", "look first"),
    ExitCode(2, "wrong usage", "not before it is corrected"),
    ExitCode(65, "bad input data", "not before it is mended"),
    ExitCode(69, "another node was lost", "yes, on other nodes"),
    ExitCode(73, "the disk is full or cannot be written", "after some space was freed"),
    ExitCode(75, "stopped and saved on request", "yes, the same command"),
    ExitCode(78, "the machine is not fit, or a folder is held by another run", "not before it is mended"),
    ExitCode(130, "interrupted by Ctrl-C", "yes, the same command"),
)


class SlipwayError(Exception):
    """A failure that is not a defect of Slipway; printed as one line, never with a traceback."""

    exit_code = 1


class UsageError(SlipwayError):
    """The command line is wrong: unknown flag, wrong type, missing path, existing output."""

    exit_code = 2


class DataError(SlipwayError):
    """The input is missing something, truncated, garbled or of an unknown kind."""

    exit_code = 65


class LostPeer(SlipwayError):
    """A node or a rank of another node was lost; the same command goes on from the newest checkpoint without it."""

    exit_code = 69


class WriteError(SlipwayError):
    """The output cannot be written: full disk, read-only target, no permission."""

    exit_code = 73


class Stopped(SlipwayError):
    """Stopped on request with everything saved; the same command goes on from there."""

    exit_code = 75


class PreflightError(SlipwayError):
    """The machine or its set-up cannot do what was asked; found before any work was done."""

    exit_code = 78
