"""docs/data.md says what the code declares."""

from __future__ import annotations

import re
from pathlib import Path

from slipway.options import table
from slipway.tokens.forms import FORMS
from slipway.tokens.wanted import Wanted

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def between(name: str) -> str:
    return PAGE.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0]


def test_the_options():
    assert between("preprocess flags") == table(Wanted)


def test_the_order_of_the_forms():
    rows = re.findall(r"(?m)^\| \d \| ([^|]+) \|", between("forms"))
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == [form.needs for form in FORMS]
