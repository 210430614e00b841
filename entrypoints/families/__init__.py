"""One module per model family, each with the same parts; `family_of` finds the one that a config.json asks for.

MODEL_TYPE           its `model_type` in config.json
REQUIRED             the fields of config.json that are needed
hf_tensors(c)        name → TensorInfo of the BF16 form
megatron_tensors(c)  key → TensorInfo, without NeMo's prefix `module.`
cells(c)             how the two relate
nemo_model(c)        what NeMo calls the model, and the fields of its configuration
tiny_config()        a config.json of a few thousand parameters
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from entrypoints.errors import DataError
from entrypoints.families import gpt_oss

FAMILIES: dict[str, ModuleType] = {gpt_oss.MODEL_TYPE: gpt_oss}


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
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise DataError(f"{where}: unknown model_type {kind!r}{hint}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for field, kinds in family.REQUIRED.items():
        if field not in config:
            raise DataError(f"{where}: field {field} is missing; take config.json from the model's own repository")
        if not isinstance(config[field], kinds) or isinstance(config[field], bool):
            raise DataError(f"{where}: field {field} is {config[field]!r}, which is no {kinds.__name__}")
        if kinds is int and not 0 < config[field] < 1 << 31:
            raise DataError(f"{where}: field {field} is {config[field]}, out of range")
    family.check(config, where)
    return family
