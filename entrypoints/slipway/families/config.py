"""config.json in one form, whichever program wrote it: the form of transformers 4, which both majors of it read.

transformers 5 moved rope_theta and rope_scaling into rope_parameters, and calls torch_dtype dtype. Some fields have
other names in some releases. A value may stand in either place, or in both if they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families.checks import Config

THETA, PARTIAL = "rope_theta", "partial_rotary_factor"
TYPES = ("rope_type", "type")
NO_SCALING = (None, "default")
PLACES = ("rope_scaling", "rope_parameters")
DTYPES = ("torch_dtype", "dtype")


def canonical(config: Config, aliases: Mapping[str, str], defaults: Config, where: Path) -> dict[str, Any]:
    """The same model's config.json as transformers 4 writes it.

    Args:
        aliases: another name of a field → its name.
        defaults: what transformers assumes for fields that the file does not have.

    Errors: DataError for two values of one thing, named with both of their places.
    """
    c = dict(config)
    for other, name in aliases.items():
        if other in c:
            c[name] = _agreed(where, {name: c.get(name), other: c.pop(other)})
    if any(name in c for name in DTYPES):
        c["torch_dtype"] = _agreed(where, {name: _bare(c.pop(name, None)) for name in DTYPES})
    rope = _rope(c, where)
    c = {name: value for name, value in c.items() if name != "rope_parameters"} | rope
    return {**{name: value for name, value in defaults.items() if c.get(name) is None}, **_given(c, defaults)}


def _given(c: Config, defaults: Config) -> dict[str, Any]:
    """Without a null where transformers takes the default."""
    return {name: value for name, value in c.items() if value is not None or name not in defaults}


def _bare(dtype: Any) -> Any:
    """ "torch.bfloat16", as some releases wrote it, is "bfloat16"."""
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def _agreed(where: Path, values: Mapping[str, Any]) -> Any:
    """The one value of these fields; DataError where two of them differ. Null is no value."""
    said = [(name, value) for name, value in values.items() if value is not None]
    for (one, first), (other, second) in pairwise(said):
        if first != second:
            raise DataError(
                f"{where}: {one} is {first!r}, but {other} is {second!r}; they must be the same: delete the wrong one"
            )
    return said[0][1] if said else None


# ---------------------------------------------------------------------------- rotary positions


def _rope(c: Config, where: Path) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor, as far as they are given anywhere."""
    sections = {place: _section(c, place, where) for place in PLACES}
    found: dict[str, Any] = {}
    for field in (THETA, PARTIAL):
        values = {field: c.get(field)} | {f"{place}.{field}": s.get(field) for place, s in sections.items()}
        if (value := _agreed(where, values)) is not None:
            found[field] = value
    if any(place in c for place in PLACES):
        found["rope_scaling"] = _scaling(sections, where)
    return found


def _section(c: Config, place: str, where: Path) -> dict[str, Any]:
    """rope_scaling or rope_parameters as one flat table; {} where there is none.

    transformers 5 nests a table for each kind of layer. Where all of them are the same, that is the model's.
    """
    section = c.get(place)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise DataError(f"{where}: field {place} is {section!r}; it must be a table or null")
    nested = {name: value for name, value in section.items() if isinstance(value, dict)}
    if not nested:
        return dict(section)
    if len(nested) < len([value for value in section.values() if value is not None]):
        raise DataError(f"{where}: {place} has tables for kinds of layers ({', '.join(nested)}) beside other values")
    first, *others = nested
    for other in others:
        if nested[other] != nested[first]:
            raise DataError(
                f"{where}: {place} differs between {first} and {other}; layers with different rotary positions are not "
                "supported"
            )
    return dict(nested[first])


def _scaling(sections: Mapping[str, dict[str, Any]], where: Path) -> dict[str, Any] | None:
    """The scaling of rotary positions: with rope_type first; None for the type default."""
    kinds: dict[str, Any] = {}
    for place, section in sections.items():
        kinds |= {f"{place}.{name}": section.get(name) for name in TYPES}
    kind = _agreed(where, kinds)
    if kind in NO_SCALING:
        if any(_rest(section) for section in sections.values()) and kind is None:
            raise DataError(f"{where}: rope_scaling has no rope_type; expected one such as yarn, llama3 or linear")
        return None
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in dict.fromkeys(name for section in sections.values() for name in _rest(section)):
        places = {f"{place}.{name}": section.get(name) for place, section in sections.items()}
        scaling[name] = _agreed(where, places)
    return scaling


def _rest(section: Mapping[str, Any]) -> Iterator[str] | list[str]:
    """What a table says beside its type, base and share."""
    return [name for name in section if name not in (*TYPES, THETA, PARTIAL)]
