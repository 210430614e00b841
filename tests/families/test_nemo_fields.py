"""What NeMo is told of each kind of model, as it was when test_forward.py last proved it right.

A change of it shows here within a second. If it is meant, and test_forward.py passes, write the list again:
PYTHONPATH=entrypoints:tests python tests/families/test_nemo_fields.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, config_of
from slipway.families import understood
from slipway.families.decoder import Symbol

FILE = Path(__file__).with_suffix(".json")


def told(kind: str) -> dict[str, Any]:
    """NeMo's classes and fields of a kind of model, as plain JSON."""
    family, c = understood(config_of(kind), Path("model/config.json"))
    model, config, fields = family.nemo_model(c)
    plain = {name: value.target if isinstance(value, Symbol) else value for name, value in sorted(fields.items())}
    return json.loads(json.dumps({"model": model, "config": config, "fields": plain}))


@pytest.mark.parametrize("kind", KINDS)
def test_nemo_is_told_the_same(kind):
    assert told(kind) == json.loads(FILE.read_text())[kind]


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind: told(kind) for kind in KINDS}, indent=1) + "\n")
