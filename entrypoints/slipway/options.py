"""What a person can set: one declaration of each value, from which flags, help, files, checks and docs are made.

A group of options is a dataclass whose fields are made by `option`. The field's name is the flag's and the file's
key, its annotation the type, its default the default. `Option` holds what those cannot say: help, unit and range.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from slipway.errors import UsageError

Group = TypeVar("Group")
LARGEST = 10**9  # of a count
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Option:
    """What is known of a value that a person can set.

    Args:
        help: what it is, in one line.
        unit: what a number counts.
        low, high: the smallest and the largest value that is allowed.
        above: the largest value that is too small.
        below: the smallest value that is too large.
        choices: the only values that are allowed.
        otherwise: what is used where nothing is given and there is no default value.
        alone: what the flag means without a value.
    """

    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    otherwise: str = ""
    alone: str = ""

    def range(self) -> str:
        """What is allowed, in words: "1 or more", "0 to 1", "more than 0, at most 10"; empty where everything is."""
        if self.choices:
            return ", ".join(self.choices)
        most = None if self.high == LARGEST else self.high  # more is a typing mistake: not worth a word
        if self.low is not None and most is not None:
            return f"{_plain(self.low)} to {_plain(most)}"
        parts = [
            f"{_plain(self.low)} or more" if self.low is not None else "",
            f"more than {_plain(self.above)}" if self.above is not None else "",
            f"at most {_plain(most)}" if most is not None else "",
            f"less than {_plain(self.below)}" if self.below is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def problem(self, value: Any) -> str:
        """What is wrong with a value of the right type, in words; empty where nothing is."""
        if self.choices:
            return "" if value in self.choices else f"it must be one of {self.range()}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"it must be {self.range() or 'a finite number'}"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return ""
        outside = (
            (self.low is not None and value < self.low)
            or (self.above is not None and value <= self.above)
            or (self.high is not None and value > self.high)
            or (self.below is not None and value >= self.below)
        )
        allowed = self.range()
        if outside and self.high == LARGEST and value > LARGEST:
            allowed = f"at most {_plain(self.high)}"
        return f"it must be {allowed}" if outside else ""


def _plain(number: float | None) -> str:
    """As a person writes it: 65534, 0.5."""
    return f"{number:.15g}" if isinstance(number, float) else str(number)


def option(default: Any, help: str, **about: Any) -> Any:
    """A field of a group: its default (`...` where it must be given) and what Option takes."""
    metadata = {"option": Option(help, **about)}
    return dataclasses.field(**({} if default is ... else {"default": default}), metadata=metadata)


@dataclass(frozen=True)
class Parameter:
    """One option of a group or argument of a command.

    Args:
        kind: its type without `| None`: str, int, float, bool, list[str] or a Literal.
        default: `...` where it must be given.
    """

    name: str
    kind: Any
    default: Any
    about: Option

    @property
    def flag(self) -> str:
        return flag(self.name)

    def describe(self) -> str:
        """Its help with unit, range and default, as `--help` and the docs show it."""
        alone = f"without a value: {self.about.alone}" if self.about.alone else ""
        facts = [self.about.unit, "" if self.about.choices else self.about.range(), alone, self._default()]
        facts = [fact for fact in facts if fact]
        return self.about.help.rstrip(".") + (f" ({'; '.join(facts)})" if facts else "")

    def _default(self) -> str:
        if self.about.otherwise:
            return f"default: {self.about.otherwise}"
        if self.default in (..., None, "", False, []):
            return ""
        return f"default: {self.default}"


def parameters_of(group: Any) -> Mapping[str, Parameter]:
    """Name → Parameter of every option of a group, in order."""
    hints = typing.get_type_hints(group)
    return {
        field.name: Parameter(
            field.name,
            given(hints[field.name]),
            ... if field.default is dataclasses.MISSING else field.default,
            field.metadata["option"],
        )
        for field in dataclasses.fields(group)
    }


def given(kind: Any) -> Any:
    """What a value must be if there is one: X of X | None."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def from_text(where: str, parameter: Parameter, text: str) -> Any:
    """The value that a person wrote for an option, of its type and in its range.

    Args:
        where: what the message begins with, such as "train: --steps".

    Errors: UsageError that says what was expected.
    """
    kind = parameter.kind
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if text not in choices:
            raise UsageError(f"{where} takes {', '.join(choices)}; not {text!r}{suggestion(text, choices)}")
        return text
    if typing.get_origin(kind) is list:
        return [text]
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UsageError(f"{where} takes true or false; not {text!r}")
        return BOOLEANS[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"{where} takes {NAMES.get(kind, kind.__name__)}; not {text[:40]!r}") from None
    check(where, parameter, value)
    return value


def check(where: str, parameter: Parameter, value: Any) -> None:
    """UsageError unless a value, of whatever origin, is of the option's type and in its range."""
    kind = parameter.kind
    is_number = kind is float and type(value) is int
    if kind in NAMES and type(value) is not kind and not is_number:
        raise UsageError(f"{where} is {value!r}; it must be {NAMES[kind]}")
    if problem := parameter.about.problem(value):
        near = suggestion(value, parameter.about.choices) if isinstance(value, str) else ""
        shown = value if isinstance(value, (int, float)) and len(str(value)) < 40 else repr(value)[:40]
        raise UsageError(f"{where} is {shown}; {problem}{near}")


def check_group(values: Any) -> None:
    """UsageError for the first value of a filled group that is out of its range."""
    for name, parameter in parameters_of(type(values)).items():
        if (value := getattr(values, name)) is not None:
            check(parameter.flag, parameter, value)


def flag(name: str) -> str:
    """The flag of an option's name."""
    return "--" + name.replace("_", "-")


def suggestion(word: str, known: Iterable[str]) -> str:
    """ ", did you mean …?" where a known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def table(group: type, *, flags: bool = True) -> str:
    """The options of a group as a Markdown table, for the docs.

    Args:
        flags: name each by its flag; else by its key in a file.
    """
    lines = [f"| {'flag' if flags else 'key'} | what it is | unit | allowed | default |", "|---|---|---|---|---|"]
    for row in parameters_of(group).values():
        about, name = row.about, row.flag if flags else row.name
        default = about.otherwise or ("" if row.default in (..., None) else str(row.default))
        lines.append(f"| `{name}` | {about.help} | {about.unit} | {about.range()} | {default} |")
    return "\n".join(lines) + "\n"


def with_options(*groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command take the options of these groups as well; what is given of them arrives in its `**options`."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__dict__["option_groups"] = groups
        return function

    return mark


def groups_of(function: Callable[..., Any]) -> tuple[type, ...]:
    """The groups that `with_options` gave to a command."""
    return function.__dict__.get("option_groups", ())


def take(group: type[Group], options: Mapping[str, Any]) -> Group:
    """A group filled with what is given of it; the rest keeps its defaults."""
    return group(**{name: options[name] for name in parameters_of(group) if name in options})


def given_of(group: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of a group, by name."""
    return {name: options[name] for name in parameters_of(group) if options.get(name) is not None}
