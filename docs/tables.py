#!/usr/bin/env python3
"""Fills the tables of the docs from the declarations in the code: `make docs`. With --check it only says what is old.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`. The comments in the recipes' files are made from the
same declarations.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

from slipway.checkpoint.classic import Options
from slipway.cluster import settings
from slipway.errors import EXIT_CODES
from slipway.families import FAMILIES, Family
from slipway.families.fields import COMMON
from slipway.launch.placement import Patience, Placement
from slipway.options import parameters_of, table
from slipway.training import recipes
from slipway.training.recipe import Recipe

DOCS = Path(__file__).parent


def families() -> str:
    """A row for each family: what `model_type` it serves, and the recipes that ship for it."""
    shipped: dict[str, list[str]] = {}
    for name in recipes.names():
        shipped.setdefault(recipes.family_of(name), []).append(name)
    rows = [
        f"| {name} | {', '.join(f'`{kind}`' for kind in family.MODEL_TYPES)} | "
        f"{', '.join(f'`{recipe}`' for recipe in shipped.get(name, []))} |"
        for name, family in FAMILIES.items()
    ]
    return "\n".join(["| family | `model_type` in config.json | recipes |", "|---|---|---|", *rows]) + "\n"


def fields(family: Family) -> str:
    """What becomes of the fields of a family's config.json, without those that every model has."""
    groups: dict[str, list[str]] = {}
    for name, known in family.FIELDS.items():
        if COMMON.get(name) != known:
            groups.setdefault(known.what, []).append(f"`{name}`")
    rows = [f"| {what} | {', '.join(sorted(names))} |" for what, names in groups.items()]
    return "\n".join(["| what becomes of it | fields |", "|---|---|", *rows]) + "\n"


def common_fields() -> str:
    """What becomes of the fields that transformers writes for every model."""
    groups: dict[str, list[str]] = {}
    for name, known in COMMON.items():
        groups.setdefault(known.what, []).append(f"`{name}`")
    rows = [f"| {what} | {', '.join(names)} |" for what, names in groups.items()]
    return "\n".join(["| what becomes of it | fields |", "|---|---|", *rows]) + "\n"


def exit_codes() -> str:
    """A row for each exit code."""
    rows = [f"| {code} | {meaning} | {again} |" for code, meaning, again in EXIT_CODES]
    return "\n".join(["| exit code | what it means | start it again? |", "|---|---|---|", *rows]) + "\n"


def shown(name: str) -> str:
    """A file of deploy/ as it is."""
    path = DOCS.parent / "deploy" / name
    kind = {".sbatch": "bash", ".yaml": "yaml"}[path.suffix]
    return f"```{kind}\n{path.read_text()}```\n"


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "recipe keys": lambda: table(Recipe),
    "layout keys": lambda: table(recipes.Layout, flags=False),
    "placement flags": lambda: table(Placement),
    "patience flags": lambda: table(Patience),
    "common fields": common_fields,
    "exit codes": exit_codes,
    "keys of lab.toml": lambda: table(settings.Common, flags=False),
    "keys of lab.toml for Slurm": lambda: table(settings.OnSlurm, flags=False),
    "keys of lab.toml for Kubernetes": lambda: table(settings.OnKubernetes, flags=False),
    "classic": lambda: table(Options),
    **{f"deploy/{name}": functools.partial(shown, name) for name in ("slurm.sbatch", "kubernetes/job.yaml")},
    **{f"fields of {name}": functools.partial(fields, family) for name, family in FAMILIES.items()},
}


def filled(page: str) -> str:
    """A page's text with every table as the code declares it now."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        page = re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + make() + end, page)  # noqa: B023
    return page


def commented(toml: str) -> str:
    """A recipe's text with each key's declared help behind it."""
    known = {**recipes.keys(), **parameters_of(recipes.Layout)}

    def line(match: re.Match[str]) -> str:
        key, value = match.group(1), match.group(2).rstrip()
        return f"{f'{key} = {value}':31} # {known[key].about.help}" if key in known else match.group(0)

    return re.sub(r"(?m)^(\w+) = ([^#\n]+)(?:#.*)?$", line, toml)


def main() -> int:
    """Write what is old, or with --check name it and end with 1."""
    pages = {page: filled(page.read_text()) for page in sorted(DOCS.glob("*.md"))}
    files = {file: commented(file.read_text()) for file in sorted(recipes.FOLDER.glob("*.toml"))}
    old = [file for file, text in (pages | files).items() if file.read_text() != text]
    for file in old:
        if "--check" in sys.argv:
            print(f"{file} does not match the code; run `make docs`")
        else:
            file.write_text((pages | files)[file])
    return 1 if old and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
