"""The command line: one dictionary, command → function.

Python Fire calls the function and writes its help; what stands before it makes it strict. Arguments are
checked against the function's signature and converted by its annotations before anything heavy is imported
and before any work is done, and Fire is handed nothing but `--name=value`.

An executable that carries a command's name runs that command, so that a link `train → slipway` is `train`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entrypoints
from entrypoints import demo, dequant, doctor, export, heads, import_, inspect_, preprocess, train, verify, version
from entrypoints.errors import SlipwayError, UsageError

COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor.doctor,
    "dequant": dequant.dequant,
    "import": import_.import_,
    "export": export.export,
    "inspect": inspect_.inspect,
    "verify": verify.verify,
    "preprocess": preprocess.preprocess,
    "train": train.train,
    "extract-heads": heads.extract_heads,
    "merge-heads": heads.merge_heads,
    "demo": demo.demo,
    "version": version.version,
}

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` is what follows the program's name."""
    if argv is None:
        program, argv = Path(sys.argv[0]).name, sys.argv[1:]
        argv = [program, *argv] if program in COMMANDS else argv
    warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)
    try:
        return _run(argv)
    except SlipwayError as error:
        print(f"slipway: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("slipway: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        print(f"slipway {entrypoints.__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        raise UsageError(f"there is no command {argv[0]!r}{_suggest(name, COMMANDS)}; `slipway --help` lists them")
    function = COMMANDS[name]
    if {"-h", "--help"} & set(argv[1:]):
        print(help_text(name, function))
        return 0
    as_json, arguments = parse(name, function, argv[1:])
    return _call_through_fire(name, function, arguments, as_json)


# ---------------------------------------------------------------------------- reading the command line


def parse(name: str, function: Callable[..., Any], argv: list[str]) -> tuple[bool, dict[str, Any]]:
    """(--json given?, argument name → value of its annotated type); UsageError for anything else."""
    annotations = typing.get_type_hints(function)
    parameters = {p: _given(annotations.get(p, str)) for p in inspect.signature(function).parameters}
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    as_json, words, flags = _split(name, parameters, argv)
    if len(words) > len(positional):
        raise UsageError(f"{name}: unexpected argument {words[len(positional)]!r}; see `slipway {name} --help`")
    given = [*zip(positional, words, strict=False), *flags]
    arguments: dict[str, Any] = {}
    for key, text in given:
        value = convert(name, key, text, parameters[key])
        if isinstance(value, list):
            value = [*arguments.get(key, []), *value]
        elif key in arguments:
            raise UsageError(f"{name}: {_flag(key)} is given twice")
        arguments[key] = value
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UsageError(f"{name}: {_spell(parameter)} is missing; see `slipway {name} --help`")
    return as_json, arguments


def _split(name: str, parameters: dict[str, Any], argv: list[str]) -> tuple[bool, list[str], list[tuple[str, str]]]:
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
            flag, equals, text = word.partition("=")
            key, negated = _parameter(name, flag, parameters)
            if negated:
                text = "false"
            elif not equals:
                if parameters[key] is bool:
                    text = "true"
                elif not rest:
                    raise UsageError(f"{name}: {flag} needs a value")
                else:
                    text = rest.pop(0)
            flags.append((key, text))
    return as_json, words, flags


def _parameter(name: str, flag: str, parameters: dict[str, Any]) -> tuple[str, bool]:
    """The parameter that `--flag`, `-f` or `--no-flag` means, and whether it is negated."""
    key = flag.lstrip("-").replace("-", "_")
    if flag.startswith("--"):
        if key in parameters:
            return key, False
        positive = key.removeprefix("no_")
        if parameters.get(positive) is bool:
            return positive, True
    elif len(short := [p for p in parameters if p[0] == key]) == 1:
        return short[0], False
    known = [_flag(parameter) for parameter in parameters]
    raise UsageError(f"{name}: unknown flag {flag}{_suggest(flag, known)}; see `slipway {name} --help`")


def _given(kind: Any) -> Any:
    """What a value has to be if there is one: X of X | None."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def convert(name: str, key: str, text: str, kind: Any) -> Any:
    """`text` as a value of the annotation `kind`: str, int, float, bool, Literal or list[str]."""
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if text not in choices:
            raise UsageError(f"{name}: {_flag(key)} takes {', '.join(choices)}; not {text!r}{_suggest(text, choices)}")
        return text
    if typing.get_origin(kind) is list:
        return [text]
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UsageError(f"{name}: {_flag(key)} is true or false; not {text!r}")
        return BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UsageError(f"{name}: {_flag(key)} takes {what}; not {text!r}") from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _spell(parameter: inspect.Parameter) -> str:
    return parameter.name.upper() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else _flag(parameter.name)


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


# ---------------------------------------------------------------------------- help and the call


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
            "`slipway COMMAND --help` tells what it takes. Exit codes: 0 done, 2 usage, 65 bad input data,",
            "73 cannot write, 75 stopped and saved (run again to go on), 78 preflight failed, 1 a defect, or models",
            "that `verify` finds to differ.",
        ]
    )


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def help_text(name: str, function: Callable[..., Any]) -> str:
    """Fire's help for one command, without terminal control codes."""
    import re

    sys.modules.setdefault("IPython", None)  # Fire would import it for the docstring, which takes half of the time
    from fire import helptext, trace

    steps = trace.FireTrace(function, name=f"slipway {name}")
    text = re.sub(r"\x1b\[[0-9;]*m", "", helptext.HelpText(function, trace=steps))
    return text + "\n\nEVERY COMMAND\n    --json\n        Print the result as one JSON object."


def _call_through_fire(name: str, function: Callable[..., Any], arguments: dict[str, Any], as_json: bool) -> int:
    import fire
    from fire import decorators

    parsers = {key: (lambda _, value=value: value) for key, value in arguments.items()}
    strict = decorators.SetParseFns(**parsers)(function)
    words = [f"{_flag(key)}=given" for key in arguments]
    render = (lambda result: json.dumps(result.as_dict())) if as_json else str
    result = fire.Fire(strict, command=words, name=f"slipway {name}", serialize=render)
    return getattr(result, "exit_code", 0)


if __name__ == "__main__":
    sys.exit(main())
