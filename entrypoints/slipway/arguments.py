"""The words of a command line, read against the function that they are for, before anything heavy is imported.

A command is a function whose parameters are its arguments; what stands before `*` may be given as plain words. The last
of these takes all words that are left, where its type is list[str]. Groups of options that several commands share
(options.py) are added by `with_options`.
"""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from slipway.errors import UsageError
from slipway.options import Option, Parameter, flag, from_text, given, groups_of, parameters_of, suggestion


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


def parse(name: str, function: Callable[..., Any], argv: list[str]) -> tuple[bool, dict[str, Any]]:
    """(--json given?, argument name → value of its declared type); UsageError for anything else."""
    parameters, positional = arguments_of(function)
    as_json, words, flags = _split(name, parameters, argv)
    places = [*positional]
    if positional and parameters[positional[-1]].kind == list[str]:
        places += [positional[-1]] * (len(words) - len(positional))
    if len(words) > len(places):
        raise UsageError(f"{name}: unexpected argument {words[len(places)]!r}; see `slipway {name} --help`")
    arguments: dict[str, Any] = {}

    def spelling(key: str) -> str:
        return key.upper() if key in positional else flag(key)

    for key, text in [*zip(places, words, strict=False), *flags]:
        _refuse_unnameable(f"{name}: {flag(key)}", text)
        if not text and parameters[key].default is ...:  # a variable of the shell that is not set; else the folder here
            one_of = "one of " * (parameters[key].kind == list[str])
            raise UsageError(f"{name}: {one_of}{spelling(key)} is empty; see `slipway {name} --help`")
        value = from_text(f"{name}: {flag(key)}", parameters[key], text)
        if isinstance(value, list):
            value = [*arguments.get(key, []), *value]
        elif key in arguments:
            raise UsageError(f"{name}: {flag(key)} is given twice")
        arguments[key] = value
    for key, parameter in parameters.items():
        if parameter.default is ... and key not in arguments:
            raise UsageError(f"{name}: {spelling(key)} is missing; see `slipway {name} --help`")
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
                elif (alone := parameters[key].about.alone) and (not rest or rest[0].startswith("--")):
                    text = alone
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
