"""One module per model family, each with the same parts; `family_of` finds the one that a config.json asks for.

NAME            what commands call the family
MODEL_TYPES     the values of `model_type` in config.json that it serves
REQUIRED        the fields of config.json that are needed
check(c, where) refuses what the fields cannot be together
rules(c)        every tensor of both sides and how they relate
nemo_model(c)   what NeMo calls the model, and the fields of its configuration
tiny_config()   a config.json of about a hundred thousand parameters
QUANTIZED, FORM which tensors its published checkpoints hold quantised (by the ends of their names), and how
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from entrypoints.errors import DataError
from entrypoints.families import deepseek_v3, gpt_oss, llama31, qwen3, qwen25
from entrypoints.families.checks import check_required

FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (gpt_oss, qwen3, deepseek_v3, qwen25, llama31)}
BY_MODEL_TYPE = {kind: family for family in FAMILIES.values() for kind in family.MODEL_TYPES}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; DataError where there is none or it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give the folder of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object; fetch it again")
    return config


def family_of(config: dict[str, Any], where: Path) -> ModuleType:
    """The family's module; DataError for an unknown architecture or a missing field."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in BY_MODEL_TYPE:
        near = difflib.get_close_matches(str(kind), BY_MODEL_TYPE, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise DataError(f"{where}: unknown model_type {kind!r}{hint}; known are {', '.join(BY_MODEL_TYPE)}")
    family = BY_MODEL_TYPE[kind]
    check_required(config, where, family.REQUIRED)
    family.check(config, where)
    return family
