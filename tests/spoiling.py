"""Spoils the content of files at random, in the form that they have, to get past the first look of a reader."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import random
import zipfile
from typing import Any

import yaml

NASTY = [
    None, True, -1, 0, 1 << 31, 1 << 63, 10**30, 1e308, -0.0, 5e-324, "", "a" * 5000, "\x1b[2J", "\u202e", "../../x",
    "/", "/dev/zero", "é\U0001f600", "__class__", [], {}, [[]], {"": {}}, [None] * 50, "9" * 5000, "²", "nan",
    {"a": [1, {}]},
]  # fmt: skip
BYTES = [
    b"", b"\0", b"\xff" * 8, b"[" * 2000, b"{", b'"', b"\n", b"1e999", b"\xed\xa0\x80", b"-", b"\x80\x05\x96",
    b"\\u0000",
]  # fmt: skip
# Values of a line of YAML or TOML; the last ones multiply, come back to themselves, or are numbers without an end.
VALUES = [
    "", "[", "{", "'", "null", "~", "-1", "1e999", ".nan", "2001-99-99", "!!python/object/apply:os.system [x]", "*a",
    "!!binary eA==", "!!set {a, b}", "{? [a] : b}", "{<<: {a: 1}}", "a" * 5000, '"\\u202e\\e[2J"',
    "0x" + "f" * 5000, "1" + ":1" * 3000, "1" + ":1" * 3000 + ".5", "&a [*a, *a]", "&a {a: *a}",
    "[&a0 [0], " + "".join(f"&a{n + 1} [*a{n}, *a{n}], " for n in range(30)) + "*a30]",
]  # fmt: skip
# Instructions of pickles, with what they take from the bytes: calls, attributes, endless copies, foreign names.
OPCODES = [
    b"cos\nsystem\n", b"c__builtin__\ngetattr\n", b"cbuiltins\nset\n", b"cargparse\nNamespace\n", b"c\n\n", b"R", b"b",
    b"\x81", b"(", b"t", b")", b"}", b"]", b"\x85", b"\x86", b"s", b"u", b"a", b"e", b"\x90", b"Q", b"N", b"\x88", b"0",
    b"2", b"h\x00", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"M\xff\xff", b"K\x00",
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"X\x04\0\0\0\x1b[2J",
    b"G" + b"\x7f\xf0" + b"\0" * 6, b"\x96\xff\xff\xff\xff\x00\0\0\0", b"(lp0\nh\x00" + b"\x86h\x00" * 30,
    b"]" + b"2\x86" * 40, b".",
]  # fmt: skip


def spoiled(content: bytes, chance: random.Random, suffix: str = "") -> bytes:
    """The content with some of it changed: in its own form, where it is known, or as bytes.

    Args:
        suffix: of the file's name, for forms of text.
    """
    if chance.random() < 0.6:
        changed = _in_its_form(content, chance, suffix)
        if changed is not None:
            return changed
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(content) + 1), chance.choice([1, 1, 2, 8, 100])
        part = content[at : at + size]
        new = chance.choice([b"", part * 2, bytes(chance.randrange(256) for _ in part), chance.choice(BYTES)])
        content = content[:at] + new + content[at + size :]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.1 else content


def _in_its_form(content: bytes, chance: random.Random, suffix: str) -> bytes | None:
    header = int.from_bytes(content[:8], "little")
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(spoiled(gzip.decompress(content), chance))
    if content[:4] == b"PK\3\4":
        return _in_zip(content, chance)
    if content[8:9] == b"{" and header < len(content):  # safetensors
        changed = spoiled(content[8 : 8 + header], chance)
        return len(changed).to_bytes(8, "little") + changed + content[8 + header :]
    if content[:1] == b"\x80":
        return _in_pickle(content, chance)
    if suffix == ".yaml" and chance.random() < 0.4:
        return yaml.safe_dump(_changed(yaml.safe_load(content), chance)).encode("utf-8", "surrogatepass")
    if suffix in (".yaml", ".toml", ".md"):
        return _in_lines(content.decode(), chance, suffix).encode()
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return json.dumps(_changed(value, chance)).encode("utf-8", "surrogatepass")


def _in_lines(text: str, chance: random.Random, suffix: str) -> str:
    """A text with another value in one of its lines."""
    mark = "=" if suffix == ".toml" else ":"
    lines = text.splitlines()
    at = chance.choice([number for number, line in enumerate(lines) if mark in line] or [0])
    name = lines[at].partition(mark)[0] if lines else ""
    value = chance.choice([*VALUES, *map(json.dumps, NASTY)])
    return "\n".join([*lines[:at], f"{name}{mark} {value}", *lines[at + 1 :], ""])


def _in_zip(content: bytes, chance: random.Random) -> bytes:
    """An archive of torch with one entry spoiled, mostly the pickle; now and then compressed, twice, or gone."""
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        for entry in zipped.infolist():
            entry.CRC = None  # torch's need not have one
        entries = [(entry.filename, zipped.read(entry)) for entry in zipped.infolist()]
    pickled = next(number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    at = pickled if chance.random() < 0.8 else chance.randrange(len(entries))
    name, inside = entries[at]
    how = chance.random()
    if how < 0.05:
        del entries[at]
    elif how < 0.1:
        entries[at] = (chance.choice(["x", "../x", f"{name}x", "/dev/zero", "a" * 5000]), inside)
    else:
        entries[at] = (name, spoiled(inside, chance))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if how > 0.95 else zipfile.ZIP_STORED) as zipped:
        for name, inside in entries:
            zipped.writestr(name, inside)
    return out.getvalue()


def _in_pickle(content: bytes, chance: random.Random) -> bytes | None:
    """A pickle with some of its instructions left out, doubled, in another order, or others in their place."""
    try:
        places = [place for _, _, place in pickletools.genops(content)]
    except ValueError:
        return None
    end = places[-1] + 1
    parts = [content[a:b] for a, b in zip(places, [*places[1:], end], strict=True)]
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(parts))
        other = parts[chance.randrange(len(parts))]
        value = chance.choice(NASTY)
        as_value = pickle.dumps(value, protocol=2)[2:-1]
        parts[at : at + 1] = chance.choice(
            [[], [parts[at]] * 2, [other], [parts[at], other], [chance.choice(OPCODES)], [as_value],
             [parts[at], chance.choice(OPCODES)]]
        )  # fmt: skip
        if not parts:
            break
    return b"".join(parts) + content[end:]


def _changed(value: Any, chance: random.Random) -> Any:
    for _ in range(chance.randint(1, 3)):
        value = _in_json(value, chance)
    return value


def _in_json(value: Any, chance: random.Random) -> Any:
    """The value with one part of it, at any depth, replaced, left out or moved."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if chance.random() < 0.1:
            return {**value, chance.choice(["x", "", f"{key}{key}", "__proto__"]): chance.choice(NASTY)}
        return {**value, key: _in_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], *([] if chance.random() < 0.2 else [_in_json(value[at], chance)]), *value[at + 1 :]]
    return chance.choice(NASTY)
