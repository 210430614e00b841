"""The last value that is taken and the first that is refused, of every check of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import config_of
from slipway.errors import DataError
from slipway.families import FAMILIES, PARTS, checks, family_of, fields, notes, understood

WHERE = Path("model/config.json")


def taken(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except DataError:
        return False
    return True


@pytest.mark.parametrize(
    "kinds, value, good",
    [
        (int, 0, False), (int, 1, True), (int, 2**31 - 1, True), (int, 2**31, False), (int, True, False),
        ((int, float), 0, False), ((int, float), 1e-9, True), ((int, float), 9.9e29, True), ((int, float), 1e30, False),
    ],
)  # fmt: skip
def test_sizes(kinds, value, good):
    assert taken(checks.check_required, {"size": value}, WHERE, {"size": kinds}) == good


@pytest.mark.parametrize(
    "value, good", [(-1, False), (0, True), (3, True), (4, False), (True, False), (1.0, False), (None, False)]
)
def test_counts(value, good):
    assert taken(checks.check_count, {"count": value}, WHERE, "count", 3) == good


@pytest.mark.parametrize(
    "changes, good",
    [
        ({}, True), ({"head_dim": 1}, True), ({"head_dim": 2**31 - 1}, True), ({"head_dim": 2**31}, False),
        ({"head_dim": 16.0}, False), ({"head_dim": -16}, False), ({"hidden_size": 3}, False),
        ({"num_key_value_heads": 3}, False), ({"num_key_value_heads": 1}, True),
    ],
)  # fmt: skip
def test_heads(changes, good):
    c = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    assert taken(checks.check_heads, c, WHERE) == good


def test_the_size_of_a_head_is_given_or_follows():
    c = {"hidden_size": 64, "num_attention_heads": 4}
    assert checks.head_dim(c) == checks.head_dim({**c, "head_dim": None}) == 16
    assert checks.head_dim({**c, "head_dim": 48}) == 48


def test_a_model_type_that_is_no_word():
    for kind in (["llama"], 3, None, ""):
        with pytest.raises(DataError, match="unknown model_type"):
            family_of({"model_type": kind}, WHERE)


def test_the_families_are_a_mapping():
    assert len(FAMILIES) == len(list(FAMILIES)) > 4 and not PARTS & FAMILIES.keys()
    for name in ("checks", "novel"):
        with pytest.raises(KeyError, match=name):
            FAMILIES[name]


def test_what_other_programs_read_otherwise_is_noted():
    _, c = understood(config_of("qwen3_yarn"), WHERE)
    assert [note.partition(" ")[0] for note in notes(c)] == ["rope_scaling.attn_factor"]
    assert [note.partition(" ")[0] for note in notes({"dual_chunk_attention_config": {"chunk_size": 8}})] == [
        "dual_chunk_attention_config"
    ]
    assert notes({}) == notes({"rope_scaling": None}) == notes({"rope_scaling": {"factor": 2.0}}) == []


def test_a_table_of_tables_may_have_nulls_beside_them():
    config = config_of("gpt_oss")
    scaling = config.pop("rope_scaling")
    rope = {"full_attention": scaling, "sliding_attention": scaling, "extra": None}
    assert understood({**config, "rope_parameters": rope}, WHERE)[1]["rope_scaling"]["rope_type"] == "yarn"
    with pytest.raises(DataError, match="beside other values"):
        understood({**config, "rope_parameters": {**rope, "factor": 2.0}}, WHERE)


def test_a_long_value_is_shortened():
    known = {"model_type": fields.USED}
    for length, shown in ((58, "a" * 58), (59, "a" * 56 + "…")):
        with pytest.raises(DataError) as error:
            fields.check_fields({"model_type": "novel", "name": "a" * length}, WHERE, known)
        assert f"('{shown}" in str(error.value) and ("…" in str(error.value)) == (length == 59)
