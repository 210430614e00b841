"""The command line: one dictionary, command → function.

A command is a function whose parameters are its arguments; what stands before `*` may be given as plain words. Groups
of options that several commands share (options.py) are added by `with_options`. Everything is checked against these
declarations, and converted to their types, before anything heavy is imported and before any work is done.

An executable that carries a command's name runs that command, so that a link `train → slipway` is `train`.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import sys
import tempfile
import textwrap
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import slipway
from slipway import untrusted
from slipway.commands import (
    dequant,
    doctor,
    export,
    extract_heads,
    import_checkpoint,
    init,
    merge_heads,
    preprocess,
    train,
    verify,
    version,
    watch,
)
from slipway.commands import inspect as inspect_checkpoint
from slipway.commands.demo import demo
from slipway.errors import SlipwayError, UsageError
from slipway.launch.quiet import quiet
from slipway.options import Option, Parameter, flag, from_text, given, groups_of, parameters_of, suggestion
from slipway.untrusted import harmless, harmless_lines, without_credentials

COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor.doctor,
    "dequant": dequant.dequant,
    "init": init.init,
    "import": import_checkpoint.import_checkpoint,
    "export": export.export,
    "inspect": inspect_checkpoint.inspect,
    "verify": verify.verify,
    "preprocess": preprocess.preprocess,
    "train": train.train,
    "watch": watch.watch,
    "extract-heads": extract_heads.extract_heads,
    "merge-heads": merge_heads.merge_heads,
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
    if argv is None:
        program, argv = Path(sys.argv[0]).name, sys.argv[1:]
        argv = [program, *argv] if program in COMMANDS else argv
    try:
        return _run(argv)
    except SlipwayError as error:
        print(f"slipway: {harmless(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("slipway: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # of any kind: a defect of Slipway, or an input that nobody thought of
        if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename:
            print(f"slipway: {harmless(str(error.filename), 300)}: {error.strerror}; check the path", file=sys.stderr)
            return UsageError.exit_code
        print(f"slipway: {harmless(_defect(error))}", file=sys.stderr)
        return SlipwayError.exit_code


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
        print(overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        print(f"slipway {slipway.__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        raise UsageError(f"there is no command {argv[0]!r}{suggestion(name, COMMANDS)}; `slipway --help` lists them")
    function = COMMANDS[name]
    if {"-h", "--help"} & set(argv[1:]):
        print(help_text(name, function))
        return 0
    as_json, arguments = parse(name, function, argv[1:])
    result = function(**arguments)
    if as_json:
        print(without_credentials(json.dumps(result.as_dict())))
    else:  # a result with colours has made its words harmless itself
        print(str(result) if getattr(result, "coloured", False) else harmless_lines(str(result)))
    return getattr(result, "exit_code", 0)


# ---------------------------------------------------------------------------- what a command takes


def arguments_of(function: Callable[..., Any]) -> tuple[dict[str, Parameter], list[str]]:
    """(name → Parameter of everything that the command takes, the names that may be given as plain words)."""
    hints = typing.get_type_hints(function)
    explained = _explained(function)
    found: dict[str, Parameter] = {}
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue  # the groups of options
        default = ... if parameter.default is parameter.empty else parameter.default
        about = Option(explained.get(parameter.name, ""))
        found[parameter.name] = Parameter(parameter.name, given(hints.get(parameter.name, str)), default, about)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            words.append(parameter.name)
    for group in groups_of(function):
        found |= {name: parameter for name, parameter in parameters_of(group).items() if name not in found}
    return found, words


def _explained(function: Callable[..., Any]) -> dict[str, str]:
    """Argument → what the docstring says of it, in one line."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"(?m)^    (\w+): (.*(?:\n {8}.*)*)", section)
    return {name: " ".join(text.split()) for name, text in entries}


# ---------------------------------------------------------------------------- reading the command line


def parse(name: str, function: Callable[..., Any], argv: list[str]) -> tuple[bool, dict[str, Any]]:
    """(--json given?, argument name → value of its declared type); UsageError for anything else."""
    parameters, positional = arguments_of(function)
    as_json, words, flags = _split(name, parameters, argv)
    if len(words) > len(positional):
        raise UsageError(f"{name}: unexpected argument {words[len(positional)]!r}; see `slipway {name} --help`")
    arguments: dict[str, Any] = {}
    for key, text in [*zip(positional, words, strict=False), *flags]:
        _refuse_unnameable(f"{name}: {flag(key)}", text)
        value = from_text(f"{name}: {flag(key)}", parameters[key], text)
        if isinstance(value, list):
            value = [*arguments.get(key, []), *value]
        elif key in arguments:
            raise UsageError(f"{name}: {flag(key)} is given twice")
        arguments[key] = value
    for key, parameter in parameters.items():
        if parameter.default is ... and key not in arguments:
            spelled = key.upper() if key in positional else flag(key)
            raise UsageError(f"{name}: {spelled} is missing; see `slipway {name} --help`")
    return as_json, arguments


def _refuse_unnameable(where: str, text: str) -> None:
    """UsageError for what no file, host or program can be called: a NUL, half of a surrogate pair."""
    try:
        good = "\0" not in text and bool(os.fsencode(text) or not text)
    except UnicodeEncodeError:
        good = False
    if not good:
        raise UsageError(f"{where} is {text[:40]!r}; it has a character that no name can have")


def _split(
    name: str, parameters: Mapping[str, Parameter], argv: list[str]
) -> tuple[bool, list[str], list[tuple[str, str]]]:
    """Plain words and (parameter, text) pairs, with every flag known."""
    as_json, words, flags, rest = False, [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if word == "--json":
            as_json = True
        elif not word.startswith("-") or word == "-" or _is_number(word):
            words.append(word)
        else:
            spelled, equals, text = word.partition("=")
            key, negated = _parameter(name, spelled, parameters)
            if negated:
                text = "false"
            elif not equals:
                if parameters[key].kind is bool:
                    text = "true"
                elif not rest:
                    raise UsageError(f"{name}: {spelled} needs a value")
                else:
                    text = rest.pop(0)
            flags.append((key, text))
    return as_json, words, flags


def _parameter(name: str, spelled: str, parameters: Mapping[str, Parameter]) -> tuple[str, bool]:
    """The parameter that `--flag`, `-f` or `--no-flag` means, and whether it is negated."""
    key = spelled.lstrip("-").replace("-", "_")
    if spelled.startswith("--"):
        if key in parameters:
            return key, False
        positive = key.removeprefix("no_")
        if positive in parameters and parameters[positive].kind is bool:
            return positive, True
    elif len(short := [p for p in parameters if p[0] == key]) == 1:
        return short[0], False
    known = [flag(parameter) for parameter in parameters]
    raise UsageError(f"{name}: unknown flag {spelled}{suggestion(spelled, known)}; see `slipway {name} --help`")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


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
            "`slipway COMMAND --help` explains its arguments. Exit codes: 0 done, 1 a defect of Slipway, or models",
            "that `verify` finds to differ, 2 wrong usage, 65 bad input data, 73 cannot write, 75 stopped and saved",
            "(run the same command again to continue), 78 the machine is not fit.",
        ]
    )


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def help_text(name: str, function: Callable[..., Any]) -> str:
    """Usage, description, and every argument with its type, range and default."""
    parameters, positional = arguments_of(function)
    words = "".join(f" {key.upper()}" if parameters[key].default is ... else f" [{key.upper()}]" for key in positional)
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
