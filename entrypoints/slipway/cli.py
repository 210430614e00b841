"""The command line: one dictionary, command → function.

Most of them can be steps of a chain too, and stand in commands/submit.py.

A command is a function whose parameters are its arguments (arguments.py). Everything is checked against their
declarations, and converted to their types, before anything heavy is imported and before any work is done.

An executable that carries a command's name runs that command, so that a link `train → slipway` is `train`.
"""

from __future__ import annotations

import errno
import inspect
import io
import json
import os
import resource
import select
import sys
import tempfile
import textwrap
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import slipway
from slipway import untrusted
from slipway.arguments import arguments_of, parse
from slipway.commands import version, watch
from slipway.commands.demo import demo
from slipway.commands.submit import STEPS, submit
from slipway.errors import EXIT_CODES, PreflightError, SlipwayError, UsageError, WriteError
from slipway.launch.quiet import quiet
from slipway.options import Parameter, suggestion
from slipway.streams import drop
from slipway.untrusted import harmless, harmless_lines, without_credentials

COMMANDS: dict[str, Callable[..., Any]] = {
    **{verb: step.function for verb, step in STEPS.items()},
    "submit": submit,
    "watch": watch.watch,
    "demo": demo.demo,
    "version": version.version,
}
WIDTH = 100  # of the help's lines
# What the file system says of a path that a person gave, and no command foresees at each place.
OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
MOST_OF_AN_ERROR = 300  # characters of a message that is not ours


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` is what follows the program's name."""
    quiet()
    _take_every_text()
    if argv is None:
        program, argv = Path(sys.argv[0]).name, sys.argv[1:]
        argv = [program, *argv] if program in COMMANDS else argv
    try:
        return _run(argv)
    except SlipwayError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to continue")
        return 130
    except Exception as error:  # of any kind: a defect of Slipway, or an input that nobody thought of
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # of `watch` and the like
            drop(sys.stdout)
            return 0
        if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename:
            _complain(f"{harmless(str(error.filename), 300)}: {error.strerror}; check the path")
            return UsageError.exit_code
        if isinstance(error, OSError) and error.errno == errno.EMFILE:  # beyond what a process may have if it asks
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            _complain(
                f"this process may have {most} files open, and needs more; raise that with `ulimit -n` as root, or "
                "docker run --ulimit nofile=65536"
            )
            return PreflightError.exit_code
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            _complain("the folder that this was started in has been removed; cd to another one")
            return UsageError.exit_code
        _complain(_defect(error))
        return SlipwayError.exit_code


def _is_nowhere() -> bool:
    """Whether the working folder is gone, so that no path that begins there means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _take_every_text() -> None:
    """Let both streams take what a command prints: closed ones, and encodings that lack a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # else the next file that is opened gets its number, and what a child prints
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more. Other pipes break too: those to processes of ours."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


def _show(text: str) -> None:
    """Print a result now, while an error can still be told. Whoever reads it may have gone: that is none."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        drop(sys.stdout)
        raise WriteError(f"standard output cannot be written ({error.strerror}); free some space there") from None


def _complain(text: str) -> None:
    """Print why a command ended. Its exit code counts also where that cannot be printed: launchers go by it."""
    try:
        print(f"slipway: {harmless(text)}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def _defect(error: Exception) -> str:
    """One line on an error that should not have been, and where its traceback is."""
    kind = " ".join(f"{type(error).__name__}: {error}".split())[:MOST_OF_AN_ERROR]
    while_reading = f" while reading {untrusted.reading}" if untrusted.reading else ""
    if os.environ.get("SLIPWAY_VERBOSE") == "1":
        traceback.print_exception(error)
        where = "the traceback is above"
    else:
        where = _kept_traceback(error)
    return f"an error that Slipway does not know{while_reading} ({kind}); please report it with the traceback: {where}"


def _kept_traceback(error: Exception) -> str:
    """Where the traceback lies: a new file that only this user can read, since it may hold what was read."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="slipway-", suffix=".traceback")
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            file.write(without_credentials("".join(traceback.format_exception(error))))
    except OSError:
        return "run the command again with SLIPWAY_VERBOSE=1"
    return f"{name}, or run the command again with SLIPWAY_VERBOSE=1"


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        _show(overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        _show(f"slipway {slipway.__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        raise UsageError(f"there is no command {argv[0]!r}{suggestion(name, COMMANDS)}; `slipway --help` lists them")
    function = COMMANDS[name]
    if {"-h", "--help"} & set(argv[1:]):
        _show(help_text(name, function))
        return 0
    as_json, arguments = parse(name, function, argv[1:])
    result = function(**arguments)
    if as_json:
        _show(without_credentials(json.dumps(result.as_dict())))
    else:  # a result with colours has made its words harmless itself
        _show(str(result) if getattr(result, "coloured", False) else harmless_lines(str(result)))
    return getattr(result, "exit_code", 0)


# ---------------------------------------------------------------------------- help


def overview() -> str:
    """The list of commands, each with the first line of its docstring."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{_first_line(function)}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: slipway COMMAND [ARGUMENTS] [--json]",
            "",
            *lines,
            "",
            "`slipway COMMAND --help` explains its arguments.",
            "",
            "Exit codes, and whether to start the same command again:",
            *(f"  {code:<4} {meaning} → {again}" for code, meaning, again in EXIT_CODES),
        ]
    )


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def help_text(name: str, function: Callable[..., Any]) -> str:
    """Usage, description, and every argument with its type, range and default."""
    parameters, positional = arguments_of(function)
    words = "".join(_word(parameters[key]) for key in positional)
    flags = {key: parameter for key, parameter in parameters.items() if key not in positional}
    needed = "".join(f" {one.flag} {_value(one)}" for one in flags.values() if one.default is ...)
    description = (inspect.getdoc(function) or "").partition("\nArgs:\n")[0].strip()
    lines = [f"Usage: slipway {name}{words}{needed} [FLAGS]", "", description, ""]
    for key in positional:
        lines += _entry(key.upper(), parameters[key])
    lines += ["", "Flags:"] if positional else ["Flags:"]
    for parameter in flags.values():
        lines += _entry(f"{parameter.flag} {_value(parameter)}".rstrip(), parameter)
    lines += ["  --json", "      print the result as one JSON object"]
    return "\n".join(lines)


def _word(parameter: Parameter) -> str:
    """A plain word as the usage line shows it: SRC, [RUN], WORDS ..."""
    spelled = parameter.name.upper() + (" ..." if parameter.kind == list[str] else "")
    return f" {spelled}" if parameter.default is ... else f" [{spelled}]"


def _entry(head: str, parameter: Parameter) -> list[str]:
    text = parameter.describe()
    return [f"  {head}", *textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _value(parameter: Parameter) -> str:
    """What stands for the value of a flag."""
    if parameter.kind is bool:
        return ""
    if typing.get_origin(parameter.kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(parameter.kind)))
    if parameter.about.choices:
        return "|".join(parameter.about.choices)
    return {int: "N", float: "NUMBER"}.get(parameter.kind, "KEY=VALUE" if parameter.kind == list[str] else "TEXT")


if __name__ == "__main__":
    sys.exit(main())
