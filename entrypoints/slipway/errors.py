"""Errors that a user can cure, each with the exit code that scripts can rely on.

The message of every one of them is a single line that names the thing, the place and the cure.
"""


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
